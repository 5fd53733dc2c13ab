"""SGLang starts again with the drafter of its command line: it is given what was live, and no alias follows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from livedraft.contracts.errors import RegistryUnavailable, SwapFailed
from livedraft.contracts.messages import SwapReceipt, SwapRequest
from livedraft.swap.engine_admin import HttpEngineAdmin
from livedraft.swap.engine_fleet import EngineFleet
from livedraft.swap.intended import Intended
from livedraft.swap.journal import Journal

from .engine_server import EngineServer
from .fakes import FakeEngine
from .test_controller import World


class Flaky(FakeEngine):
    """Fails the next so many swaps as an engine under load may."""

    failing = 0

    def swap(self, request: SwapRequest) -> SwapReceipt:
        if self.failing:
            self.failing -= 1
            raise SwapFailed("another swap is under way")
        return super().swap(request)


class Restartable(World):
    """A world whose engines are reached as SGLang's plugin is, and start again with ``day0``, named "initial"."""

    def __init__(self, tmp_path: Path, stack: ExitStack, count: int) -> None:
        self._stack = stack
        self._count = count
        self.engines: list[Flaky] = []
        super().__init__(tmp_path)

    def start(self) -> None:
        if not self.engines:
            self.engines = [Flaky(self.tmp_path / "day0", "initial") for _ in range(self._count)]
            servers = [self._stack.enter_context(EngineServer(engine)) for engine in self.engines]
            self.admins = [HttpEngineAdmin(server.url) for server in servers]
        folder = self.tmp_path / "swap"
        intended = Intended(self.registry, Journal(folder))
        self.engine = EngineFleet(self.admins, lambda v: folder / "versions" / v, intended)  # type: ignore[assignment]
        super().start()

    def restart(self, *numbers: int) -> None:
        for number in numbers:
            self.engines[number].restart(self.tmp_path / "day0", "initial")

    def drafters(self) -> list[str]:
        return [engine.drafter for engine in self.engines]

    def promote(self) -> str:
        """A better candidate, swapped in and kept."""
        version = self.publish(7, 3.0)
        self.traffic()
        decision = self.tick()
        assert decision is not None
        assert decision.action == "promote"
        for engine in self.engines:
            engine.serve(200, 3.0)
        kept = self.tick()
        assert kept is not None
        assert kept.action == "keep"
        return version


@pytest.fixture(params=[1, 2, 3])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Restartable]:
    with ExitStack() as stack:
        made = Restartable(tmp_path, stack, request.param)
        made.tick()  # version 1, the day-0 drafter, becomes live
        assert made.alias("live") == "1"
        yield made


def test_the_first_drafter_gets_the_registrys_name(world: Restartable) -> None:
    world.tick()
    assert set(world.drafters()) == {"1"}


def test_whoever_was_restarted_is_given_the_live_version(world: Restartable) -> None:
    version = world.promote()
    for numbers in ([0], range(len(world.engines))):  # one, then all of them
        world.restart(*numbers)
        assert world.tick() is None
        assert set(world.drafters()) == {version}
        assert world.alias("live") == version


def test_while_the_registry_is_down_the_journal_tells(world: Restartable) -> None:
    version = world.promote()
    world.restart(0)
    world.registry.down = True
    with pytest.raises(RegistryUnavailable):
        world.tick()
    assert set(world.drafters()) == {version}


def test_a_controller_without_its_journal_asks_the_registry(world: Restartable, tmp_path: Path) -> None:
    version = world.promote()
    world.restart(*range(len(world.engines)))
    (tmp_path / "swap").rename(tmp_path / "lost")
    world.start()
    world.tick()
    assert set(world.drafters()) == {version}
    assert world.alias("live") == version


def test_a_restart_under_watch_does_not_end_it(world: Restartable) -> None:
    version = world.publish(7, 3.0)
    world.traffic()
    world.tick()
    world.restart(*range(len(world.engines)))
    assert world.tick() is None
    assert set(world.drafters()) == {version}
    for engine in world.engines:
        engine.serve(200, 3.0)
    decision = world.tick()
    assert decision is not None
    assert (decision.action, decision.candidate) == ("keep", version)
    assert world.alias("live") == version


def test_no_alias_follows_an_engine_that_is_only_busy(world: Restartable) -> None:
    version = world.promote()
    world.restart(*range(len(world.engines)))
    for engine in world.engines:
        engine.failing = 1
    with pytest.raises(SwapFailed, match="under way"):
        world.tick()
    assert world.alias("live") == version
    world.tick()
    assert set(world.drafters()) == {version}


def test_engines_that_cannot_have_it_are_the_truth_again(world: Restartable) -> None:
    version = world.promote()
    world.restart(*range(len(world.engines)))
    for engine in world.engines:
        engine.refuses.add(version)
    world.tick()
    assert world.alias("live") == "1"


def test_one_that_was_away_during_a_swap_catches_up(world: Restartable) -> None:
    world.tick()
    world.engines[-1].broken = len(world.engines) > 1
    version = world.promote() if len(world.engines) == 1 else world.publish(7, 3.0)
    if len(world.engines) > 1:
        world.traffic()
        decision = world.tick()
        assert decision is not None
        assert decision.action == "promote"
    world.engines[-1].broken = False
    world.restart(len(world.engines) - 1)
    world.tick()
    assert set(world.drafters()) == {version}
    assert world.alias("live") == version
