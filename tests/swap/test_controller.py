"""The swap controller against fakes: what it promotes, refuses, rolls back, and survives."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from livedraft.contracts import checkpoint, settings
from livedraft.contracts.errors import NotFound, RegistryUnavailable, SwapFailed
from livedraft.contracts.messages import Decision, Offsets
from livedraft.swap import by_hand
from livedraft.swap.controller import LOOK_S, REFRESHED, Controller
from livedraft.swap.evidence import Evidence
from livedraft.swap.gate import GateRules
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.swap.swapper import Swapper
from livedraft.traces.memory import MemoryStream
from msgspec.structs import replace

from . import drafts
from .fakes import FakeEngine, FakeReplay, trace


class Switchable:
    """A neighbour that can be made unreachable."""

    def __init__(self, behind: Any) -> None:
        self.behind = behind
        self.down = False
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if self.down:
            raise RegistryUnavailable("the registry does not answer")
        self.asked.append(name)
        return getattr(self.behind, name)


class World:
    """Everything around a controller, which may be started anew at any time."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.memory = MemoryRegistry(tmp_path / "registry")
        self.registry: Any = Switchable(self.memory)
        self.stream = MemoryStream()
        self.replay = FakeReplay({"1": 2.0})
        self.now = 1000.0
        self.settings = settings.Swap(
            gate_traces=16,
            gate_min_traces=4,
            gate_max_error=1.0,
            watch_rounds=100,
            watch_longer=1.0,
            watch_timeout_s=60.0,
        )
        self.stop = threading.Event()
        self.traces = 0
        drafts.write(tmp_path / "day0", 0)
        self.publish(0, 2.0)
        self.engine = FakeEngine(tmp_path / "day0", "1")
        self.start()

    def start(self) -> None:
        self.swapper = Swapper(self.registry, self.engine, self.tmp_path / "swap", clock=lambda: self.now)
        evidence = Evidence(self.stream.source("gate"), lambda r: r.startswith("held"), self.settings.gate_traces)
        self.controller = Controller(
            self.swapper, evidence, self.replay, self.settings, GateRules(min_traces=4, bootstrap=50)
        )

    def publish(self, seed: int, accept_length: float, offsets: Offsets | None = None) -> str:
        folder = self.tmp_path / f"draft{seed}"
        manifest = drafts.write(folder, seed, replace(drafts.MANIFEST, parent="1", offsets=offsets or {}))
        version = self.memory.publish(folder, manifest, {}).version
        self.memory.point("candidate", version)
        self.replay.accept_length[version] = accept_length
        return version

    def refresh(self, seed: int, accept_length: float, vocabulary: Literal["kept", "refreshed"] = "refreshed") -> str:
        """A candidate that can propose other tokens than day 0's."""
        folder = self.tmp_path / f"refreshed{seed}"
        tensors = drafts.tensors(seed)
        tensors |= {"d2t": np.zeros(10, "<i8"), "t2d": np.arange(16) < 10}
        about = replace(drafts.MANIFEST, parent="1", vocabulary=vocabulary)
        manifest = checkpoint.write(folder, drafts.CONFIG, tensors, about)
        version = self.memory.publish(folder, manifest, {}).version
        self.memory.point(REFRESHED if vocabulary == "refreshed" else "candidate", version)
        self.replay.accept_length[version] = accept_length
        self.now += LOOK_S
        return version

    def traffic(self, count: int = 8, **fields: Any) -> None:
        for _ in range(count):
            self.traces += 1
            fields.setdefault("finished_at", self.now - 10)
            self.stream.offer(trace(self.traces, **{"request_id": f"held{self.traces}", **fields}))

    def tick(self) -> Decision | None:
        self.now += 1.0
        return self.controller.tick(self.stop)

    def alias(self, name: str) -> str | None:
        version = self.memory.resolve(name)
        return version.version if version else None


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_at_first_the_engines_drafter_becomes_live(world: World) -> None:
    assert world.tick() is None
    assert world.alias("live") == "1"
    assert world.alias("previous") is None


