"""Where the plugin touches SGLang: declared hooks, checked before they are set and proven after.

SGLang's ``HookRegistry`` logs a hook that it could not set and goes on, so a renamed method would leave us silently
blind.  Here each hook says which parameters it relies on; one that does not fit, or did not take, switches its
feature off with a reason that the status shows.  Nothing of ours may fail a request (see ``Call``).

A part of the plugin brings its hooks:

    class Capture:
        def __init__(self, settings, drafting):    # while plugins load: nothing heavy, no torch
            self.feature = Feature("capture")
            self.hooks = [Hook(ROUND, self._around_round, ("batch",), self.feature)]

        def start(self, identity):                 # the scheduler is there; on a thread of our own

        def _around_round(self, original, worker, batch, *args, **kwargs):
            result = original(worker, batch, *args, **kwargs)
            ...                                    # may raise: the request is answered all the same
            return result
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from livedraft.serving.sglang.identity import Identity

log = logging.getLogger(__name__)

#: Versions whose sources the hooks were held against; every newer one is tried, with a warning.
TESTED = ("0.5.21", "0.5.22", "0.5.23")

#: What runs one batch of an EAGLE-3 drafter: draft, verify, extend.  ``(worker, batch, ...)``.
ROUND = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation"
#: What brings the requests of rank 0 to every rank, once per turn of the loop.  ``(receiver, recv_reqs, ...)``.
BROADCAST = (
    "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver._broadcast_reqs_across_ranks"
)
#: What rests an idle scheduler for a second, with ``--sleep-on-idle``.  ``(sleeper)``.
REST = "sglang.srt.managers.scheduler_components.idle_sleeper.IdleSleeper.maybe_sleep"
#: ``(scheduler, server_args, ...)``.
CONSTRUCTION = "sglang.srt.managers.scheduler.Scheduler.__init__"


class Counters(Protocol):
    """What an engine's status tells of its traffic; counters only grow.  Read from another thread."""

    @property
    def output_tokens(self) -> int:
        """Tokens committed."""

    @property
    def rounds(self) -> int:
        """Verify rounds."""

    @property
    def by_drafter(self) -> Mapping[str, tuple[int, int]]:
        """(committed tokens, rounds) by drafter version, over rounds that drafted to the full."""

    @property
    def by_stratum(self) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """The same by version and stratum."""

    @property
    def traces_offered(self) -> int:
        """Traces given to the sink."""

    @property
    def traces_dropped(self) -> int:
        """Traces that it did not take."""


class Part(Protocol):
    """A part of the plugin in one scheduler process; ``feature`` tells whether it works."""

    @property
    def feature(self) -> Feature:
        """What its hooks belong to."""

    @property
    def hooks(self) -> Sequence[Hook]:
        """Set while plugins load."""

    def start(self, identity: Identity) -> None:
        """Called once, on a thread of ours, when engine and target are known; until then it may see rounds already."""

    def close(self) -> None:
        """The scheduler ends."""


class Feature:
    """A part of the plugin that may switch itself off; serving goes on without it."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: Why it is off; None while it is on.
        self.reason: str | None = None
        #: Exceptions of ours that no request noticed.
        self.failures = 0

    @property
    def on(self) -> bool:
        """Whether it works."""
        return self.reason is None

    def switch_off(self, reason: str) -> None:
        """Give up, for good; the first reason stays and is logged."""
        if self.reason is None:
            self.reason = reason
            log.error("%s is off: %s", self.name, reason)

    def failed(self, error: BaseException) -> None:
        """Switch off after an exception of ours."""
        self.failures += 1
        if self.reason is None:
            log.error("%s failed inside a hook; serving goes on without it", self.name, exc_info=error)
            self.switch_off(f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Hook:
    """``around(original, *args, **kwargs)`` in the place of the function at ``target``.

    ``relies_on`` names the parameters that ``around`` reads, without the method's own object and in their order;
    ``around`` gives them the same names, since SGLang may pass them either way.
    """

    target: str
    around: Callable[..., Any]
    relies_on: tuple[str, ...]
    feature: Feature
    #: False: where it does not fit, the feature does without it.
    needed: bool = True


class Call:
    """One call of the original: made at most once, its result or its exception kept apart from ours."""

    __slots__ = ("_function", "error", "made", "result")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.made = False
        self.result: Any = None
        self.error: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call."""
        self.made = True
        try:
            self.result = self._function(*args, **kwargs)
        except BaseException as error:
            self.error = error
            raise
        return self.result


