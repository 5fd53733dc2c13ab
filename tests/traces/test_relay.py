"""From an engine over a relay to the stream: real sockets, a real relay process, killed without warning."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from livedraft.cli.ports import free_port
from livedraft.cli.settings_file import write_settings
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import Features, Trace
from livedraft.contracts.settings import Metrics, Relay, Settings, Traces
from livedraft.traces import relay
from livedraft.traces.arrays import from_numpy, tensor_bytes
from livedraft.traces.codec import encode
from livedraft.traces.memory import MemoryStream
from livedraft.traces.relay_sink import RelaySink
from livedraft.traces.source import SpoolSource
from msgspec.structs import replace


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def relaying(stream: MemoryStream, listen: str = "tcp://127.0.0.1:*", **settings: Any) -> Iterator[relay.Relay]:
    """A relay in a thread, onto a stream in memory."""
    running = relay.Relay(Relay(listen=listen, **settings), stream)
    stop = threading.Event()
    thread = threading.Thread(target=running.run, args=(stop,))
    thread.start()
    try:
        yield running
    finally:
        stop.set()
        thread.join()


def sink_to(address: str, **bounds: int) -> RelaySink:
    return RelaySink("relay+" + address, **bounds)


def ids(stream: MemoryStream) -> list[str]:
    return [d.item.trace_id for d in stream.source("check").poll(limit=10_000) if isinstance(d.item, Trace)]


def push(address: str, *messages: list[bytes]) -> None:
    """Send as a stranger would."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as client:
        client.connect(address)
        for frames in messages:
            client.send_multipart(frames)


def heavy(make_trace: Any, seed: int, megabytes: int = 1) -> Trace:
    """A trace that weighs something."""
    values = np.zeros((4, megabytes << 17), np.uint16)
    features = Features(mode="inline", layers=(1,), values=from_numpy(values, "bf2"))
    trace: Trace = make_trace(seed, features=features)
    return trace


def test_traces_arrive_whole_and_in_order(make_trace: Any) -> None:
    stream = MemoryStream()
    traces = [make_trace(seed, rounds=seed % 7) for seed in range(200)]
    with relaying(stream) as running:
        sink = sink_to(running.address)
        assert all(sink.offer(trace) for trace in traces)
        sink.close()
        sink.close()
        counters = sink.counters()
        assert (counters.offered, counters.written, counters.waiting, counters.waiting_bytes) == (200, 200, 0, 0)
        assert (counters.dropped, sink.dropped) == ({}, 0)
        eventually(lambda: len(stream) == 200)
    assert [d.item for d in stream.source("check").poll(limit=1000)] == traces
    assert (running.received, running.malformed) == (200, 0)


def test_what_is_not_a_trace_is_counted_and_the_next_one_arrives(
    make_trace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stream = MemoryStream()
    whole = encode(make_trace(1), packed=False)
    garbage = [[b""], [b"\0" * 100], [whole[:-5]], [b"LDTR\xff\xff\0\0\0\0"], [whole, whole]]
    with relaying(stream) as running:
        push(running.address, *garbage, [whole])
        eventually(lambda: ids(stream) == ["t1"])
        assert running.malformed == len(garbage)
        assert running.healthy
    assert caplog.text.count("malformed so far") == 1


def test_a_message_above_the_limit_is_never_taken(make_trace: Any) -> None:
    stream = MemoryStream()
    with relaying(stream, max_trace_bytes=200_000) as running:
        push(running.address, [b"x" * 1_000_000])
        sink = sink_to(running.address, max_trace_bytes=200_000)
        assert not sink.offer(heavy(make_trace, 1))
        assert sink.offer(make_trace(2))
        eventually(lambda: ids(stream) == ["t2"])
        sink.close()
    assert sink.counters().dropped == {"size": 1}
    assert running.received == 1


def test_an_opted_out_request_is_not_sent(make_trace: Any) -> None:
    with relaying(MemoryStream()) as running:
        sink = sink_to(running.address)
        assert not sink.offer(make_trace(1, consent=False))
        sink.close()
    assert sink.counters().dropped == {"consent": 1}
    assert running.received == 0


@pytest.mark.parametrize("bound", ["bytes", "traces"])
def test_without_a_relay_traces_wait_up_to_the_bound_and_are_dropped_beyond_it(make_trace: Any, bound: str) -> None:
    trace = heavy(make_trace, 0)
    bounds = {"buffer_bytes": 30 * tensor_bytes(trace)} if bound == "bytes" else {"buffer_traces": 30}
    port = free_port()
    sink = RelaySink(f"relay+tcp://127.0.0.1:{port}", **bounds)
    taken = [sink.offer(heavy(make_trace, seed)) for seed in range(40)]
    assert taken == [True] * 30 + [False] * 10
    assert sink.counters().dropped == {"full": 10}
    # It comes at last, and gets what waited.
    stream = MemoryStream()
    with relaying(stream, listen=f"tcp://127.0.0.1:{port}"):
        eventually(lambda: len(stream) == 30)
        assert sink.offer(heavy(make_trace, 40))
        eventually(lambda: len(stream) == 31)
        sink.close()
    assert ids(stream) == [f"t{seed}" for seed in [*range(30), 40]]


def test_closing_without_a_relay_counts_what_was_not_sent(make_trace: Any) -> None:
    sink = RelaySink(f"relay+tcp://127.0.0.1:{free_port()}")
    for seed in range(50):
        assert sink.offer(make_trace(seed))
    sink.close(timeout=0.1)
    assert sink.counters().dropped == {"closed": 50}
    assert not sink.offer(make_trace(50))
    assert sink.dropped == 51


def test_a_full_stream_drops_at_the_relay_and_goes_on(make_trace: Any) -> None:
    stream = MemoryStream(capacity=3)
    with relaying(stream) as running:
        sink = sink_to(running.address)
        for seed in range(10):
            sink.offer(make_trace(seed))
        eventually(lambda: running.received == 10)
        sink.close()
    assert ids(stream) == ["t0", "t1", "t2"]
    assert stream.dropped == 7


@pytest.mark.parametrize("url", ["relay+tcp://", "relay+tcp://host", "spool://x", "relay+tcp://host:port"])
def test_a_url_that_names_no_relay_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"expected relay\+tcp://host:port"):
        RelaySink(url)


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1", "127.0.0.1:5555", "tcp://256.1.1.1:1"])
def test_an_address_that_cannot_be_listened_at_is_refused(listen: str) -> None:
    with pytest.raises(SettingsError, match=r"relay\.listen"):
        relay.Relay(Relay(listen=listen), MemoryStream())