def test_a_better_candidate_is_swapped_in_and_kept(world: World) -> None:
    world.traffic()
    world.tick()
    version = world.publish(1, 3.0)
    promoted = world.tick()
    assert promoted is not None
    assert (promoted.action, promoted.candidate, promoted.live) == ("promote", version, "1")
    assert world.engine.drafter == version
    assert (world.alias("live"), world.alias("previous")) == (version, "1")

    world.engine.serve(99, 3.0)
    assert world.tick() is None
    world.engine.serve(1, 3.0)
    kept = world.tick()
    assert kept is not None
    assert kept.action == "keep"
    assert kept.evidence["relative_error"] == pytest.approx(0.0, abs=0.01)
    assert [d.action for d in world.memory.decisions()] == ["promote", "keep"]
    assert world.memory.get(version).metrics["promote/predicted_accept_length"] == pytest.approx(3.0)
    assert world.memory.get(version).metrics["keep/observed_accept_length"] == pytest.approx(3.0)


def watched_on(world: World) -> str:
    """A promoted version that has shown enough to be kept, and may be watched for three times as long."""
    world.settings = replace(world.settings, watch_longer=3.0)
    world.start()
    world.traffic()
    world.tick()
    version = world.publish(1, 3.0)
    world.tick()
    world.engine.serve(100, 3.0)
    assert world.tick() is None
    return version


def test_what_could_be_kept_is_watched_until_a_better_candidate_comes(world: World) -> None:
    first = watched_on(world)
    world.engine.serve(20, 3.0)
    worse = world.publish(2, 2.5)
    decision = world.tick()
    assert decision is not None
    assert (decision.action, decision.candidate) == ("reject", worse)
    world.engine.serve(30, 3.0)
    better = world.publish(3, 3.5)
    world.tick()
    assert world.engine.drafter == better
    decisions = world.memory.decisions()
    assert [(d.action, d.candidate) for d in decisions] == [
        ("promote", first),
        ("reject", worse),
        ("keep", first),
        ("promote", better),
    ]
    assert decisions[2].evidence["rounds"] == 150


def test_without_one_it_is_kept_after_so_much_longer(world: World) -> None:
    watched_on(world)
    world.engine.serve(199, 3.0)
    assert world.tick() is None
    world.engine.serve(1, 3.0)
    decision = world.tick()
    assert decision is not None
    assert (decision.action, decision.evidence["rounds"]) == ("keep", 300)


def test_what_fails_while_it_is_watched_on_is_rolled_back(world: World) -> None:
    first = watched_on(world)
    world.engine.serve(180, 1.0)
    decision = world.tick()
    assert decision is not None
    assert (decision.action, decision.candidate) == ("rollback", first)
    assert world.engine.drafter == "1"


def test_a_worse_candidate_is_rejected_once_and_never_swapped(world: World) -> None:
    world.traffic()
    world.tick()
    version = world.publish(1, 1.8)
    decision = world.tick()
    assert decision is not None
    assert (decision.action, decision.candidate) == ("reject", version)
    assert world.tick() is None
    world.start()
    assert world.tick() is None
    assert world.engine.history == ["1"]
    assert world.alias("live") == "1"
    assert [d.action for d in world.memory.decisions()] == ["reject"]


def test_without_enough_traces_the_candidate_waits_unscored(world: World) -> None:
    world.traffic(3)
    world.publish(1, 3.0)
    assert world.tick() is None
    assert world.replay.asked == []
    world.traffic(1)
    decision = world.tick()
    assert decision is not None
    assert decision.action == "promote"


def test_an_idle_turn_asks_the_registry_one_thing(world: World) -> None:
    world.publish(1, 3.0)  # waits for traces
    world.tick()
    world.registry.asked.clear()
    world.tick()
    assert world.registry.asked == ["resolve"]


