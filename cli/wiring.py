"""The composition root: the only place that knows which adapter stands behind which port."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from livedraft.cli.announcing import AnnouncingRegistry
from livedraft.cli.wiring_registry import open_registry
from livedraft.contracts.errors import DrafterRejected, RegistryUnavailable, SettingsError
from livedraft.contracts.messages import DrafterVersion, Manifest, SwapRequest
from livedraft.contracts.ports import EngineAdmin, Registry, TraceSink, TraceSource
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.contracts.settings import Settings
from livedraft.traces.admission import admit, held_out
from livedraft.traces.redaction import NoRedaction, PatternRedaction, Redactor
from livedraft.traces.urls import KAFKA, open_announcements, open_sink, open_source

if TYPE_CHECKING:
    import numpy as np
    from livedraft.contracts.checkpoint import DrafterConfig
    from livedraft.serving.local.engine import LocalEngine
    from livedraft.swap.swapper import Swapper
    from livedraft.traces.relay_sink import RelaySink
    from livedraft.traces.sink import QueuedSink
    from livedraft.trainer.ranks import Ranks

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Frozen drafter of day 0, beside the trainer's checkpoints.
DAY_0 = "day0"
#: Seconds between two tries to reach a registry that does not answer.
_REGISTRY_PAUSE_S = 2.0


def leave_with_parent() -> None:
    """Get SIGTERM when the process that started us dies, however it dies.  Linux; elsewhere nothing happens."""
    import ctypes
    import os
    import sys

    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        parent = os.getppid()
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGTERM)


def gateway_url(settings: Settings) -> str:
    """Where this machine reaches the gateway."""
    host = settings.gateway.host
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{settings.gateway.port}"


def engine_admin(settings: Settings, timeout: float = 5.0) -> EngineAdmin:
    """The engine, or engines, as they are: to look at."""
    from livedraft.swap.engine_fleet import EngineFleet

    engines = _engine_admins(settings, timeout, swaps=False)
    return engines[0] if len(engines) == 1 else EngineFleet(engines)


def swapper(settings: Settings, registry: Registry) -> Swapper:
    """The way to another drafter, for whoever swaps; engines that were away are brought into line by it."""
    from livedraft.swap.engine_fleet import EngineFleet
    from livedraft.swap.intended import Intended
    from livedraft.swap.journal import Journal
    from livedraft.swap.swapper import Swapper

    folder = Path(settings.swap.folder).resolve()
    engines = _engine_admins(settings, swaps=True)
    if any(engine.kind == "sglang" for engine in settings.engine.remote):
        fleet = EngineFleet(engines, lambda v: folder / "versions" / v, Intended(registry, Journal(folder)))
        return Swapper(registry, fleet, folder)
    alone = engines[0] if len(engines) == 1 else EngineFleet(engines, lambda v: folder / "versions" / v)
    return Swapper(registry, alone, folder)


def _engine_admins(settings: Settings, timeout: float = 5.0, *, swaps: bool) -> Sequence[EngineAdmin]:
    from livedraft.contracts.engines import EngineAddress
    from livedraft.swap.engine_admin import HttpEngineAdmin

    gateway = settings.gateway

    def reach(engine: EngineAddress) -> EngineAdmin:
        if engine.plugin:
            return HttpEngineAdmin(engine.admin, gateway.admin_key, timeout=timeout)
        return sglang_admin(settings, engine.admin, timeout, swaps=swaps)

    if not (engines := settings.engine.remote):
        return [HttpEngineAdmin(gateway_url(settings), gateway.admin_key, timeout=timeout)]
    return [reach(engine) for engine in engines]


def sglang_admin(settings: Settings, base: str, timeout: float, *, swaps: bool) -> EngineAdmin:
    """An SGLang without our plugin.  Raises SettingsError where what reads its target is not installed."""
    from importlib.util import find_spec

    from livedraft.serving.sglang.remote import SglangAdmin

    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise SettingsError(
            f"engine.url: ?plugin=no needs {' and '.join(missing)} in this environment: "
            'pip install "livedraft[engine]", or the plugin in SGLang\'s'
        )
    keys = settings.gateway
    return SglangAdmin(base, settings, keys.engine_key, keys.admin_key, timeout=timeout, release=swaps)


def once_answered(
    ask: Callable[[], T], stop: threading.Event, agree: Callable[[bool], bool] = lambda told: told
) -> T | None:
    """What ``ask`` returns once the registry answers; None when ``stop`` is set first.

    Of several processes that ask together, all must do the same: ``agree`` on whether one was told to stop.
    """
    said = ""
    while not agree(stop.is_set()):
        try:
            return ask()
        except RegistryUnavailable as error:
            if str(error) != said:
                log.warning("waiting for the registry, trying again every %g s: %s", _REGISTRY_PAUSE_S, error)
            said = str(error)
        stop.wait(_REGISTRY_PAUSE_S)
    return None


def write_fresh_drafter(
    engine: EngineSettings, folder: Path, seed: int, kept: np.ndarray | None = None
) -> tuple[DrafterConfig, Manifest]:
    """Write a drafter that knows nothing of the target but its head; ``kept`` as ``Drafter.fresh``."""
    import torch
    from livedraft.contracts import checkpoint
    from livedraft.serving.local import place
    from livedraft.trainer.model import Drafter
    from livedraft.trainer.target import fresh_config, read_target

    folder_of_target = place.find(engine.target)
    target = read_target(folder_of_target)
    config = fresh_config(target, intermediate_size=engine.draft_intermediate, draft_vocab=engine.draft_vocab)
    with torch.random.fork_rng():
        drafter = Drafter.fresh(target, config, seed=seed, kept=None if kept is None else torch.from_numpy(kept))
    return config, checkpoint.write(folder, config, drafter.to_arrays(), describe(engine, folder_of_target))


def describe(engine: EngineSettings, folder_of_target: Path) -> Manifest:
    """The manifest of a drafter for the target of ``engine`` that nobody trained here."""
    from livedraft.serving.local import place
    from livedraft.serving.local.text import Text

    return Manifest(
        tensors={},
        target=place.name(engine.target),
        target_revision=place.revision(folder_of_target),
        tokenizer_hash=Text(folder_of_target).hash,
    )


def day_0(settings: Settings, beside: Path | None = None) -> Path:
    """Folder of the drafter that everything begins with: ``engine.drafter`` or, written once, a fresh one.

    A fresh one depends on target, settings and seed alone: processes that share no disk each write the same one.
    Raises SettingsError when ``engine.drafter`` cannot be used.
    """
    if settings.engine.drafter:
        from livedraft.contracts import checkpoint

        folder = Path(settings.engine.drafter).resolve()
        try:
            checkpoint.verify(folder)
        except DrafterRejected as error:
            raise SettingsError(f"engine.drafter: {folder}: {error}") from error
        return folder
    folder = (beside or Path(settings.trainer.folder)).resolve() / DAY_0
    if not folder.exists():
        write_fresh_drafter(settings.engine, folder, settings.trainer.seed)
    return folder


def live_drafter(settings: Settings, registry: Registry, beside: Path | None = None) -> tuple[Path, DrafterVersion]:
    """Folder and version to serve with: what ``live`` points at, or the day-0 drafter, registered as the first.

    They are kept in ``beside``, by default the trainer's folder.
    """
    from livedraft.contracts import checkpoint

    live = registry.resolve("live")
    if live is None:
        folder = day_0(settings, beside)
        live = registry.publish(folder, checkpoint.verify(folder)[1], {})
        registry.point("live", live.version)
        return folder, live
    # Not the controller's folder, which it tidies: serving must be able to start again from here.
    return registry.fetch(live.version, (beside or Path(settings.trainer.folder)).resolve() / "served"), live


def build_engine(settings: Settings, drafter: Path | None, version: str, sink: TraceSink) -> LocalEngine:
    """The embedded engine, its traces going to ``sink``."""
    from livedraft.serving.local.engine import LocalEngine

    traces = settings.traces
    rule = functools.partial(admit, opted_out=traces.opted_out, sample_rate=traces.sample_rate)
    return LocalEngine(
        settings.engine,
        drafter=drafter,
        drafter_version=version,
        sink=sink,
        admit=lambda request: rule(request).captured,
        buffer_bytes=traces.buffer_bytes,
        features=traces.features if traces.features == "recompute" else traces.feature_dtype,
    )


def serve(
    settings: Settings,
    drafter: Path,
    version: str,
    *,
    stop: threading.Event | None = None,
    swapped: Callable[[SwapRequest], None] = lambda _: None,
) -> None:
    """Endpoint and embedded engine, until SIGTERM or ``stop``; ``swapped`` hears of applied swaps."""
    import sys

    from livedraft.serving.gateway.app import create_app
    from livedraft.serving.gateway.server import serve as answer

    # A stream of tokens must not wait for a thread that computes: hand the interpreter over sooner.
    sys.setswitchinterval(0.0005)
    with contextlib.closing(_engine_sink(settings)) as sink:
        engine = build_engine(settings, drafter, version, sink)
        app = create_app(
            engine,
            settings.gateway,
            engine.name,
            opted_out=settings.traces.opted_out,
            swapped=swapped,
            stream=sink.counters,
        )
        _keep_for_good()
        answer(app, settings.gateway, stop)


def gateway(settings: Settings, stop: threading.Event) -> None:
    """The proxy in front of the engines of ``engine.url``, until SIGTERM or ``stop``."""
    from livedraft.serving.gateway.proxy import create_proxy
    from livedraft.serving.gateway.server import serve as answer

    if not (engines := settings.engine.remote):
        expected = "http://host:port or sglang+http://host:port"
        raise SettingsError(f"engine.url is {settings.engine.url!r}, expected {expected} for `livedraft gateway`")
    proxy = create_proxy(settings.gateway, engines, opted_out=settings.traces.opted_out)
    _keep_for_good()
    answer(proxy, settings.gateway, stop)


def _keep_for_good() -> None:
    """Of the half million objects of a start none goes; a collection that looked at them stops all tokens for 0.2 s."""
    import gc

    gc.collect()
    gc.freeze()


def _engine_sink(settings: Settings) -> QueuedSink | RelaySink:
    """Where the engine leaves its traces: with a relay, which redacts them, or straight on the stream."""
    traces = settings.traces
    if not traces.url.startswith("relay+tcp://"):
        return open_sink(traces, _redactor(settings), settings.kafka)
    from livedraft.traces.relay_sink import RelaySink

    return RelaySink(traces.url, buffer_bytes=traces.buffer_bytes, max_trace_bytes=settings.relay.max_trace_bytes)


def relay(settings: Settings, stop: threading.Event) -> None:
    """Engines' traces onto the stream, until ``stop``."""
    from livedraft.cli.collectors import RelayCollector
    from livedraft.cli.observed import observed
    from livedraft.traces.metrics import StreamCollector
    from livedraft.traces.relay import Relay

    with contextlib.closing(open_sink(settings.traces, _redactor(settings), settings.kafka)) as sink:
        running = Relay(settings.relay, sink)
        collectors = [RelayCollector(running), StreamCollector(sink.counters)]
        with observed(settings.metrics, collectors, lambda: running.healthy):
            log.info("taking traces at %s, publishing to %s", running.address, settings.traces.url)
            running.run(stop)


