"""Two real SGLangs behind one gateway and one controller: what befalls one, neither the other nor a client waits for.

One that was away comes back with what it had, and one that was restarted with its first drafter: either is given the
live one, and answers name it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import SwapFailed
from livedraft.contracts.messages import DrafterVersion, SwapReceipt, SwapRequest
from livedraft.swap import by_hand
from livedraft.swap.engine_admin import HttpEngineAdmin
from livedraft.swap.engine_fleet import EngineFleet
from livedraft.swap.intended import Intended
from livedraft.swap.journal import Journal
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.swap.swapper import Swapper

from .plugged import Engine, engine
from .server import Speculation
from .test_gateway import LONG, UPON, eventually, gateway
from .test_swap import asked_for


class Admin(HttpEngineAdmin):
    """A controller's, less patient; ``halting`` is an engine that stands still just when it is to swap."""

    halting: Engine | None = None

    def __init__(self, one: Engine) -> None:
        super().__init__(one.base, timeout=2, swap_timeout=20)

    def swap(self, request: SwapRequest) -> SwapReceipt:
        if self.halting is not None:
            signal_all(self.halting, signal.SIGSTOP)
            self.halting, self._swap_timeout = None, 2
        return super().swap(request)


def signal_all(one: Engine, which: signal.Signals) -> None:
    """To every process of a server."""
    os.killpg(one.server.process.pid, which)


@contextmanager
def halted(one: Engine) -> Iterator[None]:
    """It stands still until the block ends: it takes connections and answers nothing."""
    signal_all(one, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_all(one, signal.SIGCONT)


class Controller:
    """What `livedraft controller` swaps with, over two engines; version 1 is live, 2 has learned."""

    def __init__(self, folder: Path, drafters: list[Path], *engines: Engine) -> None:
        self.registry = MemoryRegistry(folder / "registry")
        for drafter in drafters:
            self.registry.publish(drafter, checkpoint.verify(drafter)[1], {})
        self.registry.point("live", "1")
        self.admins = [Admin(one) for one in engines]
        state = folder / "swap"
        intended = Intended(self.registry, Journal(state))
        fleet = EngineFleet(self.admins, lambda version: state / "versions" / version, intended)
        self.swapper = Swapper(self.registry, fleet, state)

    def turn(self) -> DrafterVersion | None:
        """As it does at each turn."""
        with self.swapper.journal.alone():
            return self.swapper.inform(self.swapper.settle())

    @property
    def drafting(self) -> list[str]:
        """What each engine says, and that its weights are that version's."""
        found = [admin.status() for admin in self.admins]
        assert [one.drafter_checksum for one in found] == [self.registry.get(one.drafter).checksum for one in found]
        return [one.drafter for one in found]

    @property
    def live(self) -> str:
        found = self.registry.resolve("live")
        assert found is not None
        return found.version


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory, fresh_drafter: Path) -> Iterator[Engine]:
    """The second engine, until the last test kills it."""
    with engine(tmp_path_factory.mktemp("doomed"), Speculation(fresh_drafter)) as one:
        one.started()
        yield one


@pytest.fixture
def controller(
    tmp_path: Path, fresh_drafter: Path, trained_drafter: Path, swapping: Engine, doomed: Engine
) -> Iterator[Controller]:
    """Over two engines that draft with version 1."""
    made = Controller(tmp_path, [fresh_drafter, trained_drafter], swapping, doomed)
    assert made.turn() is not None
    assert made.drafting == ["1", "1"]  # SGLang had named its first after its folder
    yield made
    swapping.admin.swap(asked_for(fresh_drafter))


def answer(http: httpx.Client, prompt: str) -> tuple[str, dict[str, Any]]:
    """A greedy answer and its ``usage.livedraft``."""
    said = http.post("/v1/completions", json=UPON | {"prompt": prompt, "max_tokens": 40, "ignore_eos": True}).json()
    return said["choices"][0]["text"], said["usage"]["livedraft"]


def test_one_that_stands_still_is_swapped_when_it_goes_on(
    controller: Controller, swapping: Engine, doomed: Engine, prompts: list[str]
) -> None:
    expected = swapping.server.generate(prompts[0], max_new_tokens=40)["text"]
    with gateway(swapping, doomed) as (http, proxy):
        with halted(doomed):
            by_hand.promote(controller.swapper, "2")
            assert controller.live == swapping.admin.status().drafter == "2"
            eventually(lambda: len(proxy.replicas.ready()) == 1)
            eventually(lambda: answer(http, prompts[0])[1]["drafter_version"] == "2")
            text, said = answer(http, prompts[0])
            assert text == expected
            assert said["accept_length"] > 1.3
        eventually(lambda: len(proxy.replicas.ready()) == 2)
    assert controller.turn() is not None
    assert controller.drafting == ["2", "2"]
    assert controller.live == "2"
    assert doomed.server.generate(prompts[0], max_new_tokens=40)["text"] == expected


def test_one_that_stops_in_the_middle_of_the_swap_leaves_both_with_the_same(
    controller: Controller, swapping: Engine, doomed: Engine, prompts: list[str]
) -> None:
    """Half of them are no majority: the swap has failed, and whoever took it is brought back."""
    expected = swapping.server.generate(prompts[0], max_new_tokens=40)["output_ids"]
    controller.admins[1].halting = doomed
    try:
        with pytest.raises(SwapFailed, match="timed out"):
            by_hand.promote(controller.swapper, "2")
        assert controller.live == "1"
        assert swapping.server.generate(prompts[0], max_new_tokens=40)["output_ids"] == expected
        assert controller.turn() is not None
        assert controller.live == swapping.admin.status().drafter
    finally:
        signal_all(doomed, signal.SIGCONT)

    def agreed() -> bool:
        """What it was asked for while it stood still it may do now, and be in the midst of it."""
        try:
            controller.turn()
        except SwapFailed:
            return False
        return controller.drafting == [controller.live] * 2

    eventually(agreed)
    for one in (swapping, doomed):
        assert one.server.generate(prompts[0], max_new_tokens=40)["output_ids"] == expected


def test_one_that_was_killed_comes_back_and_is_given_the_live_one(
    controller: Controller, swapping: Engine, doomed: Engine, prompts: list[str], tmp_path: Path, fresh_drafter: Path
) -> None:
    """The last test of ``doomed``."""
    expected = swapping.server.generate(prompts[0], max_new_tokens=40)["text"]
    with gateway(doomed, swapping) as (http, _):
        received = ""
        with http.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as stream:
            for piece in stream.iter_text():
                received += piece
                if received.count("data: ") == 5:
                    signal_all(doomed, signal.SIGKILL)
        last = json.loads(received.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == "engine_unavailable"
        assert "[DONE]" not in received
        assert [answer(http, prompts[0])[0] for _ in range(3)] == [expected] * 3
        by_hand.promote(controller.swapper, "2")
        assert controller.live == swapping.admin.status().drafter == "2"
        assert answer(http, prompts[0])[0] == expected
    with engine(tmp_path, Speculation(fresh_drafter)) as again:
        assert again.started().drafter_checksum == controller.registry.get("1").checksum
        controller.admins[1].base = again.base
        assert controller.turn() is not None
        assert controller.drafting == ["2", "2"]
        assert controller.live == "2"
        with gateway(again) as (http, proxy):
            eventually(lambda: proxy.replicas.all[0].drafting is not None)
            text, said = answer(http, prompts[0])
            assert text == expected
            assert said["drafter_version"] == "2"
            assert said["accept_length"] > 1.3