def test_a_broken_promise_is_rolled_back_from_disk_while_the_registry_is_down(world: World) -> None:
    world.traffic()
    world.tick()
    world.engine.serve(200, 2.0)
    world.tick()
    version = world.publish(1, 3.0)
    world.tick()
    assert world.engine.drafter == version

    world.registry.down = True
    world.engine.serve(100, 1.2)
    with pytest.raises(RegistryUnavailable):
        world.tick()
    assert world.engine.drafter == "1"
    assert world.alias("live") == version  # nobody could move it yet

    world.registry.down = False
    world.start()
    world.tick()
    assert world.alias("live") == "1"
    decisions = world.memory.decisions()
    assert [d.action for d in decisions] == ["promote", "rollback"]
    assert decisions[1].evidence["observed_accept_length"] == pytest.approx(1.2)
    assert decisions[1].evidence["previous_accept_length"] == pytest.approx(2.0)
    assert world.tick() is None  # what was rolled back is not judged again
    assert world.engine.drafter == "1"


def damage_hash(folder: Path) -> None:
    path = folder / "model.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)


def damage_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def other_weights(folder: Path) -> None:
    for name in ("model.safetensors", "manifest.json"):
        (folder / name).write_bytes((folder.parents[1] / "draft0" / name).read_bytes())


@pytest.mark.parametrize(
    ("damage", "named"),
    [(damage_hash, "sha256 differs"), (damage_file, "model.safetensors"), (other_weights, "not the tensors")],
)
def test_a_corrupt_candidate_is_refused_by_name(world: World, damage: Any, named: str) -> None:
    world.traffic()
    world.tick()
    version = world.publish(1, 3.0)
    damage(world.memory.folder / version)
    decision = world.tick()
    assert decision is not None
    assert (decision.action, decision.candidate) == ("reject", version)
    assert named in decision.reason
    assert world.engine.history == ["1"]


def test_a_candidate_for_another_target_is_refused_by_name(world: World, tmp_path: Path) -> None:
    world.traffic()
    manifest = drafts.write(tmp_path / "other", 5, replace(drafts.MANIFEST, target="big"))
    world.memory.point("candidate", world.memory.publish(tmp_path / "other", manifest, {}).version)
    decision = world.tick()
    assert decision is not None
    assert decision.action == "reject"
    assert "'big'" in decision.reason


def test_a_candidate_that_the_engine_refuses_is_rejected(world: World) -> None:
    world.traffic()
    world.tick()
    version = world.publish(1, 3.0)
    world.engine.refuses.add(version)
    decision = world.tick()
    assert decision is not None
    assert decision.action == "reject"
    assert "not for me" in decision.reason
    assert world.alias("live") == "1"
    assert world.tick() is None


def test_an_engine_that_does_not_confirm_keeps_its_drafter_and_the_candidate_falls(world: World) -> None:
    world.traffic()
    world.tick()
    version = world.publish(1, 3.0)
    swap, world.engine.swap = world.engine.swap, lambda request: _fail("timed out")  # type: ignore[method-assign]
    with pytest.raises(SwapFailed):
        world.tick()
    world.engine.swap = swap  # type: ignore[method-assign]
    assert world.tick() is None
    assert world.engine.history == ["1"]
    assert world.alias("live") == "1"
    assert [(d.action, d.candidate) for d in world.memory.decisions()] == [("reject", version)]


def _fail(reason: str) -> Any:
    raise SwapFailed(reason)


def test_a_swap_that_was_applied_but_not_answered_is_found_applied(world: World) -> None:
    world.traffic()
    world.tick()
    version = world.publish(1, 3.0)
    swap = world.engine.swap
    world.engine.swap = lambda request: (swap(request), _fail("timed out"))[0]  # type: ignore[method-assign]
    with pytest.raises(SwapFailed):
        world.tick()
    world.tick()
    assert (world.engine.drafter, world.alias("live"), world.alias("previous")) == (version, version, "1")
    assert [d.action for d in world.memory.decisions()] == ["promote"]