def _redactor(settings: Settings) -> Redactor:
    if settings.traces.redact == "nothing":
        return NoRedaction()
    from livedraft.serving.local import place
    from livedraft.serving.local.text import Text

    return PatternRedaction(Text(place.find(settings.engine.target)).decode)


def train(settings: Settings, stop: threading.Event) -> None:
    """The learning process, until ``stop``."""
    from livedraft.cli.collectors import TrainerCollector
    from livedraft.cli.observed import observed
    from livedraft.serving.local import place
    from livedraft.trainer import process
    from livedraft.trainer.ranks import joined

    with joined(settings.trainer.parallel) as ranks, contextlib.ExitStack() as opened:

        def ask() -> tuple[Path, DrafterVersion]:
            return ranks.lead(lambda: live_drafter(settings, open_registry(settings.registry)))

        source = opened.enter_context(contextlib.closing(_source_of(settings, ranks)))
        registry = None
        if ranks.rank == 0:  # it speaks for all
            opened.enter_context(observed(settings.metrics, [TrainerCollector(settings.trainer)]))
            registry = opened.enter_context(_announcing(settings, open_registry(settings.registry)))
        # Again, whenever what is live has another draft vocabulary.
        while (found := once_answered(ask, stop, ranks.any)) is not None:
            folder, live = found
            process.main(
                settings.trainer,
                target_folder=place.find(settings.engine.target),
                drafter_folder=folder,
                version=live.version,
                source=source,
                registry=registry,
                held_out=settings.traces.held_out,
                stop=stop,
                ranks=ranks,
            )
    ranks.leave()


