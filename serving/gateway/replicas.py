"""The engines behind a gateway: which of them answer, which of those has least to do, and what SGLang drafts with.

Our own engine is asked at ``/readyz``.  SGLang is asked at ``/ready``, or at ``/health`` where it is too old to have
that: its ``/health`` generates a token and takes a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import httpx
import msgspec
from livedraft.contracts import metrics as names
from livedraft.contracts.engines import EngineAddress
from livedraft.serving.gateway.sglang import Drafting
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

#: Seconds an engine gets to say whether it is ready.
_PROBE_S = 2.0


class Replica:
    """One engine, as far as the gateway knows.  Belongs to the event loop's thread."""

    def __init__(self, address: EngineAddress) -> None:
        self.address = address
        self.probe = "/ready" if address.kind == "sglang" else "/readyz"
        self.ready = False
        #: What it said last of its drafter; None where it does not tell.
        self.drafting: Drafting | None = None
        self.drafting_asked = False
        self.in_flight = 0
        #: Number of the request it was given last; the one idle longest is next among equals.
        self.last = 0
        self._said = ""

    @property
    def base(self) -> str:
        """Base URL, also its name."""
        return self.address.base

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count a request while it is answered here."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def found(self, ready: bool, why: str = "") -> None:
        """Note what a look, or a request, has shown; logged when it is news."""
        if ready != self.ready or (not ready and why != self._said):
            log.log(logging.INFO if ready else logging.WARNING, "%s is %s", self.base, "ready" if ready else why)
        self.ready, self._said = ready, why


class Replicas:
    """All of them; ``admin_key`` opens SGLang's plugin.

    asyncio.create_task(replicas.watch(client, every_s=1.0))
    if replica := replicas.choose():
        with replica.busy(): ...
    """

    def __init__(self, addresses: Sequence[EngineAddress], admin_key: str | None = None) -> None:
        self.all = [Replica(address) for address in addresses]
        self._admin = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
        self._number = count(1)

    def ready(self, but: Collection[Replica] = ()) -> list[Replica]:
        """Those that answer, none of ``but``."""
        return [replica for replica in self.all if replica.ready and replica not in but]

    def choose(self, but: Collection[Replica] = ()) -> Replica | None:
        """The ready one with the fewest requests in flight, none of ``but``; None when there is none."""
        if not (free := self.ready(but)):
            return None
        chosen = min(free, key=lambda replica: (replica.in_flight, replica.last))
        chosen.last = next(self._number)
        return chosen

    async def watch(self, client: httpx.AsyncClient, every_s: float) -> None:
        """Look at each every so often, for ever."""
        while True:
            await self.look(client)
            await asyncio.sleep(every_s)

    async def look(self, client: httpx.AsyncClient) -> None:
        """Ask each whether it is ready, and SGLang's plugin what it drafts with."""
        drafting = [one for one in self.all if one.address.kind == "sglang" and one.address.plugin]
        await asyncio.gather(
            *(self._ask(replica, client) for replica in self.all),
            *(self._ask_drafting(replica, client) for replica in drafting),
        )

    async def _ask(self, replica: Replica, client: httpx.AsyncClient) -> None:
        try:
            answer = await client.get(replica.base + replica.probe, timeout=_PROBE_S)
            if answer.status_code == 404 and replica.probe == "/ready":
                replica.probe = "/health"
                answer = await client.get(replica.base + replica.probe, timeout=_PROBE_S)
        except (httpx.HTTPError, OSError) as error:
            replica.found(False, f"unreachable: {error or type(error).__name__}")
        else:
            replica.found(answer.is_success, f"not ready: {answer.status_code}")

    async def _ask_drafting(self, replica: Replica, client: httpx.AsyncClient) -> None:
        url = replica.address.admin + "/admin/status"
        try:
            answer = await client.get(url, headers=self._admin, timeout=_PROBE_S)
            answer.raise_for_status()
            found = msgspec.json.decode(answer.content, type=_Status)
        except (httpx.HTTPError, OSError, msgspec.DecodeError) as error:
            if replica.drafting is not None or not replica.drafting_asked:
                log.info("%s does not tell its drafter's version: %s", replica.base, error or type(error).__name__)
            replica.drafting = None
        else:
            replica.drafting = Drafting(drafter=found.drafter, as_of=round(time.time(), 3))
        replica.drafting_asked = True


class _Status(msgspec.Struct):
    """An EngineStatus, as far as we read it."""

    drafter: str


class ReplicaCollector(Collector):
    """What the gateway thinks of each."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        """Read them."""
        up = GaugeMetricFamily(names.REPLICA_UP, "Whether an engine is ready.", labels=["replica"])
        busy = GaugeMetricFamily(names.REPLICA_IN_FLIGHT, "Requests an engine is answering.", labels=["replica"])
        for replica in self._replicas.all:
            up.add_metric([replica.base], replica.ready)
            busy.add_metric([replica.base], replica.in_flight)
        yield up
        yield busy
