"""A broker that stands still while the gateway answers: what that costs a token, and what becomes of the traces.

Real processes: gateway, engine with its sink on the broker, broker.  Clients stream answers one after the other, in
three phases of equal length: calm, frozen (SIGSTOP), and calm again once everything laid down has been sent.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from livedraft.cli.local_broker import LocalBroker, memory_broker
from livedraft.cli.ports import free_port
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance, write
from livedraft.cli.settings_file import write_settings
from livedraft.cli.wiring import leave_with_parent
from livedraft.contracts import metrics
from livedraft.contracts.errors import StreamUnavailable
from livedraft.contracts.messages import Trace
from livedraft.contracts.settings import Engine, Gateway, Kafka, Registry, Settings, Traces
from livedraft.traces.kafka_reader import TopicReader
from livedraft.traces.urls import broker_addresses
from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

_console = Console(stderr=True)
_TOKENS = 64
#: Bytes of traces that may wait in the engine's memory: less than what a minute brings.
_BUFFER_BYTES = 8 << 20
#: Seconds for a process to be ready, for the spill to be sent, and of a part of a phase: their spread is the noise.
_READY_S, _SETTLE_S, _PARTS = 120.0, 120.0, 3


class Answer(NamedTuple):
    """One streamed completion: when it was asked for, and when each piece of it came."""

    request_id: str
    asked_at: float
    pieces: tuple[float, ...]


def freeze(place: Path | None, seconds: float, clients: int) -> None:
    """See ``livedraft bench freeze --help``."""
    with tempfile.TemporaryDirectory() as folder, memory_broker() as broker, _stack(broker, Path(folder)) as stack:
        load = _Load(stack.url, clients)
        time.sleep(min(10.0, seconds))  # unmeasured: caches, and the engine's choice of depth
        marks, memory = [time.perf_counter()], _Memory(stack.engine)
        _wait("calm", seconds)
        marks.append(time.perf_counter())
        calm_bytes = memory.peak()
        broker.stall()
        _wait("frozen", seconds)
        marks.append(time.perf_counter())
        frozen_bytes, seen = memory.peak(), stack.counters()
        broker.go_on()
        while stack.counters()[metrics.STREAM_SPILL_LAG]:
            if time.perf_counter() - marks[-1] > _SETTLE_S:
                raise StreamUnavailable(f"{stack.counters()[metrics.STREAM_SPILL_LAG]:g} traces are not sent")
            time.sleep(0.1)
        backfill_s = time.perf_counter() - marks[-1]
        again = time.perf_counter()
        _wait("calm again", seconds)
        end = time.perf_counter()
        answers = load.stop()
        memory.stop()
        stack.end()
        arrived = _arrivals(stack.settings)
    first = {trace.request_id.rpartition("-")[0] for _, trace in arrived}
    phases = {"before": (marks[0], marks[1]), "frozen": (marks[1], marks[2]), "after": (again, end)}
    times = {name: _phase(answers, *span) for name, span in phases.items()}
    report: dict[str, Any] = {"seconds": seconds, "clients": clients, "requests": len(answers)}
    report |= {
        "first_token_p99_ratio": _ratio(times, "first_token_ms"),
        "between_tokens_p99_ratio": _ratio(times, "between_tokens_ms"),
        "phases": times,
        "traces_lost": len({answer.request_id for answer in answers} - first),
        "dropped": seen[metrics.STREAM_DROPPED],
        "spilled": seen[metrics.STREAM_SPILLED],
        "backfill_s": round(backfill_s, 2),
        "out_of_order": _out_of_order(arrived),
        "memory_mb": {"calm": round(calm_bytes / 1e6, 1), "frozen": round(frozen_bytes / 1e6, 1)},
        "memory_growth_mb": round((frozen_bytes - calm_bytes) / 1e6, 1),
        "buffer_mb": round(_BUFFER_BYTES / 1e6, 1),
        "waiting_mb_when_frozen": round(seen[metrics.STREAM_WAITING_BYTES] / 1e6, 2),
        "provenance": provenance(),
    }
    write(report, place)


class _Stack(NamedTuple):
    """An engine with a gateway in front of it."""

    settings: Settings
    engine: subprocess.Popen[bytes]
    gateway: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self.settings.gateway.port}"

    def counters(self) -> dict[str, float]:
        """Sums of the engine's metrics over their labels."""
        with urllib.request.urlopen(f"{self.settings.engine.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = dict.fromkeys((metrics.STREAM_DROPPED, metrics.STREAM_SPILLED), 0.0)
        for line in lines:
            if match := re.fullmatch(r"(livedraft_stream_\w+?)(?:_total)?(?:\{.*\})? (\S+)", line):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    def end(self) -> None:
        """SIGTERM, the gateway first."""
        for process in (self.gateway, self.engine):
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def _stack(broker: LocalBroker, folder: Path) -> Iterator[_Stack]:
    engine_port, gateway_port = free_port(), free_port()
    settings = Settings(
        engine=Engine(url=f"http://127.0.0.1:{engine_port}", folder=str(folder / "engine")),
        gateway=Gateway(port=gateway_port),
        traces=Traces(url=f"kafka://{broker.address}", buffer_bytes=_BUFFER_BYTES),
        kafka=Kafka(prefix="freeze", partitions=4, delivery_timeout_s=3.0, spill=str(folder / "spill")),
        registry=Registry(url="memory:"),
    )
    engine = replace(settings, gateway=Gateway(port=engine_port))
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, given in (("engine", engine), ("gateway", settings)):
            config = write_settings(given, folder / f"{name}.toml")
            command = [sys.executable, "-m", "livedraft.cli.main", name, "--config", str(config)]
            with (folder / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=leave_with_parent))
            _until_ready(given.gateway.port, started[-1], folder / f"{name}.log")
        yield _Stack(settings, *started)
    finally:
        for process in started:
            process.kill()
            process.wait()


