"""Greedy output with and without speculation, and transformers' own: the same tokens, or a counted tie.

The reference is ``generate`` in float32, one prompt at a time.  Against it: the engine without speculation, with
chains and with trees, one request at a time and eight, while drafters are exchanged in mid-request.  They are
taught on other prompts first, so that a good part of what they draft is accepted: a drafter that is never right would
prove nothing.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from livedraft.benchmarks.load import answers, console, fresh_drafter, greedy, swap_to
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance, write
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import Delivery, Trace
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.contracts.settings import Trainer
from livedraft.serving.local.engine import LocalEngine
from livedraft.serving.local.place import find
from livedraft.traces.memory import MemoryStream
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import read_target
from rich.progress import track
from torch import Tensor

#: A difference counts as a tie where the reference's two best logits are closer than this.
TIE = 1e-4
#: Prompts, steps and snapshots of the lesson before.
_TAUGHT, _STEPS, _SNAPSHOTS = 96, 120, 3

Prompt = list[int]


def lossless(place: Path | None, target: str, threads: int, prompts: int, tokens: int) -> None:
    """See ``livedraft bench lossless --help``."""
    texts = held_out_prompts()
    if prompts + _TAUGHT > len(texts):
        raise SettingsError(f"--prompts {prompts}: expected at most {len(texts) - _TAUGHT}")
    plain = EngineSettings(target=target, threads=threads, draft_depth=0)
    engine = LocalEngine(plain)
    rendered = [engine.render([{"role": "user", "content": text}]) for text in texts[: prompts + _TAUGHT]]
    engine.close()
    asked, taught = rendered[:prompts], rendered[prompts:]
    with tempfile.TemporaryDirectory() as folder:
        drafters = _teach(plain, taught, tokens, Path(folder))
        reference = Reference.generate(find(target), asked, tokens)
        modes = {}
        for name, settings in _modes(target, threads).items():
            for at_once in (1, 8):
                modes[f"{name}, {at_once} at once"] = _compare(settings, asked, tokens, at_once, drafters, reference)
    write(
        {
            "checked": sum(found["checked"] for found in modes.values()),
            "mismatches": sum(found["mismatches"] for found in modes.values()),
            "ties": sum(found["ties"] for found in modes.values()),
            "swaps": sum(found["swaps"] for found in modes.values()),
            "prompts": prompts,
            "tokens_each": tokens,
            "modes": modes,
            "provenance": provenance(),
        },
        place,
    )


def _modes(target: str, threads: int) -> dict[str, EngineSettings]:
    def settings(depth: int, topk: int) -> EngineSettings:
        return EngineSettings(
            target=target, threads=threads, draft_depth=depth, tree_topk=topk, adaptive_depth=False, max_running=8
        )

    return {"no speculation": settings(0, 1), "chain": settings(4, 1), "tree": settings(4, 2)}


class Reference:
    """What transformers' ``generate`` answers, and how close a call each token was."""

    def __init__(self, answers: list[list[int]], margins: list[Tensor]) -> None:
        self._answers = answers
        #: f[tokens] of each answer: the best logit less the second.
        self._margins = margins

    @classmethod
    def generate(cls, folder: Path, prompts: Sequence[Prompt], tokens: int) -> Reference:
        """Answer ``prompts`` one at a time, greedily, with exactly ``tokens`` tokens each."""
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # Without the target's own defaults: an end-of-text token is one like any other here, as with ``ignore_eos``.
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=tokens)
        answers, margins = [], []
        for prompt in track(prompts, description="transformers, one at a time", console=console):
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True
            )
            best = torch.cat(out.logits).topk(2).values
            answers.append(out.sequences[0, len(prompt) :].tolist())
            margins.append(best[:, 0] - best[:, 1])
        return cls(answers, margins)

    def verdict(self, number: int, answer: list[int]) -> str:
        """ "same", "tie" or "mismatch"."""
        expected = self._answers[number]
        if answer == expected:
            return "same"
        first = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), None)
        return "tie" if first is not None and self._margins[number][first] < TIE else "mismatch"


def _compare(
    settings: EngineSettings,
    prompts: Sequence[Prompt],
    tokens: int,
    at_once: int,
    drafters: Sequence[Path],
    reference: Reference,
) -> dict[str, Any]:
    speculates = settings.draft_depth > 0
    engine = LocalEngine(settings, drafter=drafters[0] if speculates else None)
    kind = f"{'tree' if settings.tree_topk > 1 else 'chain'} of {settings.draft_depth}" if speculates else "plain"
    requests = [greedy(i, prompt, tokens) for i, prompt in enumerate(prompts)]
    verdicts: list[str] = []
    rounds = committed = 0
    with _Swapping(engine, drafters if speculates else ()) as swapping:
        produced = answers(engine, requests, at_once)
        for number, (answer, last) in enumerate(
            track(produced, description=f"{kind}, {at_once} at once", total=len(requests), console=console)
        ):
            verdicts.append(reference.verdict(number, answer))
            rounds, committed = rounds + last.rounds, committed + last.output_tokens - 1
    engine.close()
    return {
        "checked": len(verdicts),
        "mismatches": verdicts.count("mismatch"),
        "ties": verdicts.count("tie"),
        "swaps": swapping.done,
        "accept_length": round(committed / rounds, 3),
    }


class _Swapping:
    """Exchanges drafters in turn, about twice a second, while the block runs."""

    def __init__(self, engine: LocalEngine, drafters: Sequence[Path]) -> None:
        self._engine = engine
        self._orders = [swap_to(folder, folder.name) for folder in drafters]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        #: Swaps that met running requests.
        self.done = 0

    def __enter__(self) -> _Swapping:
        if self._orders:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._orders:
            self._thread.join()

    def _run(self) -> None:
        turn = 0
        while not self._stop.wait(0.5):
            turn += 1
            self._engine.swap(self._orders[turn % len(self._orders)])
            self.done += self._engine.status().running > 0


def _teach(settings: EngineSettings, prompts: Sequence[Prompt], tokens: int, folder: Path) -> list[Path]:
    """Snapshots of a drafter that learns from the target's answers to ``prompts``: from one that knows nothing up."""
    stream = MemoryStream()
    engine = LocalEngine(settings, sink=stream)
    requests = [greedy(i, prompt, tokens, traced=True) for i, prompt in enumerate(prompts)]
    for _ in track(answers(engine, requests), description="traces to learn from", total=len(requests), console=console):
        pass
    engine.close()
    snapshots = [fresh_drafter(settings, folder / "0")]
    config, manifest = checkpoint.verify(snapshots[0])
    target = read_target(find(settings.target))
    learner = Learner(
        Drafter.from_checkpoint(snapshots[0], target.embedding),
        TargetId(
            target=manifest.target, target_revision=manifest.target_revision, tokenizer_hash=manifest.tokenizer_hash
        ),
        Trainer(max_uses=_STEPS),
    )
    for offset, item in enumerate(stream.read(0, len(prompts), timeout=60)):
        if isinstance(item, Trace):
            learner.admit(Delivery(partition="0", offset=offset, item=item))
    for step in track(range(1, _STEPS + 1), description="learning", console=console):
        learner.step()
        if step % (_STEPS // _SNAPSHOTS) == 0:
            snapshots.append(folder / str(step))
            checkpoint.write(snapshots[-1], config, learner.candidate(), manifest)
    return snapshots