def test_decisions_made_while_the_registry_was_down_arrive_in_order(world: World) -> None:
    journal = world.swapper.journal
    world.registry.down = True
    made = [Decision(action="reject", reason=f"{n}", candidate="1", at=float(n)) for n in range(5)]
    for decision in made:
        journal.append(decision)
    with pytest.raises(RegistryUnavailable):
        world.tick()
    world.registry.down = False
    world.tick()
    assert world.memory.decisions() == made
    assert journal.undelivered() == []


def test_an_engine_restarted_with_an_older_drafter_is_the_truth(world: World, tmp_path: Path) -> None:
    world.traffic()
    world.tick()
    version = world.publish(1, 3.0)
    world.tick()
    world.engine.restart(tmp_path / "day0", "1")
    decision = world.tick()
    assert decision is not None
    assert (decision.action, decision.candidate) == ("rollback", version)
    assert "by itself" in decision.reason
    assert world.alias("live") == "1"


def test_an_engine_with_unregistered_weights_is_given_the_live_version(world: World, tmp_path: Path) -> None:
    world.tick()
    drafts.write(tmp_path / "stranger", 9)
    world.engine.restart(tmp_path / "stranger", "day0")
    world.start()
    world.tick()
    assert world.engine.drafter == "1"
    world.tick()
    assert world.alias("live") == "1"


def test_without_any_registered_drafter_it_waits(tmp_path: Path) -> None:
    world = World(tmp_path)
    drafts.write(tmp_path / "stranger", 9)
    world.engine.restart(tmp_path / "stranger", "day0")
    world.traffic()
    assert world.tick() is None
    assert world.alias("live") is None
    assert world.engine.history == ["1"]


def test_folders_nobody_may_want_back_are_deleted(world: World) -> None:
    world.traffic()
    world.tick()
    for seed in (1, 2, 3):
        world.publish(seed, 1.0)
        world.tick()
    world.publish(4, 3.0)
    world.tick()
    world.engine.serve(100, 3.0)
    world.tick()
    assert {p.name for p in (world.tmp_path / "swap" / "versions").iterdir()} == {"1", "5"}


# By hand.


def test_promotion_by_hand_needs_no_gate_and_is_not_watched(world: World) -> None:
    version = world.publish(1, 1.0)
    decision = by_hand.promote(world.swapper, version)
    assert (decision.action, decision.candidate, decision.live) == ("promote", version, "1")
    assert (world.alias("live"), world.alias("previous")) == (version, "1")
    world.engine.serve(500, 1.0)
    assert world.tick() is None
    assert world.engine.drafter == version
    assert world.memory.decisions() == [decision]


def test_rollback_by_hand_returns_to_the_previous_version_step_by_step(world: World) -> None:
    second, third = world.publish(1, 1.0), world.publish(2, 1.0)
    by_hand.promote(world.swapper, second)
    by_hand.promote(world.swapper, third)
    assert by_hand.rollback(world.swapper).live == second
    assert (world.alias("live"), world.alias("previous")) == (second, "1")
    assert by_hand.rollback(world.swapper).live == "1"
    with pytest.raises(SwapFailed, match="no previous version"):
        by_hand.rollback(world.swapper)
    assert world.engine.history == ["1", second, third, second, "1"]


def test_by_hand_what_cannot_be_is_refused_by_name(world: World) -> None:
    with pytest.raises(NotFound):
        by_hand.promote(world.swapper, "77")
    with pytest.raises(SwapFailed, match="live already"):
        by_hand.promote(world.swapper, "1")
    with pytest.raises(SwapFailed, match="no previous version"):
        by_hand.rollback(world.swapper)
    assert world.engine.history == ["1"]


# The loop.


