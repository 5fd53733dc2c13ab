from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

import msgspec
import pytest
from livedraft.cli.republish import trace_start
from livedraft.cli.trace_line import Spelling
from livedraft.contracts.messages import Trace
from livedraft.traces.arrays import from_numpy
from livedraft.traces.chunks import split
from livedraft.traces.codec import encode
from livedraft.traces.frames import Frame
from livedraft.traces.reader import SpoolReader
from livedraft.traces.segments import segment_path
from livedraft.traces.spool import SpoolWriter

from ..traces.conftest import build_trace
from .conftest import Site


def write(folder: Path, *traces: Trace, message_bytes: int = 1 << 20, times: int = 1) -> list[int]:
    """Append traces to a spool, ``times`` over; the offset of each one's last record."""
    records = [split(encode(t), key=t.request_id, trace_id=t.trace_id, message_bytes=message_bytes) for t in traces]
    with SpoolWriter(folder, fsync="never") as spool:
        return [spool.append(messages) for messages in records * times]


def records(folder: Path) -> list[bytes]:
    """Every readable record of a spool."""
    found = []
    with contextlib.closing(SpoolReader(folder)) as reader:
        while record := reader.read():
            if isinstance(record, Frame):
                found.append(record.payload)
    return found


def damage(folder: Path, byte: int) -> None:
    """Flip the bits of one byte of the first segment."""
    path = segment_path(folder, 0)
    content = bytearray(path.read_bytes())
    content[byte] ^= 0xFF
    path.write_bytes(content)


def test_tail_shows_the_last_traces_oldest_first(site: Site) -> None:
    write(site.spool, *(build_trace(n, domain=f"d{n}") for n in range(20)))
    assert [json.loads(line)["offset"] for line in site.run("traces", "tail", "--json").stdout.splitlines()] == [
        *range(10, 20)
    ]
    lines = site.run("traces", "tail", "-n", "2").stdout.splitlines()
    assert lines[0].split()[0] == "offset"
    assert [line.split()[0] for line in lines[1:]] == ["18", "19"]


def test_a_line_says_what_the_trace_did(site: Site) -> None:
    trace = build_trace(3, domain="code\x1b[2J", tenant="acme")
    write(site.spool, trace)
    line = json.loads(site.run("traces", "tail", "--json").stdout)
    assert line == {
        "offset": 0,
        "finished_at": 2.5,
        "domain": "code\x1b[2J",
        "tenant": "acme",
        "prompt_tokens": trace.prompt.shape[0],
        "output_tokens": trace.output.shape[0],
        "rounds": 4,
        "accept_length": trace.output.shape[0] / 4,
        "drafters": ["7", "8"],
        "temperature": 0.7,
        "text": None,
    }
    shown = site.run("traces", "tail").stdout
    assert "code·[2J" in shown
    assert "\x1b" not in shown


def test_the_output_is_spelled_with_the_targets_tokenizer(site: Site) -> None:
    tokenizer_hash = Spelling("bundled")._hash
    from tokenizers import Tokenizer

    bundled = Tokenizer.from_file(str(Path(__file__).parents[2] / "models" / "tiny" / "tokenizer.json"))
    words = bundled.encode("In the beginning\nthere was").ids
    ours = msgspec.structs.replace(
        build_trace(0, rounds=0), output=from_numpy(words, "i4"), tokenizer_hash=tokenizer_hash
    )
    write(site.spool, ours, build_trace(1))
    lines = site.run("traces", "tail", "--json").stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["In the beginning\nthere was", None]
    assert "In the beginning⏎there was" in site.run("traces", "tail").stdout


