"""The benchmark of a frozen broker, for seconds instead of a minute: what it says of the traces, not of time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from livedraft.benchmarks.freeze import freeze


@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets of kafka-python
def test_a_frozen_broker_costs_no_request_and_no_trace(tmp_path: Path) -> None:
    place = tmp_path / "report.json"
    freeze(place, seconds=8, clients=2)
    report = json.loads(place.read_text())
    assert report["requests"] > 2
    assert report["spilled"] > 0, "the freeze was not felt"
    assert report["dropped"] == 0
    assert report["traces_lost"] == 0
    assert report["out_of_order"] == 0
    assert report["waiting_mb_when_frozen"] <= report["buffer_mb"]
    assert all(phase["between_tokens_ms"]["samples"] > 0 for phase in report["phases"].values())
