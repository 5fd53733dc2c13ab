"""Hooks that fit are set; those that do not, or that fail, switch their feature off and harm nobody."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from livedraft.serving.sglang.surface import Feature, Hook, Surface, check_signature, resolve

WORKER = "fake_sglang.worker.Worker"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for SGLang's worker, importable by its dotted name."""

    class Worker:
        calls = 0

        def forward(self, batch: int, on_publish: Any = None) -> int:
            self.calls += 1
            if batch < 0:
                raise ValueError("a batch that SGLang itself fails on")
            return batch + 1

    import sys

    for name in ("fake_sglang", "fake_sglang.worker"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fake_sglang"].worker = sys.modules["fake_sglang.worker"]  # type: ignore[attr-defined]
    sys.modules["fake_sglang.worker"].Worker = Worker  # type: ignore[attr-defined]
    return Worker


class Registry:
    """As SGLang's: hooks are applied later, and what cannot be applied is only noted."""

    def __init__(self) -> None:
        self.registered: list[tuple[str, Callable[..., Any]]] = []

    def register(self, target: str, around: Callable[..., Any]) -> None:
        self.registered.append((target, around))

    def apply(self) -> None:
        for target, around in self.registered:
            owner, name = resolve(target)
            original = getattr(owner, name)

            def wrapper(*args: Any, _around: Any = around, _original: Any = original, **kwargs: Any) -> Any:
                return _around(_original, *args, **kwargs)

            setattr(owner, name, functools.wraps(original)(wrapper))


def hooked(
    around: Callable[..., Any], target: str = f"{WORKER}.forward", relies_on: tuple[str, ...] = ("batch",)
) -> tuple[Registry, Surface, Feature]:
    registry, feature = Registry(), Feature("capture")
    surface = Surface(registry.register)
    surface.set([Hook(target, around, relies_on, feature)])
    return registry, surface, feature


def test_a_hook_sees_the_call_and_its_result(worker: Any) -> None:
    seen = []

    def around(original: Any, self: Any, batch: int, **kwargs: Any) -> Any:
        result = original(self, batch, **kwargs)
        seen.append((batch, result, kwargs))
        return result

    registry, surface, feature = hooked(around)
    registry.apply()
    surface.prove()
    assert worker().forward(3, on_publish=None) == 4
    assert worker().forward(batch=5) == 6
    assert seen == [(3, 4, {"on_publish": None}), (5, 6, {})]
    assert feature.on


@pytest.mark.parametrize("early", [True, False])
def test_an_exception_of_ours_fails_no_call_and_switches_off(worker: Any, early: bool) -> None:
    def around(original: Any, self: Any, batch: int) -> Any:
        if not early:
            original(self, batch)
        raise RuntimeError("ours")

    registry, _, feature = hooked(around)
    registry.apply()
    one = worker()
    assert one.forward(3) == 4
    assert one.calls == 1, "the original runs exactly once"
    assert feature.failures == 1
    assert feature.reason == "RuntimeError: ours"
    assert one.forward(4) == 5
    assert feature.failures == 1, "it is not asked again"


def test_an_exception_of_the_original_passes_through_and_blames_nobody_else(worker: Any) -> None:
    def around(original: Any, self: Any, batch: int) -> Any:
        return original(self, batch)

    registry, _, feature = hooked(around)
    registry.apply()
    with pytest.raises(ValueError, match="SGLang itself"):
        worker().forward(-1)
    assert feature.on


def test_the_originals_exception_wins_over_ours(worker: Any) -> None:
    def around(original: Any, self: Any, batch: int) -> Any:
        try:
            return original(self, batch)
        finally:
            raise RuntimeError("while cleaning up")

    registry, _, feature = hooked(around)
    registry.apply()
    with pytest.raises(ValueError, match="SGLang itself"):
        worker().forward(-1)
    assert feature.reason == "RuntimeError: while cleaning up"


@pytest.mark.parametrize(
    ("target", "relies_on", "reason"),
    [
        (f"{WORKER}.forward_batch", ("batch",), "has no forward_batch any more"),
        ("fake_sglang.worker.Other.forward", ("batch",), "fake_sglang.worker.Other is not there"),
        ("fake_sglang.elsewhere.Worker.forward", ("batch",), "fake_sglang.elsewhere.Worker is not there"),
        (f"{WORKER}.forward", ("schedule",), r"takes \(batch, on_publish\); the hook needs \(schedule, ...\)"),
        (f"{WORKER}.forward", ("on_publish",), "the hook needs"),
    ],
)
def test_a_hook_that_does_not_fit_is_not_set_and_says_why(
    worker: Any, target: str, relies_on: tuple[str, ...], reason: str
) -> None:
    registry, _, feature = hooked(lambda original, *args: original(*args), target, relies_on)
    assert not registry.registered
    assert feature.reason is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(feature.reason)


def test_a_hook_that_is_not_needed_may_be_missing(worker: Any) -> None:
    registry, feature = Registry(), Feature("capture")
    Surface(registry.register).set([Hook(f"{WORKER}.abort", lambda original: None, ("batch",), feature, needed=False)])
    assert feature.on
    assert not registry.registered


def test_of_several_hooks_the_last_is_outermost(worker: Any) -> None:
    order = []

    def named(name: str) -> Callable[..., Any]:
        def around(original: Any, self: Any, batch: int) -> Any:
            order.append(name)
            return original(self, batch)

        return around

    registry, feature = Registry(), Feature("capture")
    hooks = [Hook(f"{WORKER}.forward", named(name), ("batch",), feature) for name in ("inner", "outer")]
    Surface(registry.register).set(hooks)
    registry.apply()
    assert len(registry.registered) == 1
    assert worker().forward(3) == 4
    assert order == ["outer", "inner"]


def test_a_hook_that_was_registered_but_never_applied_is_found_out(worker: Any) -> None:
    _, surface, feature = hooked(lambda original, *args: original(*args))
    surface.prove()
    assert feature.reason is not None
    assert "did not set the hook" in feature.reason


def test_a_signature_is_read_through_another_plugins_hook(worker: Any) -> None:
    registry, *_ = hooked(lambda original, *args: original(*args))
    registry.apply()
    check_signature("forward", worker.forward, ("batch", "on_publish"))
