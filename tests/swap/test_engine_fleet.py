"""Several engines as one: they agree between two turns, whoever was away."""

from __future__ import annotations

from pathlib import Path

import pytest
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import EngineStatus, SwapReceipt, SwapRequest
from livedraft.swap.engine_fleet import EngineFleet
from msgspec.structs import replace

from . import drafts
from .fakes import FakeEngine


@pytest.fixture
def versions(tmp_path: Path) -> Path:
    for number in (1, 2, 3):
        drafts.write(tmp_path / str(number), number)
    return tmp_path


def request(versions: Path, version: str) -> SwapRequest:
    manifest = checkpoint.verify(versions / version)[1]
    return SwapRequest(path=str(versions / version), version=version, checksum=checkpoint.checksum(manifest.tensors))


def fleet_of(versions: Path, count: int) -> tuple[EngineFleet, list[FakeEngine]]:
    engines = [FakeEngine(versions / "1", "1") for _ in range(count)]
    return EngineFleet(engines, lambda version: versions / version), engines


def test_counters_are_summed_and_a_swap_reaches_everybody(versions: Path) -> None:
    fleet, engines = fleet_of(versions, 3)
    for engine, rounds in zip(engines, (10, 20, 30), strict=True):
        engine.serve(rounds, 2.0)
        engine.requests["1"] = rounds // 10
    assert fleet.status().by_drafter == {"1": (120, 60)}
    assert fleet.status().requests_by_drafter == {"1": 6}
    receipt = fleet.swap(request(versions, "2"))
    assert (receipt.version, receipt.previous) == ("2", "1")
    assert [engine.drafter for engine in engines] == ["2"] * 3
    assert fleet.status().drafter_checksum == request(versions, "2").checksum


@pytest.mark.parametrize("count", [2, 3])
def test_one_that_was_away_is_brought_into_line(versions: Path, count: int) -> None:
    fleet, engines = fleet_of(versions, count)
    fleet.status()
    engines[0].broken = True
    assert fleet.status().drafter == "1"
    fleet.swap(request(versions, "2"))
    engines[0].broken = False
    assert fleet.status().drafter == "2"
    assert {engine.drafter for engine in engines} == {"2"}


def test_one_that_started_again_with_another_drafter_does_not_decide(versions: Path) -> None:
    fleet, engines = fleet_of(versions, 2)
    fleet.swap(request(versions, "2"))
    engines[0].restart(versions / "1", "1")
    assert fleet.status().drafter == "2"
    assert engines[0].drafter == "2"


def test_a_swap_that_half_of_them_took_has_failed_and_is_taken_back(versions: Path) -> None:
    fleet, engines = fleet_of(versions, 2)
    fleet.status()
    engines[1].refuses.add("2")
    with pytest.raises(DrafterRejected, match="not for me"):
        fleet.swap(request(versions, "2"))
    assert fleet.status().drafter == "1"
    assert [engine.drafter for engine in engines] == ["1", "1"]


def test_most_of_them_decide_and_the_one_that_refuses_is_left_out(versions: Path) -> None:
    fleet, engines = fleet_of(versions, 3)
    engines[2].refuses.add("2")
    fleet.swap(request(versions, "2"))
    assert fleet.status().drafter == "2"
    engines[0].serve(5, 2.0)
    engines[2].serve(50, 9.0)
    assert fleet.status().by_drafter == {"2": (10, 5)}


def test_a_version_that_is_not_at_hand_waits(versions: Path) -> None:
    fleet, engines = fleet_of(versions, 3)
    engines[1].restart(versions / "2", "2")
    (versions / "1").rename(versions / "elsewhere")
    assert fleet.status().drafter == "1"
    assert engines[1].drafter == "2"


def test_only_when_nobody_answers_is_that_a_failure(versions: Path) -> None:
    fleet, engines = fleet_of(versions, 2)
    for engine in engines:
        engine.broken = True
    with pytest.raises(SwapFailed, match="does not answer"):
        fleet.status()


def test_engines_of_different_targets_are_no_fleet(versions: Path) -> None:
    class Stranger(FakeEngine):
        def status(self) -> EngineStatus:
            return replace(super().status(), target="other")

    fleet = EngineFleet([FakeEngine(versions / "1", "1"), Stranger(versions / "1", "1")], lambda version: versions)
    with pytest.raises(SwapFailed, match="different targets"):
        fleet.status()


def test_a_swap_rolls_from_one_engine_to_the_next(versions: Path) -> None:
    swapping: list[int] = []
    most: list[int] = []

    class Counting(FakeEngine):
        def swap(self, request: SwapRequest) -> SwapReceipt:
            swapping.append(1)
            most.append(len(swapping))
            try:
                return super().swap(request)
            finally:
                swapping.pop()

    engines = [Counting(versions / "1", "1") for _ in range(3)]
    EngineFleet(engines, lambda version: versions / version).swap(request(versions, "2"))
    assert most == [1, 1, 1]
    assert {engine.drafter for engine in engines} == {"2"}


def test_whoever_only_looks_changes_nothing(versions: Path) -> None:
    engines = [FakeEngine(versions / version, version) for version in ("1", "2", "2")]
    assert EngineFleet(engines).status().drafter == "2"
    assert [engine.drafter for engine in engines] == ["1", "2", "2"]
