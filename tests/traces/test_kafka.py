"""The stream on a real broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from livedraft.contracts.errors import SettingsError, StreamUnavailable, TraceError
from livedraft.contracts.messages import DeadLetter, Delivery, Offsets, Trace
from livedraft.contracts.settings import Kafka, Traces
from livedraft.traces.chunks import split
from livedraft.traces.codec import encode
from livedraft.traces.kafka import KafkaSender
from livedraft.traces.kafka_client import ensure_topics
from livedraft.traces.kafka_settings import first_offset
from livedraft.traces.kafka_source import KafkaSource
from livedraft.traces.urls import open_sink

MakeSettings = Callable[..., Kafka]


def publish(address: str, settings: Kafka, traces: list[Trace], *, message_bytes: int = 1 << 20) -> None:
    sink = open_sink(Traces(url=f"kafka://{address}", message_bytes=message_bytes), kafka=settings)
    assert all(sink.offer(trace) for trace in traces)
    sink.close(30)
    counters = sink.counters()
    assert (counters.written, counters.dropped, counters.waiting) == (len(traces), {}, 0)


def read(source: KafkaSource, count: int, seconds: float = 30) -> list[Delivery]:
    """``count`` items, and no more that come at once."""
    items: list[Delivery] = []
    deadline = time.monotonic() + seconds
    while len(items) < count and time.monotonic() < deadline:
        items += source.poll(0.2)
    return items + source.poll(0.3)


def traces_of(items: list[Delivery]) -> dict[str, Trace]:
    return {item.item.trace_id: item.item for item in items if isinstance(item.item, Trace)}


def used(items: list[Delivery]) -> Offsets:
    return {item.partition: item.offset + 1 for item in items}


@pytest.fixture
def open_source(broker_address: str) -> Iterator[Callable[..., KafkaSource]]:
    opened: list[KafkaSource] = []

    def open_source(settings: Kafka, group: str = "g", share: tuple[int, int] | None = None) -> KafkaSource:
        opened.append(KafkaSource([broker_address], settings, group, share))
        return opened[-1]

    yield open_source
    for source in opened:
        source.close()


def test_every_trace_arrives_whole_and_once(
    broker_address: str, kafka_settings: MakeSettings, open_source: Callable[..., KafkaSource], make_trace: Any
) -> None:
    settings = kafka_settings()
    traces = [make_trace(seed, rounds=seed) for seed in range(40)]
    publish(broker_address, settings, traces, message_bytes=1024)
    source = open_source(settings)
    assert source.lag() > 0
    items = read(source, 40)
    assert len(items) == 40
    assert traces_of(items) == {trace.trace_id: trace for trace in traces}
    assert {item.partition for item in items} == {f"{settings.prefix}.traces/{n}" for n in range(4)}
    assert source.lag() == 0
    assert source.incomplete == 0
    assert source.age_s() > 0
    source.close()
    source.close()


def test_what_a_group_committed_is_where_it_goes_on_and_seek_goes_before_it(
    broker_address: str, kafka_settings: MakeSettings, open_source: Callable[..., KafkaSource], make_trace: Any
) -> None:
    settings = kafka_settings(partitions=1)
    publish(broker_address, settings, [make_trace(seed) for seed in range(10)])
    name = f"{settings.prefix}.traces/0"
    first = open_source(settings)
    assert first.committed() == {}
    assert len(read(first, 10)) == 10
    first.commit({name: 4})
    first.close()
    second = open_source(settings)
    assert second.committed() == {name: 4}
    assert list(traces_of(read(second, 6))) == ["t4", "t5", "t6", "t7", "t8", "t9"]
    second.seek({name: 7})
    assert list(traces_of(read(second, 3))) == ["t7", "t8", "t9"]
    second.seek({})
    assert len(read(second, 6)) == 6
    with pytest.raises(TraceError, match="partition '0': expected topic/number"):
        second.seek({"0": 3})


def test_a_trace_that_began_before_the_offset_is_not_lost(
    broker_address: str, kafka_settings: MakeSettings, open_source: Callable[..., KafkaSource], make_trace: Any
) -> None:
    """Two producers' chunks alternate: what is used ends in the middle of another trace."""
    settings = kafka_settings(partitions=1)
    ensure_topics([broker_address], settings)
    a, b = (
        split(encode(t), key=t.request_id, trace_id=t.trace_id, message_bytes=1024)
        for t in (make_trace(1, rounds=20), make_trace(2, rounds=20))
    )
    producer = KafkaProducer(bootstrap_servers=broker_address, enable_idempotence=False)
    for message in (b[0], *a, *b[1:]):
        producer.send(f"{settings.prefix}.traces", message).get(10)
    producer.close()
    source = open_source(settings)
    items = read(source, 2)
    assert list(traces_of(items)) == ["t1", "t2"]
    source.seek(used(items[:1]))
    assert list(traces_of(read(source, 1))) == ["t2"]


