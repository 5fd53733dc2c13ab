"""SGLang starts with what ``livedraft drafts init`` and ``import`` write, and answers as its target does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from livedraft.serving.local.place import find

from ..serving.local.models import make_target
from .drafters import livedraft
from .greedy import Greedy
from .server import Server, Speculation, serving

TEXT = "In the beginning God created the heaven and the earth.\n" * 30


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
    greedy = Greedy(target)
    drafter = init(tmp_path / "drafter", "--target", "bundled" if made is None else str(made))
    with serving(tmp_path, Speculation(drafter), target=target) as server:
        answers = server.generate_together(prompts, max_new_tokens=24)
        assert [answer["output_ids"] for answer in answers] == [greedy(prompt, 24) for prompt in prompts]
        assert all(answer["meta_info"]["spec_verify_ct"] > 0 for answer in answers)
        vocabulary = json.loads((drafter / "config.json").read_text())["draft_vocab_size"]
        assert vocabulary == 512


def test_an_imported_drafter_drafts_as_the_published_one(chain_server: Server, prompts: list[str]) -> None:
    answers = chain_server.generate_together(prompts, max_new_tokens=48)
    lengths = [answer["meta_info"]["spec_accept_length"] for answer in answers]
    assert sum(lengths) / len(lengths) > 1.5
