"""Killed after every single effect on the world, the controller still comes to the same end.

Whatever is read in between leaves no mark, so being killed before an effect is being killed after the one before.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from livedraft.contracts import settings
from livedraft.swap.controller import Controller
from livedraft.swap.evidence import Evidence
from livedraft.swap.gate import GateRules
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.swap.swapper import Swapper
from livedraft.traces.memory import MemoryStream

from . import drafts
from .fakes import FakeEngine, FakeReplay, trace


class Killed(BaseException):
    """The process is gone."""


EFFECTS = {"point", "record", "decide", "fetch", "swap", "append", "begin", "end", "mark_delivered", "tidy", "commit"}


class Fate:
    """Kills right after the n-th effect."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.effects = 0
        self.last = ""


class Mortal:
    """A neighbour whose every effect is a place to be killed at."""

    def __init__(self, behind: Any, fate: Fate) -> None:
        self._behind = behind
        self._fate = fate

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._behind, name)
        if name not in EFFECTS:
            return found

        def effect(*arguments: Any, **named: Any) -> Any:
            result = found(*arguments, **named)
            self._fate.effects += 1
            if self._fate.effects == self._fate.at:
                self._fate.last = name
                raise Killed
            return result

        return effect


class Witness(MemoryRegistry):
    """Sees that ``live`` is only ever pointed at what the engine drafts with."""

    engine: FakeEngine

    def point(self, alias: str, version: str) -> None:
        super().point(alias, version)
        if alias == "live":
            assert self.get(version).checksum == self.engine.checksum


class World:
    """Version 2 is better, 3 only in replay, 4 is corrupt, 5 is worse."""

    predicted = {"1": 2.0, "2": 3.0, "3": 4.0, "5": 1.5}
    served = {"1": 2.0, "2": 3.0, "3": 1.0}

    def __init__(self, folder: Path, fate: Fate) -> None:
        self.folder = folder
        self.fate = fate
        self.now = 1000.0
        self.registry = Witness(folder / "registry")
        self.stream = MemoryStream()
        self._publish("1")
        self.engine = self.registry.engine = FakeEngine(folder / "1", "1")
        for n in range(8):
            self.stream.offer(trace(n, finished_at=self.now))
        self.start()

    def _publish(self, version: str) -> None:
        manifest = drafts.write(self.folder / version, int(version))
        assert self.registry.publish(self.folder / version, manifest, {}).version == version

    def start(self) -> None:
        """A new process; it may die while it starts, but only once."""
        try:
            self._start()
        except Killed:
            self._start()

    def _start(self) -> None:
        mortal = [Mortal(x, self.fate) for x in (self.registry, self.engine, FakeReplay(self.predicted))]
        registry, engine, replay = (m for m in mortal)
        swapper = Swapper(registry, engine, self.folder / "swap", clock=lambda: self.now)
        swapper.journal = Mortal(swapper.journal, self.fate)  # type: ignore[assignment]
        source: Any = Mortal(self.stream.source("gate"), self.fate)
        rules = settings.Swap(gate_traces=8, gate_min_traces=4, gate_max_error=1.0, watch_rounds=100, watch_longer=1.0)
        self.controller = Controller(
            swapper,
            Evidence(source, lambda _: True, 8),
            replay,
            rules,
            GateRules(min_traces=4, bootstrap=20),
        )

    def turns(self) -> None:
        """Turns with traffic between them, and a new process after each death."""
        for _ in range(5):
            self.now += 1.0
            try:
                self.controller.tick(threading.Event())
            except Killed:
                self.start()
            self.engine.serve(60, self.served[self.engine.drafter])

    def live_through(self) -> None:
        self.turns()
        for version in ("2", "3", "4", "5"):
            self._publish(version)
            if version == "4":
                (self.registry.folder / "4" / "model.safetensors").write_bytes(b"torn")
            self.registry.point("candidate", version)
            self.turns()


@pytest.fixture(scope="module")
def effects(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many there are in a life without a death."""
    fate = Fate()
    World(tmp_path_factory.mktemp("calm"), fate).live_through()
    return fate.effects


@pytest.mark.parametrize("part", range(4))
def test_a_death_after_any_effect_changes_nothing_in_the_end(tmp_path: Path, effects: int, part: int) -> None:
    assert effects > 40
    for at in range(1 + part, effects + 1, 4):
        fate = Fate(at)
        world = World(tmp_path / str(at), fate)
        world.live_through()
        where = f"killed after effect {at}, {fate.last}"
        assert fate.last, where
        assert world.engine.drafter == "2", where
        live, previous = world.registry.resolve("live"), world.registry.resolve("previous")
        assert live is not None, where
        assert (live.version, live.checksum) == ("2", world.engine.checksum), where
        assert previous is not None, where
        assert previous.version == "1", where
        assert not {"4", "5"} & set(world.engine.history), where
        history = [(d.action, d.candidate) for d in world.registry.decisions()]
        assert history == [
            ("promote", "2"),
            ("keep", "2"),
            ("promote", "3"),
            ("rollback", "3"),
            ("reject", "4"),
            ("reject", "5"),
        ], where
