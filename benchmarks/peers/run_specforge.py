"""SpecForge's EAGLE-3 on our traces, run by the interpreter of its own environment (``benchmarks/peers/setup``).

It cannot train on a CPU: its loss is a Triton kernel (specforge 0.2.0, core/loss.py, line 185).  Triton's interpreter,
switched on by its own variable TRITON_INTERPRET, executes that kernel's code row by row in Python: right, and slower by
orders of magnitude.  So what it learns from every token is measured here, and its speed is not: its processor time is
not limited, and says nothing.

Its model, training step (``Eagle3TrainStrategy``) and optimiser are called as they are, with its defaults (one trace
per step, unroll 7, AdamW 1e-4) except for

    float32                                     instead of bfloat16
    lr_scheduler constant                       an option of its own: a stream has no last step to decay towards
    the target's head handed over               its loader reads checkpoints in shards only

The job and what is written are those of ``benchmarks/learn_run.py``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
# Compiling its small functions takes longer than running them, and changes nothing.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from marks import write_mark
from safetensors import safe_open
from safetensors.torch import save_file
from specforge.algorithms.eagle3.data import normalize_offline_sample
from specforge.algorithms.eagle3.model import OnlineEagle3Model
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.modeling.target.target_head import TargetHead
from specforge.optimizer import BF16Optimizer
from specforge.training.strategies.base import Eagle3TrainStrategy, TrainBatch
from transformers import AutoConfig


def main() -> None:
    """Learn, as the job in the file named on the command line says."""
    job = json.loads(Path(sys.argv[1]).read_bytes())
    recipe = {"max_uses": 1} | job["settings"]
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    rng = random.Random(job["seed"])
    samples = torch.load(job["converted"], weights_only=True)
    trainer = _Trainer(job)
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    trainer.write(out / "0")
    trainer.mark(out, 0, 0)
    tokens, window = 0, job["window"]
    starts = range(0, len(samples), window)
    for number, start in enumerate(starts[: job["windows"] or None], 1):
        arrived = [*range(start, min(start + window, len(samples)))]
        tokens += sum(int(samples[i]["loss_mask"].sum()) for i in arrived)
        began, wall = time.process_time(), time.perf_counter()
        for _ in range(recipe["max_uses"]):
            rng.shuffle(arrived)
            for i in arrived:
                trainer.step(samples[i])
        trainer.cpu_s += time.process_time() - began
        trainer.wall_s += time.perf_counter() - wall
        trainer.write(out / str(number))
        trainer.mark(out, start + len(arrived), tokens)


class _Trainer:
    def __init__(self, job: dict[str, Any]) -> None:
        target = AutoConfig.from_pretrained(job["verifier"])
        config = AutoConfig.from_pretrained(job["verifier"], num_hidden_layers=1, tie_word_embeddings=False)
        config.draft_vocab_size = target.vocab_size
        draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa")
        draft.load_embedding(job["verifier"])
        draft.freeze_embedding()
        with safe_open(Path(job["verifier"]) / "model.safetensors", framework="pt") as tensors:
            tied = "lm_head.weight" not in list(tensors.keys())
            weight = tensors.get_tensor("model.embed_tokens.weight" if tied else "lm_head.weight").float()
            self.gain = tensors.get_tensor("model.norm.weight").float()
        self.eps = target.rms_norm_eps
        head = TargetHead(job["verifier"])
        with torch.no_grad():
            head.fc.weight.copy_(weight)
        head.freeze_weights()
        self.draft = draft.float()
        self.strategy = Eagle3TrainStrategy(OnlineEagle3Model(self.draft, attention_backend="sdpa"), target_head=head)
        self.optimizer = BF16Optimizer(self.draft, lr=1e-4, lr_scheduler="constant", warmup_ratio=0.0)
        self.steps = self.trained = 0
        self.cpu_s = self.wall_s = 0.0

    def step(self, sample: dict[str, torch.Tensor]) -> None:
        # Its data holds the target's last hidden state after the final norm.
        raw = {
            "input_ids": sample["input_ids"],
            "loss_mask": sample["loss_mask"].long(),
            "aux_hidden_state": sample["hidden_states"].float(),
            "hidden_state": torch.nn.functional.rms_norm(
                sample["verifier_last_hidden_states"].float(), self.gain.shape, self.gain, self.eps
            ),
        }
        tensors = normalize_offline_sample(raw, max_len=4096)
        batch = TrainBatch(["0"], "eagle3", tensors, {"target_repr": "hidden_state"})
        self.strategy.forward_loss(batch).loss.backward()
        self.optimizer.step()
        self.steps += 1
        self.trained += int(tensors["loss_mask"].sum())

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
        """Its weights under the names of an EAGLE-3 checkpoint; its drafter is ours without a switch."""
        folder.mkdir(parents=True)
        tensors = {
            name: tensor.detach().float().contiguous()
            for name, tensor in self.draft.state_dict().items()
            if name not in ("embed_tokens.weight", "d2t", "t2d")
        }
        save_file(tensors, folder / "model.safetensors")
        switches = dict.fromkeys(("norm_before_fc", "norm_output", "norm_before_residual"), False)
        (folder / "peer.json").write_text(json.dumps(switches))


if __name__ == "__main__":
    main()
