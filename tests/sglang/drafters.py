"""Drafters for the bundled target: one that knows nothing, and one that has learned a few answers."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from livedraft.cli.wiring import write_fresh_drafter
from livedraft.contracts import checkpoint
from livedraft.contracts.messages import Delivery, Delta, Generation, Manifest, Sampling, Trace
from livedraft.contracts.settings import Engine, Trainer
from livedraft.serving.local.engine import LocalEngine
from livedraft.serving.local.place import find
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import read_target
from safetensors.numpy import load_file, save_file

_ENGINE = Engine(draft_intermediate=256)
_TRAINER = Trainer(max_uses=1 << 20, unroll=3)


class _Kept:
    """A trace sink that keeps everything."""

    dropped = 0

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def offer(self, trace: Trace) -> bool:
        self.traces.append(trace)
        return True

    def close(self, timeout: float = 5.0) -> None:
        pass


def write_fresh(folder: Path, *, seed: int = 0) -> None:
    """Write a drafter that knows nothing of the target but its head."""
    write_fresh_drafter(_ENGINE, folder, seed)


def write_trained(folder: Path, fresh: Path, prompts: Sequence[str], *, steps: int = 60, tokens: int = 48) -> None:
    """Write ``fresh`` as it is after learning the target's greedy answers to ``prompts``."""
    traces = _answers(fresh, prompts, tokens)
    drafter = Drafter.from_checkpoint(fresh, read_target(find("bundled")).embedding)
    target = TargetId(
        target=traces[0].target, target_revision=traces[0].target_revision, tokenizer_hash=traces[0].tokenizer_hash
    )
    learner = Learner(drafter, target, _TRAINER)
    for offset, trace in enumerate(traces):
        assert learner.admit(Delivery(partition="0", offset=offset, item=trace)) == "admitted"
    for _ in range(steps):
        learner.step()
    about = Manifest(
        tensors={},
        target=target.target,
        target_revision=target.target_revision,
        tokenizer_hash=target.tokenizer_hash,
        steps=learner.steps,
        tokens_trained=learner.tokens,
    )
    checkpoint.write(folder, drafter.config, learner.candidate(), about)


def write_imported(folder: Path, drafter: Path, published: Path) -> None:
    """Write ``drafter`` as EAGLE-3 drafters are published, and what ``livedraft drafts import`` makes of that."""
    published.mkdir()
    tensors = load_file(drafter / "model.safetensors")
    del tensors["t2d"]
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    save_file(renamed, published / "model.safetensors")
    (published / "config.json").write_bytes((drafter / "config.json").read_bytes())
    livedraft("drafts", "import", str(published), "--out", str(folder))


def livedraft(*arguments: str) -> None:
    """Run the command line; AssertionError with what it said when it fails."""
    command = [sys.executable, "-m", "livedraft.cli.main", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr


def _answers(drafter: Path, prompts: Sequence[str], tokens: int) -> list[Trace]:
    sink, ended = _Kept(), queue.Queue[str]()

    def emit(delta: Delta) -> None:
        if delta.finish_reason:
            ended.put(delta.finish_reason)

    threads = torch.get_num_threads()
    engine = LocalEngine(_ENGINE, drafter=drafter, sink=sink)
    try:
        for number, prompt in enumerate(prompts):
            engine.submit(
                Generation(
                    request_id=f"lesson-{number}",
                    prompt=tuple(engine.encode(prompt)),
                    sampling=Sampling(temperature=0.0),
                    max_tokens=tokens,
                    ignore_eos=True,
                ),
                emit,
            )
        assert {ended.get(timeout=120) for _ in prompts} == {"length"}
    finally:
        engine.close()
        torch.set_num_threads(threads)
    return sink.traces
