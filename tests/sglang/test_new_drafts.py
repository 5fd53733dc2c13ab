"""SGLang starts with what ``livedraft drafts init`` and ``import`` write, and answers as without a drafter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from livedraft.serving.local.place import find
from safetensors.numpy import load_file, save_file

from ..serving.local.models import make_target
from .server import Speculation, serving

TEXT = "In the beginning God created the heaven and the earth.\n" * 30


def livedraft(*arguments: str) -> None:
    command = [sys.executable, "-m", "livedraft.cli.main", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr


def init(folder: Path, *arguments: str) -> Path:
    text = folder.with_suffix(".txt")
    text.write_text(TEXT)
    livedraft("drafts", "init", "--out", str(folder), "--draft-vocab=512", f"--text={text}", *arguments)
    return folder


@pytest.mark.parametrize("family", ["bundled", "qwen3"])
def test_sglang_starts_with_a_fresh_drafter(tmp_path: Path, family: str) -> None:
    made = None if family == "bundled" else make_target(tmp_path / family, family, vocab_size=4096, layers=8)
    target = made or find("bundled")
    prompts = [[700 + 31 * i + j for j in range(6)] for i in range(4)]
    with serving(tmp_path, target=target) as plain:
        expected = [answer["output_ids"] for answer in plain.generate_together(prompts, max_new_tokens=24)]
    drafter = init(tmp_path / "drafter", "--target", "bundled" if made is None else str(made))
    with serving(tmp_path, Speculation(drafter), target=target) as server:
        answers = server.generate_together(prompts, max_new_tokens=24)
        assert [answer["output_ids"] for answer in answers] == expected
        assert all(answer["meta_info"]["spec_verify_ct"] > 0 for answer in answers)
        vocabulary = json.loads((drafter / "config.json").read_text())["draft_vocab_size"]
        assert vocabulary == 512


def test_an_imported_drafter_drafts_as_the_published_one(
    tmp_path: Path, trained_drafter: Path, prompts: list[str]
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    tensors = load_file(trained_drafter / "model.safetensors")
    del tensors["t2d"]
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    save_file(renamed, published / "model.safetensors")
    (published / "config.json").write_bytes((trained_drafter / "config.json").read_bytes())
    livedraft("drafts", "import", str(published), "--out", str(tmp_path / "ours"))
    with serving(tmp_path, Speculation(tmp_path / "ours")) as server:
        lengths = [
            answer["meta_info"]["spec_accept_length"] for answer in server.generate_together(prompts, max_new_tokens=48)
        ]
    assert sum(lengths) / len(lengths) > 1.5
