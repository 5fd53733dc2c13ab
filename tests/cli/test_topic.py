"""The commands on a topic."""

from __future__ import annotations

import contextlib
import json
import uuid
from pathlib import Path

import msgspec
import pytest
from livedraft.contracts.messages import Trace
from livedraft.traces.codec import encode
from livedraft.traces.kafka_reader import TopicReader
from livedraft.traces.urls import broker_addresses, open_sink
from typer.testing import CliRunner

from ..traces.conftest import build_trace
from .conftest import Site, app
from .test_traces import records


@pytest.fixture
def url(broker_address: str) -> str:
    return f"kafka://{broker_address}"


@pytest.fixture
def topic(site: Site, url: str) -> Site:
    """A site on a topic of two partitions that holds t0 to t11, ended one after the other; some cut into chunks."""
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    site.config.write_text(
        site.config.read_text().replace(f'url = "spool://{site.spool}"', f'url = "{url}"\nmessage_bytes = 2048')
        + f'\n[kafka]\nprefix = "{prefix}"\npartitions = 2\nsession_timeout_s = 2.0\n'
    )
    settings = site.settings
    sink = open_sink(settings.traces, kafka=settings.kafka)
    for n in range(12):
        sink.offer(msgspec.structs.replace(build_trace(n, rounds=1 + 10 * (n % 3)), finished_at=100.0 + n))
    sink.close(20)
    assert sink.counters().written == 12
    return site


def test_tail_shows_the_last_of_all_partitions_in_time(topic: Site) -> None:
    lines = [json.loads(line) for line in topic.run("traces", "tail", "-n", "5", "--json").stdout.splitlines()]
    assert [line["finished_at"] for line in lines] == [107.0, 108.0, 109.0, 110.0, 111.0]
    assert {line["partition"].rpartition("/")[2] for line in lines} <= {"0", "1"}
    assert "/" in topic.run("traces", "tail", "-n", "1").stdout.splitlines()[1].split()[0]


def test_stats_add_all_partitions_up(topic: Site) -> None:
    found = topic.json("traces", "stats")
    assert (found["traces"], found["dead_letters"], found["duplicates"]) == (12, 0, 0)


def test_decode_finds_a_trace_by_partition_and_offset(topic: Site) -> None:
    lines = [json.loads(line) for line in topic.run("traces", "tail", "--json").stdout.splitlines()]
    for line in lines[:3]:
        where = ("--offset", str(line["offset"]), "--partition", line["partition"].rpartition("/")[2])
        found = json.loads(topic.run("traces", "decode", *where).stdout)
        assert (found["offset"], found["partition"]) == (line["offset"], line["partition"])
        assert found["trace"]["finished_at"] == line["finished_at"]
    assert json.loads(topic.run("traces", "decode").stdout)["trace"]["trace_id"] == "t11"


def test_an_offset_needs_a_partition(topic: Site) -> None:
    refused = topic.run("traces", "decode", "--offset", "0")
    assert refused.exit_code == 1
    assert "--partition: offsets count within one of 2 partitions" in refused.output
    assert "has no partition 7" in topic.run("traces", "stats", "--partition", "7").output


def test_a_topic_that_nobody_wrote_to_holds_nothing(site: Site, url: str) -> None:
    site.config.write_text(f'[traces]\nurl = "{url}"\n[kafka]\nprefix = "nobody"\n')
    refused = site.run("traces", "stats")
    assert refused.exit_code == 1
    assert "no traces there" in refused.output


def test_replay_goes_from_a_topic_to_a_spool_and_into_another_topic(topic: Site, url: str, tmp_path: Path) -> None:
    spool = f"spool://{tmp_path}/copy"
    assert topic.run("traces", "replay", "--into", spool).exit_code == 0
    copied = set(records(tmp_path / "copy"))
    settings = topic.settings
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    back = Site(tmp_path)
    back.config.write_text(
        f'[traces]\nurl = "{spool}"\n[kafka]\nprefix = "{prefix}"\npartitions = 1\nsession_timeout_s = 2.0\n'
    )
    result = back.run("traces", "replay", "--into", url)
    assert result.exit_code == 0
    assert "not" not in result.stdout
    with contextlib.closing(TopicReader(broker_addresses(url), back.settings.kafka)) as reader:
        sent = [message for _, message in reader.messages(f"{prefix}.traces/0", 0)]
    assert set(sent) == copied
    assert len(sent) == len(copied)
    with contextlib.closing(TopicReader(broker_addresses(url), settings.kafka)) as reader:
        start = {f"{settings.kafka.prefix}.traces/{n}": 0 for n in (0, 1)}
        ids = {d.item.trace_id for d in reader.read(start) if isinstance(d.item, Trace)}
    assert ids == {f"t{n}" for n in range(12)}


def test_replay_of_a_topic_into_itself_is_refused(topic: Site, url: str) -> None:
    assert topic.run("traces", "replay", "--into", url).exit_code == 1


def test_status_tells_how_far_behind_the_groups_are(topic: Site) -> None:
    traces = json.loads(topic.run("status", "--json").stdout)["traces"]
    total = sum(bounds["end"] - bounds["oldest"] for bounds in traces["partitions"].values())
    # Not equal: this broker counts the last batch of a partition as one.
    assert 0 < traces["lag"]["trainer"] <= total
    assert 0 < traces["lag"]["controller"] <= total


def test_decode_reads_a_message_from_standard_input() -> None:
    trace = build_trace(3)
    done = CliRunner().invoke(app, ["traces", "decode", "-"], input=encode(trace), catch_exceptions=False)
    assert json.loads(done.stdout)["trace"]["trace_id"] == "t3"
    assert CliRunner().invoke(app, ["traces", "decode", "-"], input=b"nonsense").exit_code == 1
