"""Stalls and deaths: of the broker, of the process that produces, of a consumer."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from livedraft.cli.local_broker import durable_broker, memory_broker
from livedraft.contracts.messages import Trace
from livedraft.contracts.settings import Kafka, Traces
from livedraft.traces.arrays import tensor_bytes
from livedraft.traces.kafka_source import KafkaSource
from livedraft.traces.sink import QueuedSink
from livedraft.traces.urls import open_sink

MakeSettings = Callable[..., Kafka]

# kafka-python leaves the sockets of failed connections to the collector, which must therefore run here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect() -> Iterator[None]:
    yield
    gc.collect()


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_until(address: str, settings: Kafka, wanted: set[str], seconds: float = 60) -> list[Trace]:
    """Everything on the stream, in order of arrival within a partition, until all that is wanted has come."""
    source, found = KafkaSource([address], settings, "check"), list[Trace]()
    deadline = time.monotonic() + seconds
    while not wanted <= {trace.trace_id for trace in found} and time.monotonic() < deadline:
        found += [d.item for d in source.poll(0.2) if isinstance(d.item, Trace)]
    source.close()
    return found


def in_order_of_request(traces: list[Trace]) -> bool:
    """Whether each request's traces came first in the order of their numbers."""
    firsts = defaultdict[str, list[int]](list)
    for trace_id, trace in {t.trace_id: t for t in reversed(traces)}.items():
        firsts[trace.request_id].append(int(trace_id.split("-")[1]))
    return all(numbers == sorted(numbers, reverse=True) for numbers in firsts.values())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_stalled_broker_costs_no_trace_no_memory_and_no_time_of_serving(
    kafka_settings: MakeSettings, make_trace: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = kafka_settings(delivery_timeout_s=2.0, spill=str(tmp_path / "spill"))
    trace = make_trace(1, rounds=100, width=300)
    buffer, number, slowest = 24 << 20, 0, 0.0
    taken: set[str] = set()

    def offer(sink: QueuedSink, count: int) -> None:
        nonlocal number, slowest
        for _ in range(count):
            began = time.perf_counter()
            name = f"t-{number}"
            if sink.offer(make_named(trace, name, f"r{number % 5}")):
                taken.add(name)
            slowest = max(slowest, time.perf_counter() - began)
            assert sink.counters().waiting_bytes <= buffer
            number += 1
            time.sleep(0.01)

    with memory_broker() as broker:
        sink = open_sink(Traces(url=f"kafka://{broker.address}", buffer_bytes=buffer), kafka=settings)
        offer(sink, 50)
        eventually(lambda: sink.counters().written == 50)
        before = resident_bytes()
        broker.stall()
        began = time.monotonic()
        # Past the delivery timeout, and with more than memory may take.
        while time.monotonic() - began < 6 or number * tensor_bytes(trace) <= 3 * buffer:
            offer(sink, 20)
        during = sink.counters()
        assert during.spilled > 100
        assert during.lag > 100
        assert during.age_s > 0
        broker.go_on()
        eventually(lambda: sink.counters().lag == 0)
        offer(sink, 50)
        sink.close(20)
        after = sink.counters()
        assert resident_bytes() - before < 3 * buffer
        assert after.dropped == {}
        assert after.written + after.spilled == number == len(taken)
        assert after.backfilled == after.spilled
        found = read_until(broker.address, settings, taken)
    assert {t.trace_id for t in found} == taken
    assert in_order_of_request(found)
    assert slowest < 1.0, "the stall lasted 6 s"
    assert caplog.text.count("the broker is away") == 1
    assert caplog.text.count("the spill is empty") == 1


def test_without_a_spill_a_stall_costs_traces_that_are_counted_and_sending_goes_on(
    kafka_settings: MakeSettings, make_trace: Any
) -> None:
    settings = kafka_settings(delivery_timeout_s=1.0)
    with memory_broker() as broker:
        sink = open_sink(Traces(url=f"kafka://{broker.address}"), kafka=settings)
        sink.offer(make_named(make_trace(1), "t-0", "r"))
        eventually(lambda: sink.counters().written == 1)
        broker.stall()
        for n in range(1, 20):
            sink.offer(make_named(make_trace(1), f"t-{n}", "r"))
        eventually(lambda: sink.counters().dropped.get("broker") == 19)
        broker.go_on()
        sink.offer(make_named(make_trace(1), "t-20", "r"))
        eventually(lambda: sink.counters().written == 2)
        sink.close()
        found = read_until(broker.address, settings, {"t-0", "t-20"})
    assert {"t-0", "t-20"} <= {t.trace_id for t in found}


def test_while_a_broker_stands_still_the_client_sleeps_and_leaves_the_processor_to_serving(
    kafka_settings: MakeSettings, make_trace: Any
) -> None:
    with memory_broker() as broker:
        sink = open_sink(Traces(url=f"kafka://{broker.address}"), kafka=kafka_settings())
        sink.offer(make_named(make_trace(1), "t-0", "r"))
        eventually(lambda: sink.counters().written == 1)
        broker.stall()
        # A request in flight, and messages of other partitions behind it.
        for n in range(1, 20):
            sink.offer(make_named(make_trace(1), f"t-{n}", f"r{n}"))
            time.sleep(0.05)
        (client,) = (thread for thread in threading.enumerate() if thread.name == "livedraft-network-thread")
        assert client.ident is not None
        clock = time.pthread_getcpuclockid(client.ident)
        began, before = time.monotonic(), time.clock_gettime(clock)
        time.sleep(1.0)
        assert time.clock_gettime(clock) - before < 0.1 * (time.monotonic() - began)
        broker.go_on()
        eventually(lambda: sink.counters().written == 20)
        sink.close()


def test_a_consumer_waits_through_a_stall_and_repeats_nothing(kafka_settings: MakeSettings, make_trace: Any) -> None:
    settings = kafka_settings()
    with memory_broker() as broker:
        sink = open_sink(Traces(url=f"kafka://{broker.address}"), kafka=settings)
        source = KafkaSource([broker.address], settings, "trainer")
        source.seek({})
        found: list[str] = []
        offsets: dict[str, int] = {}

        def read(count: int, seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while len(found) < count and time.monotonic() < deadline:
                for delivery in source.poll(0.2):
                    assert isinstance(delivery.item, Trace)
                    found.append(delivery.item.trace_id)
                    offsets[delivery.partition] = delivery.offset + 1
                source.lag()

        for n in range(20):
            sink.offer(make_named(make_trace(1), f"t-{n}", f"r{n}"))
        read(20, 30)
        broker.stall()
        read(21, 4)  # past the session's timeout
        source.commit(offsets)
        assert len(found) == 20
        broker.go_on()
        for n in range(20, 40):
            sink.offer(make_named(make_trace(1), f"t-{n}", f"r{n}"))
        read(40, 40)
        read(41, 1)
        source.close()
        sink.close()
    assert sorted(found, key=lambda name: int(name[2:])) == [f"t-{n}" for n in range(40)]


#: Offers traces for ever; says of each that it was acknowledged or laid down only once the sink has counted it.
PRODUCER = """
import importlib.util, os, sys, time
import msgspec
from livedraft.contracts.settings import Kafka, Traces
from livedraft.traces.urls import open_sink

url, kafka, conftest, life = sys.argv[1:5]
spec = importlib.util.spec_from_file_location("traces_conftest", conftest)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sink = open_sink(Traces(url=url), kafka=msgspec.json.decode(kafka, type=Kafka))
number = told = 0
while True:
    trace = module.build_trace(number)
    name = f"{life}-{number}"
    sink.offer(msgspec.structs.replace(trace, trace_id=name, request_id=f"r{life}-{number % 3}"))
    number += 1
    time.sleep(0.002)
    counters = sink.counters()
    assert not counters.dropped, counters
    while told < counters.written + counters.spilled:  # they are settled in order
        os.write(1, f"{life}-{told}\\n".encode())
        told += 1
"""


def test_deaths_of_producer_and_broker_lose_nothing_that_was_acknowledged(
    kafka_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = kafka_settings(delivery_timeout_s=2.0, spill=str(tmp_path / "spill"))
    conftest = str(Path(__file__).with_name("conftest.py"))
    acknowledged: list[str] = []
    with durable_broker() as broker:
        given = [f"kafka://{broker.address}", msgspec.json.encode(settings).decode(), conftest]
        for life in range(3):
            child = subprocess.Popen([sys.executable, "-c", PRODUCER, *given, str(life)], stdout=subprocess.PIPE)
            assert child.stdout is not None
            said = child.stdout.readline()
            assert said, "the producer died"
            time.sleep(0.7)
            broker.kill()
            time.sleep(1.5)  # long enough for the spill
            broker.start()
            time.sleep(0.3 + 0.5 * life)  # back-filling, or before
            child.send_signal(signal.SIGKILL)
            said += child.stdout.read()
            child.wait()
            child.stdout.close()
            acknowledged += said.decode().split("\n")[:-1]
        # What the last life laid down is sent by the next one.
        sink = open_sink(Traces(url=given[0]), kafka=settings)
        eventually(lambda: sink.counters().lag == 0)
        sink.close(10)
        found = read_until(broker.address, settings, set(acknowledged))
    assert len(acknowledged) > 300
    assert set(acknowledged) <= {trace.trace_id for trace in found}
    for life in range(3):
        assert in_order_of_request([t for t in found if t.trace_id.startswith(f"{life}-")])


def make_named(trace: Trace, name: str, request: str) -> Trace:
    return msgspec.structs.replace(trace, trace_id=name, request_id=request)