def test_tail_from_an_offset_starts_there_even_inside_a_trace_cut_into_chunks(site: Site) -> None:
    ends = write(site.spool, *(build_trace(n, rounds=40) for n in range(3)), message_bytes=1500)
    assert ends[0] > 1, "the traces must be cut for this test to mean something"
    shown = site.run("traces", "tail", "--json", "--from", str(ends[1])).stdout.splitlines()
    assert [json.loads(line)["offset"] for line in shown] == ends[1:]
    shown = site.run("traces", "tail", "--json", "--from", str(ends[0] + 2), "-n", "1").stdout.splitlines()
    assert [json.loads(line)["offset"] for line in shown] == [ends[1]]
    assert site.json("traces", "stats", "--from", str(ends[1]))["traces"] == 2
    shown = site.run("traces", "tail", "--json", "-n", "2").stdout.splitlines()
    assert [json.loads(line)["offset"] for line in shown] == ends[1:]


def test_a_trace_starts_at_its_first_chunk(tmp_path: Path) -> None:
    ends = write(tmp_path, build_trace(0), build_trace(1, rounds=40), message_bytes=4000)
    assert ends[0] == 0
    assert [trace_start(tmp_path, offset) for offset in range(ends[1] + 2)] == [0, *[1] * ends[1], ends[1] + 1]


def test_follow_shows_what_comes_and_ends_with_ctrl_c(site: Site) -> None:
    write(site.spool, build_trace(0))
    tail = site.start("traces", "tail", "-f", "--json")
    assert tail.stdout is not None
    assert json.loads(tail.stdout.readline())["offset"] == 0
    write(site.spool, build_trace(1))
    assert json.loads(tail.stdout.readline())["offset"] == 1
    tail.send_signal(signal.SIGINT)
    rest, errors = tail.communicate(timeout=30)
    assert (rest, errors, tail.returncode) == ("", "", 0)


def test_damage_is_shown_where_it_is(site: Site) -> None:
    write(site.spool, build_trace(0), build_trace(1), build_trace(2))
    with SpoolWriter(site.spool) as spool:
        spool.append([b"LDTRnonsense"])
    damage(site.spool, 200)
    lines = [json.loads(line) for line in site.run("traces", "tail", "--json").stdout.splitlines()]
    assert [line["offset"] for line in lines] == [0, 1, 2, 3]
    assert "damaged" in lines[0]["dead_letter"]
    assert "schema" in lines[3]["dead_letter"]
    assert "dead letter: records 0 to 0 are damaged" in site.run("traces", "tail").stdout
    assert site.json("traces", "stats")["dead_letters"] == 2


def test_stats_add_up_a_range(site: Site) -> None:
    traces = [build_trace(n, domain="code" if n % 2 else "prose") for n in range(6)]
    write(site.spool, *traces)
    found = site.json("traces", "stats")
    assert (found["traces"], found["dead_letters"], found["overall"]["rounds"]) == (6, 0, 24)
    assert found["overall"]["tokens"] == sum(t.output.shape[0] for t in traces)
    assert found["overall"]["accept_length"] == found["overall"]["tokens"] / 24
    assert set(found["by_domain"]) == {"code", "prose"}
    assert set(found["by_drafter"]) == {"7", "8"}
    assert found["acceptance"][0]["rate"] == found["acceptance"][0]["accepted"] / found["acceptance"][0]["tried"]
    assert site.json("traces", "stats", "--from", "2", "--to", "3")["traces"] == 2
    text = site.run("traces", "stats").stdout
    for word in ("prose", "code", "accept length", "depth", "0 dead letters"):
        assert word in text


@pytest.mark.parametrize("command", [["tail"], ["stats"], ["decode"], ["replay", "--into", "spool:///nowhere"]])
def test_a_stream_without_traces_is_an_error_that_names_it(site: Site, command: list[str]) -> None:
    result = site.run("traces", *command)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f"spool://{site.spool}: no traces there" in result.stderr


def test_offsets_that_are_not_there_are_an_error_that_names_those_that_are(site: Site) -> None:
    write(site.spool, build_trace(0), build_trace(1))
    for command in (["tail", "--from", "7"], ["stats", "--from", "7"], ["decode", "--offset", "7"]):
        result = site.run("traces", *command)
        assert result.exit_code == 1
        assert "the stream holds 0 to 1" in result.stderr