def test_the_loop_outlives_its_neighbours_and_stops_when_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.settings = replace(world.settings, poll_s=0.01)
    world.start()
    world.engine.broken = True
    loop = threading.Thread(target=world.controller.run, args=(world.stop,))
    loop.start()
    try:
        for _ in range(200):
            if caplog.records:
                break
            world.stop.wait(0.01)
        world.engine.broken = False
        for _ in range(500):
            if world.alias("live"):
                break
            world.stop.wait(0.01)
    finally:
        world.stop.set()
        loop.join(10)
    assert not loop.is_alive()
    assert world.alias("live") == "1"
    assert [r.getMessage() for r in caplog.records] == ["SwapFailed: the engine does not answer"]


def test_another_vocabulary_is_judged_beside_the_trainers_candidates(world: World) -> None:
    world.traffic()
    world.tick()
    refreshed = world.refresh(1, 3.0)
    for seed in (2, 3):  # the trainer, which goes on meanwhile
        world.publish(seed, 2.5)
    promoted = world.tick()
    assert promoted is not None
    assert (promoted.action, promoted.candidate) == ("promote", refreshed)
    assert world.alias("live") == refreshed
    world.engine.serve(100, 3.0)
    kept = world.tick()
    assert kept is not None
    assert kept.action == "keep"
    # What the trainer learned of the old lineage would take the vocabulary back.
    overtaken = world.tick()
    assert overtaken is not None
    assert (overtaken.action, overtaken.candidate) == ("reject", world.alias("candidate"))
    assert "lineage" in overtaken.reason
    assert world.tick() is None


def test_while_another_vocabulary_waits_for_evidence_others_do_not(world: World) -> None:
    world.settings = replace(world.settings, gate_traces=64)
    world.start()
    world.traffic(16)
    world.tick()
    world.controller._rules = replace(world.controller._rules, max_error=0.01, enough_traces=64)
    refreshed = world.refresh(1, 3.0)
    world.replay.scatter[refreshed] = 0.9
    version = world.publish(2, 2.5)
    promoted = world.tick()
    assert promoted is not None
    assert (promoted.action, promoted.candidate) == ("promote", version)
    assert refreshed in {name for name, _ in world.replay.asked}


def test_only_a_refreshed_vocabulary_may_be_another_one(world: World) -> None:
    world.traffic()
    world.tick()
    version = world.refresh(1, 3.0, "kept")
    rejected = world.tick()
    assert rejected is not None
    assert (rejected.action, rejected.candidate) == ("reject", version)
    assert "refresh-vocabulary" in rejected.reason
    assert world.engine.history == ["1"]


def test_an_engine_that_cannot_take_it_is_told_of_with_what_would_be_gained(world: World) -> None:
    """As SGLang, which keeps the token map that it started with."""
    world.traffic()
    world.tick()
    version = world.refresh(1, 3.0)
    world.engine.refuses.add(version)
    rejected = world.tick()
    assert rejected is not None
    assert (rejected.action, rejected.candidate) == ("reject", version)
    assert "better" in rejected.reason
    assert "not for me" in rejected.reason
    assert rejected.evidence["ratio"] > 1
    assert world.tick() is None
    # Started again from its folder, it drafts with it, and the registry follows.
    world.engine.restart(world.tmp_path / "refreshed1", "someone's")
    world.tick()
    assert world.alias("live") == version
    with pytest.raises(SwapFailed, match="live already"):
        by_hand.promote(world.swapper, version)


def test_what_an_engine_was_started_with_instead_of_what_was_decided_can_be_written_down(world: World) -> None:
    world.tick()
    decided = world.publish(2, 2.5)
    by_hand.promote(world.swapper, decided)
    version = world.refresh(1, 3.0)
    world.engine.restart(world.tmp_path / "refreshed1", "someone's")
    world.tick()
    assert (world.alias("live"), world.swapper.journal.served) == (version, decided)
    written = by_hand.promote(world.swapper, version)
    assert (written.action, written.candidate) == ("promote", version)
    assert (world.alias("live"), world.swapper.journal.served) == (version, version)
    assert world.engine.history == ["1", decided]