def guarded(hook: Hook, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``hook.around`` such that its caller sees what it would see without us, whatever goes wrong in it.

    An exception of the original passes through.  One of ours switches the feature off; the original's result is
    returned, and it is called first if it had not been.
    """
    if not hook.feature.on:
        return original(*args, **kwargs)
    call = Call(original)
    try:
        return hook.around(call, *args, **kwargs)
    except Exception as error:
        if error is call.error:
            raise
        hook.feature.failed(error)
        if call.error is not None:
            raise call.error from None
        return call.result if call.made else original(*args, **kwargs)


def _chain(hooks: Sequence[Hook]) -> Callable[..., Any]:
    """``hooks`` around one another, the last outermost."""

    def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for hook in hooks:
            original = partial(guarded, hook, original)
        return original(*args, **kwargs)

    return around


class Surface:
    """The hooks of this process: ``set`` them while plugins load, ``prove`` them when the scheduler is there.

    >>> surface = Surface(registry)
    >>> surface.set(hooks)      # SGLang applies them afterwards, and only logs what it could not
    >>> surface.prove()         # now we know
    """

    def __init__(self, register: Callable[[str, Callable[..., Any]], None]) -> None:
        """``register(target, around)`` is SGLang's ``HookRegistry.register`` for an AROUND hook."""
        self._register = register
        self._set: list[tuple[Hook, Any]] = []

    def set(self, hooks: Iterable[Hook]) -> None:
        """Register every hook that fits; those that do not switch their features off.

        Of several on one target the last is the outermost.  SGLang sees one, because it warns of more.
        """
        fitting = dict[str, list[tuple[Hook, Any]]]()
        for hook in hooks:
            try:
                owner, name = resolve(hook.target)
                check_signature(hook.target, getattr(owner, name), hook.relies_on)
                fitting.setdefault(hook.target, []).append((hook, inspect.getattr_static(owner, name)))
            except Exception as error:  # whatever importing or inspecting a changed SGLang raises
                if hook.needed:
                    hook.feature.switch_off(f"SGLang {installed()}: {error}")
                else:
                    log.info("SGLang %s: %s; %s does without", installed(), error, hook.feature.name)
        for target, found in fitting.items():
            self._register(target, _chain([hook for hook, _ in found]))
            self._set.extend(found)

    def prove(self) -> None:
        """Switch off the features whose hooks SGLang did not set."""
        for hook, before in self._set:
            owner, name = resolve(hook.target)
            if inspect.getattr_static(owner, name) is before:
                hook.feature.switch_off(f"SGLang {installed()} did not set the hook on {hook.target}")


class SurfaceChanged(Exception):
    """SGLang is not what a hook relies on."""


def resolve(target: str) -> tuple[Any, str]:
    """(module or class, attribute's name) of a dotted target.  Raises SurfaceChanged when it is not there."""
    path, _, name = target.rpartition(".")
    try:
        owner = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise SurfaceChanged(f"{path} is not there ({error}), which the hook on {name} needs") from error
    if not hasattr(owner, name):
        raise SurfaceChanged(f"{path} has no {name} any more")
    return owner, name


def check_signature(target: str, function: Callable[..., Any], relies_on: Sequence[str]) -> None:
    """Raises SurfaceChanged unless ``function`` takes ``relies_on``, in that order, right after its object.

    A hook of another plugin stands before the function it wraps, so what is checked is the function itself.
    """
    parameters = [*inspect.signature(function).parameters][1:]
    if parameters[: len(relies_on)] != [*relies_on]:
        raise SurfaceChanged(f"{target} takes ({', '.join(parameters)}); the hook needs ({', '.join(relies_on)}, ...)")


def installed() -> str:
    """Version of SGLang in this environment, "unknown" when it is not known."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def warn_of_untested(version: str) -> None:
    """Log that ``version`` of SGLang was never tested, where that is so."""
    if version not in TESTED:
        log.warning(
            "SGLang %s is not among the versions livedraft was tested with (%s); its hooks are checked all the same",
            version,
            ", ".join(TESTED),
        )