def test_decode_prints_a_trace(site: Site) -> None:
    traces = [build_trace(n, rounds=40) for n in range(3)]
    ends = write(site.spool, *traces, message_bytes=1500)
    newest = json.loads(site.run("traces", "decode").stdout)
    assert (newest["offset"], newest["trace"]["trace_id"]) == (ends[2], "t2")
    assert newest["trace"]["prompt"].startswith("i4[")
    whole = json.loads(site.run("traces", "decode", "--offset", str(ends[1]), "--whole").stdout)
    assert (whole["offset"], whole["trace"]["trace_id"]) == (ends[1], "t1")
    assert len(whole["trace"]["output"]) == traces[1].output.shape[0]


def test_decode_of_a_dead_letter_says_why(site: Site) -> None:
    with SpoolWriter(site.spool) as spool:
        spool.append([b"hello"])
    result = site.run("traces", "decode")
    assert result.exit_code == 1
    assert "offset 0: starts with b'hell'" in result.stderr


def test_replay_copies_every_byte(site: Site, tmp_path: Path) -> None:
    write(site.spool, *(build_trace(n, rounds=40) for n in range(5)), message_bytes=1500)
    with SpoolWriter(site.spool) as spool:
        spool.append([b"not a trace, but a record all the same"])
    into = tmp_path / "again"
    result = site.run("traces", "replay", "--into", f"spool://{into}")
    assert result.exit_code == 0
    copied = records(into)
    assert copied == records(site.spool)
    assert f"{len(copied)} records into spool://{into}\n" == result.stdout


def test_replay_of_a_range_takes_the_whole_trace_that_an_offset_is_part_of(site: Site, tmp_path: Path) -> None:
    ends = write(site.spool, *(build_trace(n, rounds=40) for n in range(5)), message_bytes=1500)
    into = tmp_path / "again"
    site.run("traces", "replay", "--into", f"spool://{into}", "--from", str(ends[1]), "--to", str(ends[2]))
    assert records(into) == records(site.spool)[ends[0] + 1 : ends[2] + 1]


def test_replay_says_what_damage_it_left_out(site: Site, tmp_path: Path) -> None:
    write(site.spool, build_trace(0), build_trace(1), build_trace(2))
    damage(site.spool, 200)
    result = site.run("traces", "replay", "--into", f"spool://{tmp_path}/again")
    assert result.stdout.startswith("2 records into")
    assert "1 could not be read" in result.stdout
    assert len(records(tmp_path / "again")) == 2


def test_replay_into_the_stream_itself_is_refused(site: Site) -> None:
    write(site.spool, build_trace(0))
    result = site.run("traces", "replay", "--into", f"spool://{site.folder}/./spool")
    assert result.exit_code == 1
    assert "--into" in result.stderr
    assert len(records(site.spool)) == 1


def test_replay_into_a_stream_that_another_process_writes_is_refused(site: Site, tmp_path: Path) -> None:
    write(site.spool, build_trace(0))
    with SpoolWriter(tmp_path / "busy"):
        result = site.run("traces", "replay", "--into", f"spool://{tmp_path}/busy")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "already writes" in result.stderr


def test_replay_stops_between_two_traces_and_says_where_to_go_on(site: Site, tmp_path: Path) -> None:
    ends = write(site.spool, *(build_trace(n) for n in range(3)), message_bytes=1024, times=1000)
    into = tmp_path / "again"
    # A sync for each trace, so that it takes long enough to be caught at it.
    process = site.start("traces", "replay", "--into", f"spool://{into}", LIVEDRAFT_TRACES__FSYNC="always")
    while process.poll() is None and not list(into.glob("*.seg")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    on = int(said.rpartition("--from ")[2])
    assert on - 1 in ends
    assert records(into) == records(site.spool)[:on]
    again = site.run("traces", "replay", "--into", f"spool://{into}", "--from", str(on))
    assert again.exit_code == 0
    assert records(into) == records(site.spool)
