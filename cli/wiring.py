"""The composition root: the only place that knows which adapter stands behind which port."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from livedraft.cli.announcing import AnnouncingRegistry
from livedraft.cli.wiring_registry import open_registry
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import DrafterVersion, Manifest
from livedraft.contracts.ports import Registry, TraceSink
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.contracts.settings import Settings
from livedraft.traces.admission import admit, held_out
from livedraft.traces.redaction import NoRedaction, PatternRedaction, Redactor
from livedraft.traces.urls import open_announcements, open_sink, open_source

if TYPE_CHECKING:
    from livedraft.serving.local.engine import LocalEngine

#: Frozen drafter of day 0, beside the trainer's checkpoints.
DAY_0 = "day0"


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


def write_fresh_drafter(engine: EngineSettings, folder: Path, seed: int) -> None:
    """Write a drafter that knows nothing of the target but its head."""
    import torch
    from livedraft.contracts import checkpoint
    from livedraft.serving.local import target as targets
    from livedraft.serving.local.text import Text
    from livedraft.trainer.model import Drafter
    from livedraft.trainer.target import fresh_config, read_target

    place = targets.find(engine.target)
    target = read_target(place)
    config = fresh_config(target, intermediate_size=engine.draft_intermediate, draft_vocab=engine.draft_vocab)
    with torch.random.fork_rng():
        drafter = Drafter.fresh(target, config, seed=seed)
    manifest = Manifest(
        tensors={},
        target=targets.name(engine.target),
        target_revision=targets.revision(place),
        tokenizer_hash=Text(place).hash,
    )
    checkpoint.write(folder, config, drafter.to_arrays(), manifest)


def day_0(settings: Settings) -> Path:
    """Folder of the drafter that everything begins with; written once."""
    folder = Path(settings.trainer.folder).resolve() / DAY_0
    if not folder.exists():
        write_fresh_drafter(settings.engine, folder, settings.trainer.seed)
    return folder


def live_drafter(settings: Settings, registry: Registry) -> tuple[Path, DrafterVersion]:
    """Folder and version to serve with: what ``live`` points at, or the day-0 drafter, registered as the first."""
    from livedraft.contracts import checkpoint

    live = registry.resolve("live")
    if live is None:
        folder = day_0(settings)
        live = registry.publish(folder, checkpoint.verify(folder)[1], {})
        registry.point("live", live.version)
        return folder, live
    # Not the controller's folder, which it tidies: serving must be able to start again from here.
    return registry.fetch(live.version, Path(settings.trainer.folder).resolve() / "served"), live


def build_engine(settings: Settings, drafter: Path | None, version: str, sink: TraceSink) -> LocalEngine:
    """The embedded engine, its traces going to ``sink``.  Raises SettingsError for another engine's URL."""
    from livedraft.serving.local.engine import LocalEngine

    if settings.engine.url != "local:":
        raise SettingsError(f"engine.url is {settings.engine.url!r}; this version serves with 'local:' only")
    traces = settings.traces
    rule = functools.partial(admit, opted_out=traces.opted_out, sample_rate=traces.sample_rate)
    return LocalEngine(
        settings.engine,
        drafter=drafter,
        drafter_version=version,
        sink=sink,
        admit=lambda request: rule(request).captured,
        buffer_bytes=traces.buffer_bytes,
    )


def serve(settings: Settings, drafter: Path, version: str) -> None:
    """Gateway and embedded engine, until SIGTERM."""
    import sys

    from livedraft.serving.gateway.app import create_app
    from livedraft.serving.gateway.server import serve as answer

    # A stream of tokens must not wait for a thread that computes: hand the interpreter over sooner.
    sys.setswitchinterval(0.0005)
    with contextlib.closing(open_sink(settings.traces, _redactor(settings), settings.kafka)) as sink:
        engine = build_engine(settings, drafter, version, sink)
        app = create_app(
            engine, settings.gateway, engine.name, opted_out=settings.traces.opted_out, stream=sink.counters
        )
        answer(app, settings.gateway)


def _redactor(settings: Settings) -> Redactor:
    from livedraft.serving.local import target as targets
    from livedraft.serving.local.text import Text

    if settings.traces.redact == "nothing":
        return NoRedaction()
    return PatternRedaction(Text(targets.find(settings.engine.target)).decode)


def train(settings: Settings) -> None:
    """The learning process, until SIGTERM or SIGINT."""
    from livedraft.serving.local import target as targets
    from livedraft.trainer import process

    registry = open_registry(settings.registry)
    folder, live = live_drafter(settings, registry)
    with (
        contextlib.closing(open_source(settings.traces, "trainer", settings.kafka)) as source,
        _announcing(settings, registry) as registry,
    ):
        process.main(
            settings.trainer,
            target_folder=targets.find(settings.engine.target),
            drafter_folder=folder,
            version=live.version,
            source=source,
            registry=registry,
            held_out=settings.traces.held_out,
        )


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
    from livedraft.serving.local import target as targets
    from livedraft.swap.controller import Controller
    from livedraft.swap.engine_admin import HttpEngineAdmin
    from livedraft.swap.evidence import Evidence
    from livedraft.swap.gate import GateRules, RoundCost
    from livedraft.swap.swapper import Swapper
    from livedraft.trainer.evaluate import DraftReplay

    # Replays are short but wide: above the trainer's priority, below serving's.
    os.nice(5)
    torch.set_num_threads(1)
    swap = settings.swap
    admin = HttpEngineAdmin(gateway_url(settings), settings.gateway.admin_key)
    rules = GateRules(
        min_traces=swap.gate_min_traces,
        bootstrap=swap.bootstrap,
        confidence=swap.confidence,
        cost=RoundCost(depth=settings.engine.draft_depth),
        engine_can_stop=settings.engine.adaptive_depth,
    )
    replay = DraftReplay(targets.find(settings.engine.target), settings.engine.draft_depth)
    with (
        contextlib.closing(open_source(settings.traces, "controller", settings.kafka)) as source,
        _announcing(settings, open_registry(settings.registry)) as registry,
    ):
        swapper = Swapper(registry, admin, Path(swap.folder))
        evidence = Evidence(source, lambda request: held_out(request, settings.traces.held_out), swap.gate_traces)
        Controller(swapper, evidence, replay, swap, rules, baseline=day_0(settings)).run(stop)
