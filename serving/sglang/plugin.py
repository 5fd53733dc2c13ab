"""What SGLang calls in each of its processes (entry point ``sglang.srt.plugins``), and what lives in a scheduler.

Settings are those of every process: the TOML file that LIVEDRAFT_CONFIG names, and LIVEDRAFT_SECTION__KEY.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from livedraft.contracts.errors import LivedraftError, Overloaded, SettingsError, SwapFailed
from livedraft.contracts.messages import EngineStatus
from livedraft.contracts.settings import Settings, load
from livedraft.serving.local import place
from livedraft.serving.sglang.admin import AdminServer
from livedraft.serving.sglang.exchange import Exchange, Gather
from livedraft.serving.sglang.identity import NAME, Drafting, Identity, identify
from livedraft.serving.sglang.surface import (
    CONSTRUCTION,
    Feature,
    Hook,
    Surface,
    installed,
    warn_of_untested,
)

log = logging.getLogger(__name__)

CONFIG = "LIVEDRAFT_CONFIG"
_SCHEDULER = "sglang.srt.managers.scheduler"


def register() -> None:
    """Set our hooks in a scheduler's process, and do nothing in any other.

    A scheduler runs in a process that SGLang started, from the module that defines it.
    """
    if multiprocessing.parent_process() is None or _SCHEDULER not in sys.modules:
        return
    try:
        settings = load(Path(path) if (path := os.environ.get(CONFIG)) else None)
    except SettingsError as error:
        log.error("livedraft stays off, SGLang serves without it: %s", error)
        return
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        warn_of_untested(installed())
        Plugin(settings).install(lambda target, around: HookRegistry.register(target, around, HookType.AROUND))
    except ImportError as error:
        log.error('livedraft stays off, SGLang serves without it: %s; pip install "livedraft[sglang]"', error)


class Plugin:
    """The parts of one scheduler process and what they share."""

    def __init__(self, settings: Settings) -> None:
        from livedraft.serving.sglang.capture import Capture

        self._settings = settings
        self._drafting = Drafting()
        self._exchange = Exchange(self._drafting)
        self._feature = Feature("livedraft")
        self._capture = Capture(settings, self._drafting)
        self._identity: Identity | None = None
        self._drafter: Any = None
        self._scheduler: Any = None

    def install(self, register: Callable[[str, Callable[..., Any]], None]) -> None:
        """Set the hooks: the exchange's around the others', so that a batch is stamped with what drafts it."""
        self._surface = Surface(register)
        construction = Hook(CONSTRUCTION, self._around_construction, ("server_args",), self._feature)
        self._surface.set([construction, *self._capture.hooks, *self._exchange.hooks])

    def status(self) -> EngineStatus:
        """What this engine is and holds.  Raises Overloaded until that is known."""
        if self._feature.reason is not None:
            raise Overloaded(f"livedraft is off in this engine: {self._feature.reason}")
        if self._identity is None:
            raise Overloaded("this engine is starting")
        if self._drafter is not None:
            self._drafter.audit_by_and_by()
        who, counters, scheduler = self._identity, self._capture, self._scheduler
        return EngineStatus(
            engine=who.engine,
            target=who.target,
            target_revision=who.target_revision,
            tokenizer_hash=who.tokenizer_hash,
            context_length=who.context_length,
            drafter=self._drafter.version if self._drafter else "",
            drafter_checksum=self._drafter.checksum if self._drafter else "",
            running=len(scheduler.running_batch.reqs),
            waiting=len(scheduler.waiting_queue),
            output_tokens=counters.output_tokens,
            rounds=counters.rounds,
            by_drafter=counters.by_drafter,
            by_stratum=counters.by_stratum,
            traces_offered=counters.traces_offered,
            traces_dropped=counters.traces_dropped,
            capture=self._capture.feature.on,
            disabled={feature.name: feature.reason for feature in self._features if feature.reason is not None},
        )

    @property
    def _features(self) -> list[Feature]:
        return [
            self._capture.feature,
            self._capture.counting,
            self._exchange.feature,
            self._exchange.transport,
        ]

    def _around_construction(
        self, original: Callable[..., Any], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any
    ) -> None:
        original(scheduler, server_args, *args, **kwargs)
        self._started(scheduler, server_args)

    def _started(self, scheduler: Any, server_args: Any) -> None:
        """The scheduler is there, its loop is not: prove the hooks, then find out the rest on a thread."""
        self._surface.prove()
        self._scheduler = scheduler
        rank, gather = collective(scheduler.tp_cpu_group)
        self._exchange.join(gather)
        if rank == 0:
            self._listen(server_args)
        if (reason := unsupported(scheduler, server_args)) is not None:
            for feature in self._features:
                feature.switch_off(reason)
        else:
            self._connect(scheduler)
        threading.Thread(target=self._prepare, args=(scheduler, server_args, rank), name=NAME, daemon=True).start()

    def _listen(self, server_args: Any) -> None:
        settings = self._settings.sglang
        port = settings.admin_port or int(server_args.port) + 1
        key = self._settings.gateway.admin_key
        try:
            server = AdminServer(settings.admin_host, port, key, self.status, self._exchange.swap)
        except OSError as error:
            log.error("sglang.admin_port: nothing administers this engine: %s:%d: %s", settings.admin_host, port, error)
            return
        log.info("livedraft administers this engine at %s:%d", settings.admin_host, server.port)

    def _connect(self, scheduler: Any) -> None:
        from livedraft.serving.sglang.drafter import ServedDrafter
        from livedraft.serving.sglang.weights import LiveWeights

        worker = scheduler.draft_worker.draft_worker
        model = worker.draft_runner.model
        try:
            live = LiveWeights(model, scheduler.tp_worker.model_runner.model)
        except SwapFailed as error:
            self._exchange.feature.switch_off(str(error))
            return
        if (folder := Path(worker.draft_runner.model_config.model_path)).joinpath("manifest.json").exists():
            self._drafting.version = folder.name
        self._drafter = ServedDrafter(live, model.config, worker.hot_token_id, self._drafting)
        self._exchange.connect(self._drafter)

    def _prepare(self, scheduler: Any, server_args: Any, rank: int) -> None:
        """Read the target's files and hold the drafter against its own; requests are served meanwhile."""
        try:
            context = int(scheduler.model_config.context_len)
            identity = identify(self._settings, server_args, context, leads=rank == 0)
        except Exception as error:  # the boundary of the thread: nobody else would hear of it
            self._feature.failed(error)
            for feature in self._features:
                feature.switch_off(f"the target could not be read: {error}")
            return
        if self._drafter is not None:
            folder = scheduler.draft_worker.draft_worker.draft_runner.model_config.model_path
            try:
                self._drafter.prove(place.find(str(folder)), identity)
            except LivedraftError as error:
                self._exchange.feature.switch_off(str(error))
            except Exception as error:
                self._exchange.feature.failed(error)
        try:
            self._capture.start(identity)
            atexit.register(self._capture.close)
        except Exception as error:
            self._capture.feature.failed(error)
        self._identity = identity


def unsupported(scheduler: Any, server_args: Any) -> str | None:
    """Why this deployment can neither be learned from nor swapped; None where it can."""
    for name in ("dp_size", "pp_size"):
        if (size := getattr(server_args, name)) > 1:
            return f"--{name.replace('_', '-')} is {size}; one engine with tensor parallelism alone is supported"
    if not scheduler.spec_algorithm.is_eagle3():
        return "SGLang was not started with --speculative-algorithm EAGLE3"
    if type(scheduler.draft_worker).__name__ != "EAGLEWorkerV2":
        return f"SGLang drafts with {type(scheduler.draft_worker).__name__}; EAGLEWorkerV2 is supported"
    return None


def collective(group: Any) -> tuple[int, Gather]:
    """This process's rank in ``group``, and how its ranks hand one another what they found."""
    import torch.distributed as dist

    size = dist.get_world_size(group)

    def gather(value: Any) -> list[Any]:
        if size == 1:
            return [value]
        values: list[Any] = [None] * size
        dist.all_gather_object(values, value, group=group)
        return values

    return dist.get_rank(group), gather