def _source_of(settings: Settings, ranks: Ranks) -> TraceSource:
    """The stream, or what a rank has of it."""
    traces, kafka = settings.traces, settings.kafka
    if ranks.count == 1:
        return open_source(traces, "trainer", kafka)
    if traces.url.startswith(KAFKA):
        return open_source(traces, "trainer", kafka, share=(ranks.rank, ranks.count))
    from livedraft.trainer.dealt import DealtSource

    return DealtSource(ranks, open_source(traces, "trainer", kafka) if ranks.rank == 0 else None)


@contextlib.contextmanager
def _announcing(settings: Settings, registry: Registry) -> Iterator[Registry]:
    """The registry, telling of candidates and decisions on the topics of a broker."""
    announcements = open_announcements(settings.traces, settings.kafka)
    if announcements is None:
        yield registry
        return
    with contextlib.closing(announcements):
        yield AnnouncingRegistry(registry, announcements)


def control(settings: Settings, stop: threading.Event) -> None:
    """The swap controller, until ``stop``."""
    import os

    import torch
    from livedraft.cli.collectors import ControllerCollector
    from livedraft.cli.observed import observed
    from livedraft.serving.local import place
    from livedraft.swap.controller import Controller
    from livedraft.swap.evidence import Evidence
    from livedraft.swap.gate import GateRules, RoundCost
    from livedraft.swap.remembered import RememberedReplay
    from livedraft.trainer.evaluate import DraftReplay
    from livedraft.trainer.process import prefill_of

    # Replays are short but wide: above the trainer's priority, far below serving's.
    os.nice(10)
    torch.set_num_threads(1)
    swap = settings.swap
    rules = GateRules(
        min_traces=swap.gate_min_traces,
        max_error=swap.gate_max_error,
        enough_traces=swap.gate_traces,
        bootstrap=swap.bootstrap,
        confidence=swap.confidence,
        cost=RoundCost(depth=settings.engine.draft_depth),
        engine_can_stop=settings.engine.adaptive_depth,
    )
    target = place.find(settings.engine.target)
    prefill = prefill_of(target, settings.trainer)
    replay = RememberedReplay(DraftReplay(target, settings.engine.draft_depth, prefill=prefill))
    with (
        contextlib.closing(open_source(settings.traces, "controller", settings.kafka)) as source,
        _announcing(settings, open_registry(settings.registry)) as registry,
    ):
        swapping = swapper(settings, registry)
        evidence = Evidence(source, lambda request: held_out(request, settings.traces.held_out), swap.gate_traces)
        controller = Controller(swapping, evidence, replay, swap, rules, baseline=day_0(settings))
        with observed(settings.metrics, [ControllerCollector(swapping.journal)]):
            controller.run(stop)