@dataclass
class Process:
    """`livedraft relay` onto a spool."""

    folder: Path
    port: int
    metrics: int
    redact: str = "nothing"
    source: SpoolSource | None = None
    read: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        settings = Settings(
            traces=Traces(url=f"spool://{self.folder}/traces", fsync="never", redact=self.redact),  # type: ignore[arg-type]
            metrics=Metrics(port=self.metrics),
        )
        config = write_settings(settings, self.folder / "relay.toml")
        with (self.folder / "relay.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "livedraft.cli.main", "relay", "-c", str(config), "--listen", self.listen],
                stdout=log,
                stderr=log,
            )
        eventually(lambda: self.get("/healthz") is not None)
        return process

    @property
    def listen(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def get(self, path: str) -> str | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}{path}", timeout=5) as answer:
                return str(answer.read(), "utf-8")
        except OSError:
            return None

    def written(self) -> list[str]:
        """Ids of all traces on the spool, each read once."""
        if self.source is None:
            self.source = SpoolSource(self.folder / "traces", "check")
        self.read += [d.item.trace_id for d in self.source.poll(limit=100_000) if isinstance(d.item, Trace)]
        return self.read


def test_a_relay_killed_under_load_never_holds_serving_up_and_order_survives(tmp_path: Path, make_trace: Any) -> None:
    served = Process(tmp_path, free_port(), free_port())
    process = served.start()
    sink = sink_to(served.listen, buffer_traces=100_000)
    stop, slowest, offered = threading.Event(), [0.0], [0]
    trace = make_trace(0, rounds=20, width=300)

    def load() -> None:
        while not stop.is_set():
            began = time.monotonic()
            sink.offer(_named(trace, offered[0]))
            slowest[0] = max(slowest[0], time.monotonic() - began)
            offered[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(3):
            before = len(served.written())
            eventually(lambda before=before: len(served.written()) > before + 50)  # type: ignore[misc]
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = served.start()
    finally:
        stop.set()
        thread.join()
        sink.close()
    eventually(lambda: f"n{offered[0] - 1}" in served.written()[-1:])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    written = [int(name[1:]) for name in served.written()]
    assert written == sorted(set(written))
    counters = sink.counters()
    assert (counters.offered, counters.written, counters.dropped) == (offered[0], offered[0], {})
    # Lost is what the dead relays had taken and not written, never what waited here.
    assert len(written) > 0.5 * offered[0]
    assert slowest[0] < 1.0


def _named(trace: Trace, number: int) -> Trace:
    return replace(trace, trace_id=f"n{number}")


def test_the_process_redacts_counts_and_ends_cleanly(tmp_path: Path, make_trace: Any) -> None:
    from livedraft.serving.local.place import find
    from livedraft.serving.local.text import Text

    text = Text(find("bundled"))
    secret = from_numpy(text.encode("write to jane.doe@example.com"), "i4")
    harmless = from_numpy(text.encode("in the beginning"), "i4")
    served = Process(tmp_path, free_port(), free_port(), redact="secrets")
    process = served.start()
    sink = sink_to(served.listen)
    sink.offer(make_trace(1, prompt=secret, output=from_numpy([], "i4"), rounds=0, mode="recompute"))
    sink.offer(make_trace(2, prompt=harmless, output=from_numpy([], "i4"), rounds=0, mode="recompute"))
    push(served.listen, [b"garbage"])
    sink.close()
    eventually(lambda: 'livedraft_relay_traces_total{fate="malformed"} 1.0' in (served.get("/metrics") or ""))
    eventually(lambda: served.written() == ["t2"])
    metrics = served.get("/metrics") or ""
    assert 'livedraft_relay_traces_total{fate="offered"} 2.0' in metrics
    assert 'livedraft_stream_dropped_traces_total{reason="redacted"} 1.0' in metrics
    assert served.get("/elsewhere") is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
