"""A real SGLang of two ranks: both take a drafter at the same batch, or neither does."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from livedraft.cli.wiring import write_fresh_drafter
from livedraft.contracts.errors import DrafterRejected
from livedraft.contracts.messages import SwapRequest
from livedraft.contracts.settings import Engine as EngineSettings
from transformers import LlamaConfig, LlamaForCausalLM

from .plugged import engine
from .server import TARGET, Speculation
from .test_swap import asked_for


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target's tokenizer with random weights whose heads can be shared out."""
    folder = tmp_path_factory.mktemp("targets") / "target"
    shutil.copytree(TARGET, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "__pycache__"))
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, 0, 0.08)
    model.save_pretrained(folder)
    return folder


def test_two_ranks_swap_in_the_middle_of_an_answer(target: Path, tmp_path: Path) -> None:
    for version, seed in (("a", 0), ("b", 5)):
        write_fresh_drafter(EngineSettings(target=str(target), draft_intermediate=128), tmp_path / version, seed)
    cores = sorted(os.sched_getaffinity(0))
    with engine(
        tmp_path,
        Speculation(tmp_path / "a"),
        target=target,
        arguments=["--tp-size=2"],
        SGLANG_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}",
    ) as one:
        assert one.started().drafter == "a"
        undisturbed = one.server.generate("In the beginning", max_new_tokens=150)["output_ids"]
        answers: list[dict[str, Any]] = []
        asking = threading.Thread(
            target=lambda: answers.append(one.server.generate("In the beginning", max_new_tokens=150))
        )
        asking.start()
        receipts = [one.admin.swap(asked_for(tmp_path / version)) for version in ("b", "a", "b")]
        asking.join()
        assert [receipt.version for receipt in receipts] == ["b", "a", "b"]
        assert answers[0]["output_ids"] == undisturbed
        with pytest.raises(DrafterRejected, match="No such file"):
            one.admin.swap(SwapRequest(path="/nowhere", version="x", checksum="0"))
        assert one.admin.status().drafter_checksum == asked_for(tmp_path / "b").checksum
        assert one.server.generate("In the beginning", max_new_tokens=150)["output_ids"] == undisturbed
