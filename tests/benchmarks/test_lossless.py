"""The losslessness benchmark on a target made on the spot, and its verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from livedraft.benchmarks.load import answers, greedy
from livedraft.benchmarks.lossless import TIE, Reference, lossless
from livedraft.contracts.settings import Engine
from livedraft.serving.local.engine import LocalEngine

from tests.serving.local.models import make_target


def test_it_finds_the_engine_lossless_and_says_how_it_looked(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", "llama", vocab_size=4096)
    place = tmp_path / "report.json"
    lossless(place, str(target), threads=1, prompts=6, tokens=12)
    report = json.loads(place.read_text())
    assert report["checked"] == 6 * 6
    assert report["mismatches"] == 0
    assert set(report["modes"]) == {f"{m}, {n} at once" for m in ("no speculation", "chain", "tree") for n in (1, 8)}
    assert report["modes"]["no speculation, 8 at once"]["accept_length"] == 1.0


def test_a_difference_is_a_tie_only_where_the_reference_was_undecided() -> None:
    reference = Reference([[5, 6, 7]], [torch.tensor([1.0, TIE / 2, 1.0])])
    assert reference.verdict(0, [5, 6, 7]) == "same"
    assert reference.verdict(0, [5, 9, 9]) == "tie"
    assert reference.verdict(0, [5, 6, 9]) == "mismatch"
    assert reference.verdict(0, [9, 9, 7]) == "mismatch"
    assert reference.verdict(0, [5, 6]) == "mismatch"


def test_answers_come_in_the_order_asked_however_few_run_at_once(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", "llama")
    engine = LocalEngine(Engine(target=str(target), draft_depth=0, max_running=4))
    requests = [greedy(i, [1 + i, 2, 3], length=3 + i % 4) for i in range(10)]
    one_by_one = [tokens for tokens, _ in answers(engine, requests, at_once=1)]
    together = [tokens for tokens, _ in answers(engine, requests, at_once=3)]
    engine.close()
    assert one_by_one == together
    assert [len(tokens) for tokens in together] == [3 + i % 4 for i in range(10)]