def _until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise StreamUnavailable(f"port {port} is not ready: {log.read_text()[-2000:]}")
        time.sleep(0.1)


class _Load:
    """Clients that each ask again as soon as they have their answer."""

    def __init__(self, url: str, clients: int) -> None:
        self._url = url
        self._stop = threading.Event()
        self._answers: list[Answer] = []
        self._failures: list[Exception] = []
        self._threads = [threading.Thread(target=self._ask_on, args=(n, clients)) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[Answer]:
        """What was answered.  Raises what a client met with: no request may fail."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for failure in self._failures:
            raise failure
        return self._answers

    def _ask_on(self, number: int, step: int) -> None:
        prompts = held_out_prompts()
        try:
            with httpx.Client(base_url=self._url, timeout=60) as client:
                while not self._stop.is_set():
                    self._answers.append(self._ask(client, prompts[number % len(prompts)]))
                    number += step
        except (httpx.HTTPError, ValueError) as error:
            self._failures.append(error)

    @staticmethod
    def _ask(client: httpx.Client, prompt: str) -> Answer:
        body = {
            "model": "livedraft-tiny",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": _TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }
        asked, pieces, request_id = time.perf_counter(), list[float](), ""
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    request_id = chunk["id"]
                    if any(choice["delta"].get("content") for choice in chunk["choices"]):
                        pieces.append(time.perf_counter())
        if not pieces:
            raise ValueError("an answer without a token")
        return Answer(request_id, asked, tuple(pieces))


class _Memory:
    """The most that a process has resident, looked at often."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._statm = Path(f"/proc/{process.pid}/statm")
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def peak(self) -> int:
        """Bytes, since this was last asked."""
        found, self._peak = self._peak, 0
        return found

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._stop.wait(0.1):
            self._peak = max(self._peak, int(self._statm.read_text().split()[1]) * page)


def _wait(name: str, seconds: float) -> None:
    for _ in track(range(100), name, console=_console):
        time.sleep(seconds / 100)


def _phase(answers: list[Answer], begin: float, end: float) -> dict[str, dict[str, Any]]:
    """Of tokens that came in a phase: p50 and p99 of both times, and the p99 of its parts."""
    found: dict[str, dict[str, Any]] = {}
    width = (end - begin) / _PARTS
    for name, measure in (("first_token_ms", _first), ("between_tokens_ms", _between)):
        parts: list[list[float]] = [[] for _ in range(_PARTS)]
        for came, waited in itertools.chain.from_iterable(map(measure, answers)):
            if begin <= came < end:
                parts[min(_PARTS - 1, int((came - begin) / width))].append(waited)
        everything = [value for part in parts for value in part]
        found[name] = {
            "p50": _percentile(everything, 50),
            "p99": _percentile(everything, 99),
            "p99_of_parts": [_percentile(part, 99) for part in parts],
            "samples": len(everything),
        }
    return found


def _first(answer: Answer) -> list[tuple[float, float]]:
    return [(answer.pieces[0], answer.pieces[0] - answer.asked_at)]


def _between(answer: Answer) -> list[tuple[float, float]]:
    return [(later, later - earlier) for earlier, later in itertools.pairwise(answer.pieces)]


def _percentile(seconds: list[float], percent: int) -> float | None:
    """In milliseconds; None of too few."""
    if len(seconds) < 2:
        return None
    return round(1000 * statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1], 3)


def _ratio(times: dict[str, dict[str, Any]], what: str) -> float | None:
    """p99 while the broker stood still over the mean of those before and after."""
    before, frozen, after = (times[name][what]["p99"] for name in ("before", "frozen", "after"))
    return None if None in (before, frozen, after) else round(2 * frozen / (before + after), 3)


def _arrivals(settings: Settings) -> list[tuple[str, Trace]]:
    """Traces on the topic with their partitions, in order, repeats left out."""
    found: dict[str, tuple[str, Trace]] = {}
    with contextlib.closing(TopicReader(broker_addresses(settings.traces.url), settings.kafka)) as reader:
        for delivery in reader.read(dict.fromkeys(reader.bounds(), 0)):
            if isinstance(delivery.item, Trace):
                found.setdefault(delivery.item.trace_id, (delivery.partition, delivery.item))
    return list(found.values())


def _out_of_order(arrived: list[tuple[str, Trace]]) -> int:
    """Traces that ended before the one ahead of them in their partition."""
    last: dict[str, float] = {}
    count = 0
    for partition, trace in arrived:
        count += trace.finished_at < last.get(partition, 0.0)
        last[partition] = trace.finished_at
    return count