def test_offsets_the_broker_no_longer_has_are_left_for_the_oldest(
    broker_address: str,
    kafka_settings: MakeSettings,
    open_source: Callable[..., KafkaSource],
    make_trace: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = kafka_settings(partitions=1)
    publish(broker_address, settings, [make_trace(1)])
    source = open_source(settings)
    source.seek({f"{settings.prefix}.traces/0": 1_000_000})
    assert list(traces_of(read(source, 1))) == ["t1"]
    assert "no longer has offset 1000000" in caplog.text


def test_a_message_can_be_routed_unread(broker_address: str, kafka_settings: MakeSettings, make_trace: Any) -> None:
    settings = kafka_settings()
    publish(broker_address, settings, [make_trace(1, tenant="acme")])
    consumer = KafkaConsumer(bootstrap_servers=broker_address)
    consumer.assign([TopicPartition(f"{settings.prefix}.traces", n) for n in range(4)])
    consumer.seek_to_beginning()
    records = [r for _ in range(20) for batch in consumer.poll(200).values() for r in batch]
    consumer.close()
    assert [r.key for r in records] == [b"r1"]
    assert dict(records[0].headers) == {"schema": b"1.1", "target": b"tiny@1", "drafter": b"8", "tenant": b"acme"}


def test_topics_are_created_once_with_what_the_settings_say(broker_address: str, kafka_settings: MakeSettings) -> None:
    settings = kafka_settings(partitions=3)
    for _ in range(2):
        ensure_topics([broker_address], settings)
    threads = [threading.Thread(target=ensure_topics, args=[[broker_address], settings]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    admin = KafkaAdminClient(bootstrap_servers=broker_address)
    names = [f"{settings.prefix}.{name}" for name in ("traces", "drafts", "swaps", "dead")]
    found = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(names)}
    admin.close()
    assert found == dict(zip(names, (3, 1, 1, 1), strict=True))


def test_what_cannot_be_read_is_a_dead_letter_and_a_copy_of_it_lies_with_the_reason(
    broker_address: str, kafka_settings: MakeSettings, open_source: Callable[..., KafkaSource], make_trace: Any
) -> None:
    settings = kafka_settings(partitions=1, dead_letter_group="buries")
    ensure_topics([broker_address], settings)
    good = encode(make_trace(1))
    producer = KafkaProducer(bootstrap_servers=broker_address, enable_idempotence=False)
    for message in (b"garbage", good, good[:4] + b"\x09" + good[5:], b"LDCH nonsense"):
        producer.send(f"{settings.prefix}.traces", message, key=b"k", headers=[("tenant", b"acme")]).get(10)
    producer.close()
    for group in ("buries", "reads"):
        source = open_source(settings, group)
        items = read(source, 4)
        assert [type(item.item) for item in items] == [DeadLetter, Trace, DeadLetter, DeadLetter]
        source.commit(used(items))
    consumer = KafkaConsumer(bootstrap_servers=broker_address)
    consumer.assign([TopicPartition(f"{settings.prefix}.dead", 0)])
    consumer.seek_to_beginning()
    records = [r for _ in range(20) for batch in consumer.poll(100).values() for r in batch]
    consumer.close()
    assert [r.value[:5] for r in records] == [b"garba", good[:4] + b"\x09", b"LDCH "]
    assert {r.key for r in records} == {b"k"}
    headers = [dict(r.headers) for r in records]
    assert [h["offset"] for h in headers] == [b"0", b"2", b"3"]
    assert headers[0]["tenant"] == b"acme"
    assert b"expected b'LDTR'" in headers[0]["reason"]
    assert b"schema 9.1" in headers[1]["reason"]


def test_two_consumers_share_the_partitions_and_use_each_trace_once(
    broker_address: str, kafka_settings: MakeSettings, make_trace: Any
) -> None:
    """One works alone, another joins in the middle of it; each keeps its offsets with what it has used."""
    settings = kafka_settings()
    publish(broker_address, settings, [make_trace(seed, request_id=f"r{seed}") for seed in range(200)])
    both, done = [Rank(broker_address, settings, name) for name in "ab"], threading.Event()
    threads = [threading.Thread(target=rank.work, args=[done]) for rank in both]
    threads[0].start()
    eventually(lambda: len(both[0].used) >= 40)
    threads[1].start()
    eventually(lambda: len(both[0].partitions) == 2 == len(both[1].partitions))
    publish(broker_address, settings, [make_trace(seed, request_id=f"r{seed}") for seed in range(200, 300)])
    eventually(lambda: len(both[0].used) + len(both[1].used) >= 300)
    done.set()
    for thread in threads:
        thread.join()
    assert both[0].saves >= 1, "nothing was handed over"
    everything = both[0].used + both[1].used
    assert sorted(everything, key=lambda t: int(t[1:])) == [f"t{seed}" for seed in range(300)]
    assert both[1].used


def test_ranks_have_fixed_partitions_whose_offsets_go_on_in_any_number_of_ranks(
    broker_address: str, kafka_settings: MakeSettings, open_source: Callable[..., KafkaSource], make_trace: Any
) -> None:
    settings = kafka_settings()
    publish(broker_address, settings, [make_trace(seed) for seed in range(24)])
    offsets: Offsets = {}
    trained: list[str] = []
    shares: list[set[str]] = []
    for rank in range(2):
        source = open_source(settings, share=(rank, 2))
        source.seek({})
        shares.append(source.partitions)
        found = source.poll(5.0)
        while source.lag():
            found += source.poll(0.2)
        offsets |= used(found)
        trained += traces_of(found)
        source.commit(offsets)
        source.close()
    topic = f"{settings.prefix}.traces"
    assert shares == [{f"{topic}/0", f"{topic}/2"}, {f"{topic}/1", f"{topic}/3"}]
    assert len(trained) == len(set(trained)) == 24
    publish(broker_address, settings, [make_trace(seed) for seed in range(24, 30)])
    again = [open_source(settings, share=(rank, 3)) for rank in range(3)]
    assert again[0].committed() == offsets
    later: list[Delivery] = []
    for source in again:
        source.seek(offsets)
    deadline = time.monotonic() + 30
    while len(later) < 6 and time.monotonic() < deadline:
        later += [item for source in again for item in source.poll(0.1)]
    assert sorted(traces_of(later)) == sorted(make_trace(seed).trace_id for seed in range(24, 30))


def test_a_rank_without_a_partition_says_so(
    kafka_settings: MakeSettings, open_source: Callable[..., KafkaSource]
) -> None:
    with pytest.raises(SettingsError, match="has 4 partitions, expected at least one for each of 5 ranks"):
        open_source(kafka_settings(), share=(4, 5))


def test_a_consumer_that_looks_in_seldom_and_briefly_gets_its_share(
    broker_address: str, kafka_settings: MakeSettings, make_trace: Any, open_source: Callable[..., KafkaSource]
) -> None:
    """As a trainer in the middle of its steps, or a controller once a second."""
    settings = kafka_settings()
    sources = [open_source(msgspec.structs.replace(settings, member=name), "g") for name in "ab"]
    publish(broker_address, settings, [make_trace(seed, request_id=f"r{seed}") for seed in range(20)])
    seen: list[set[str]] = [set(), set()]
    done = threading.Event()

    def look_in(number: int) -> None:
        while not done.is_set():
            seen[number] |= traces_of(sources[number].poll(0.0)).keys()
            time.sleep(1.2)  # longer than it takes to join

    threads = [threading.Thread(target=look_in, args=[n]) for n in (0, 1)]
    for thread in threads:
        thread.start()
    eventually(lambda: [len(source.partitions) for source in sources] == [2, 2])
    eventually(lambda: seen[0] | seen[1] == {f"t{n}" for n in range(20)})
    done.set()
    for thread in threads:
        thread.join()


class Rank:
    """A trainer in little: what it has used and how far, in one place."""

    def __init__(self, address: str, settings: Kafka, name: str) -> None:
        self._address, self._settings = address, msgspec.structs.replace(settings, member=name)
        self.used: list[str] = []
        self.offsets: Offsets = {}
        self.partitions: set[str] = set()
        self.saves = 0

    def work(self, done: threading.Event) -> None:
        source = KafkaSource([self._address], self._settings, "trainer")

        def save() -> None:
            self.saves += 1
            source.commit(self.offsets)

        source.on_release(save)
        source.seek({})
        while not done.is_set():
            for delivery in source.poll(0.2, limit=3):
                assert isinstance(delivery.item, Trace)
                self.used.append(delivery.item.trace_id)
                self.offsets[delivery.partition] = delivery.offset + 1
            self.partitions = source.partitions
            time.sleep(0.02)
        source.close()


def eventually(condition: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("sought", "committed", "by_other", "first"),
    [
        (None, None, False, 0),
        (None, 7, False, 7),
        (5, None, False, 5),
        (5, 7, False, 5),  # a checkpoint set back on purpose
        (5, 7, True, 7),  # another one had it since
        (9, 7, True, 9),
    ],
)
def test_where_a_partition_begins(sought: int | None, committed: int | None, by_other: bool, first: int) -> None:
    assert first_offset(sought, committed, by_other=by_other) == first


def test_without_a_broker_it_says_so() -> None:
    with pytest.raises(StreamUnavailable, match=r"no broker at 127\.0\.0\.1:1"):
        KafkaSender(["127.0.0.1:1"], Kafka())
