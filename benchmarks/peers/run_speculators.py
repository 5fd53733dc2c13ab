"""speculators' EAGLE-3 on our traces, run by the interpreter of its own environment (``benchmarks/peers/setup``).

Its command line cannot train without an accelerator: ``Trainer.setup_model`` moves the model to device 0 and takes
"cuda" for autocast when there is none (speculators 0.9.0, train/trainer.py, lines 228 and 348).  So this is its
``train_epoch`` around its own configuration, model, loss, collation and optimisers, all called as they are, with

    hidden_states_dtype float32, draft_attn_impl eager, loss_implementation eager    options of its own, for CPUs
    scheduler_type none                         a stream has no last step to decay towards
    batches of traces as they arrive            instead of 8192 tokens drawn from a finished data set

The job and what is written are those of ``benchmarks/learn_run.py``, which explains the budget.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from marks import write_mark
from safetensors.torch import save_file
from speculators.model import SpeculatorModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.cli import build_draft_model
from speculators.train.config.schema import TrainConfig
from speculators.train.data import CollateFn
from speculators.train.optimizers import build_optimizers
from speculators.train.trainer import TrainerConfig

#: Clipping in ``Trainer.train_epoch``, not a setting there.
_CLIP = 1.0


def main() -> None:
    """Learn, as the job in the file named on the command line says."""
    job = json.loads(Path(sys.argv[1]).read_bytes())
    recipe = {"batch_traces": 16, "max_uses": 20, "ttt_steps": 3} | job["settings"]
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    rng = random.Random(job["seed"])
    samples = torch.load(job["converted"], weights_only=True)
    for sample in samples:
        length = len(sample["input_ids"])
        sample["lengths"] = torch.tensor([length])
        sample["position_ids"] = torch.arange(length)
    trainer = _Trainer(job, recipe)
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    trainer.write(out / "0")
    trainer.mark(out, 0, 0)
    uses: dict[int, int] = {}
    tokens, ahead, window = 0, 0.0, job["window"]
    starts = range(0, len(samples), window)
    for number, start in enumerate(starts[: job["windows"] or None], 1):
        arrived = range(start, min(start + window, len(samples)))
        new = sum(int(samples[i]["loss_mask"].sum()) for i in arrived)
        tokens += new
        uses |= dict.fromkeys(arrived, 0)
        allowance = job["seconds_per_ktoken"] * new / 1000 + min(ahead, 0.0)
        began, wall = time.process_time(), time.perf_counter()
        while time.process_time() - began < allowance:
            batch = _batch(uses, recipe, rng)
            if not batch:
                break
            trainer.step([samples[i] for i in batch])
        spent = time.process_time() - began
        ahead = allowance - spent
        trainer.cpu_s += spent
        trainer.wall_s += time.perf_counter() - wall
        trainer.write(out / str(number))
        trainer.mark(out, arrived.stop, tokens)


def _batch(uses: dict[int, int], recipe: dict[str, Any], rng: random.Random) -> list[int]:
    """The traces used least so far, in random order: epochs over what has arrived."""
    usable = [i for i, used in uses.items() if used < recipe["max_uses"]]
    rng.shuffle(usable)
    usable.sort(key=uses.__getitem__)
    chosen = usable[: recipe["batch_traces"]]
    if len(chosen) < recipe["batch_traces"] and uses and max(uses.values()) > 0:
        return []
    for i in chosen:
        uses[i] += 1
    return chosen


class _Trainer:
    def __init__(self, job: dict[str, Any], recipe: dict[str, Any]) -> None:
        settings = TrainConfig(
            verifier={"verifier_name_or_path": job["verifier"]},
            speculator_type="eagle3",
            draft={"draft_attn_impl": "eager"},
            data={"hidden_states_dtype": "float32"},
            loss={"loss_implementation": "eager", "ttt_steps": recipe["ttt_steps"]},
            scheduler={"scheduler_type": "none"},
        )
        flat = settings.flatten()
        arguments = argparse.Namespace(**flat)
        model_class = SpeculatorModel.registry["eagle3"]
        vocabulary = json.loads((Path(job["verifier"]) / "config.json").read_bytes())["vocab_size"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = build_draft_model(arguments, model_class, None, None, vocabulary)
        self.model.train()
        self.call, _ = model_class.get_trainer_kwargs(**vars(arguments))
        fields = {name: flat[name] for name in TrainerConfig._fields if name in flat}
        config = TrainerConfig(num_epochs=flat["epochs"], **fields)
        self.optimizers = build_optimizers(self.model, config)
        self.flags = {
            name: bool(getattr(self.model.config, name))
            for name in ("norm_before_fc", "norm_output", "norm_before_residual")
        }
        self.steps = self.trained = 0
        self.cpu_s = self.wall_s = 0.0

    def step(self, samples: list[dict[str, torch.Tensor]]) -> None:
        length = sum(len(sample["input_ids"]) - 1 for sample in samples)
        hidden = samples[0]["verifier_last_hidden_states"].shape[1]
        collate = CollateFn(length, hidden, dtype=torch.float32, preprocess=shift_batch)
        batch = collate([dict(sample) for sample in samples])
        _, loss, _ = self.model(**batch, **self.call)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        self.trained += int(batch["loss_mask"].sum())

    def mark(self, out: Path, requests: int, tokens: int) -> None:
        """Write down how far it is."""
        write_mark(
            out,
            requests=requests,
            tokens=tokens,
            steps=self.steps,
            trained=self.trained,
            cpu_s=self.cpu_s,
            wall_s=self.wall_s,
        )

    def write(self, folder: Path) -> None:
        """Its weights under the names of an EAGLE-3 checkpoint, and the switches that change its arithmetic."""
        folder.mkdir(parents=True)
        tensors = {
            name.replace("layers.0.", "midlayer."): tensor.detach().float().contiguous()
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(("embed_tokens", "verifier_"))
        }
        save_file(tensors, folder / "model.safetensors")
        (folder / "peer.json").write_text(json.dumps(self.flags))


if __name__ == "__main__":
    main()
