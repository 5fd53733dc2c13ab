"""Real processes, killed without warning."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from livedraft.traces.frames import Frame
from livedraft.traces.reader import SpoolReader
from livedraft.traces.segments import segment_bases

#: Appends two-message records of random sizes for ever; says an offset only once append has returned it.
WRITER = """
import os, random, sys
from pathlib import Path
from livedraft.traces.spool import SpoolWriter

folder, life = Path(sys.argv[1]), int(sys.argv[2])
chance = random.Random(life)
with SpoolWriter(folder, fsync="always", segment_bytes=200_000) as spool:
    while True:
        first = spool.next_offset
        bodies = [os.urandom(chance.choice([10, 1000, 100_000])) for _ in range(2)]
        spool.append([b"%d %d " % (first + n, life) + body for n, body in enumerate(bodies)])
        os.write(1, b"%d\\n" % spool.next_offset)
"""

#: Commits growing offsets for ever.
COMMITTER = """
import sys
from itertools import count
from pathlib import Path
from livedraft.traces.groups import GroupOffsets

group = GroupOffsets(Path(sys.argv[1]), "g")
for offset in count(group.load().get("0", 0)):
    group.store({"0": offset})
    print(offset, flush=True)
"""


def kill_after(seconds: float, code: str, *arguments: str) -> list[int]:
    """Run ``code``, kill it that long after its first line; the numbers it printed in full."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        said = child.stdout.readline()
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read()
    assert child.returncode == -signal.SIGKILL
    return [int(line) for line in said.split(b"\n")[:-1]]


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    chance = random.Random(0)
    reader, got = SpoolReader(tmp_path), []
    acknowledged = 0
    for life in range(25):
        said = kill_after(chance.random() * 0.06, WRITER, str(tmp_path), str(life))
        assert said == sorted(said)
        acknowledged = max(acknowledged, said[-1])
        while record := reader.read():
            assert isinstance(record, Frame), record
            got.append(record)
        assert len(got) >= acknowledged
    assert [record.offset for record in got] == list(range(len(got)))
    for record in got:
        assert record.payload.startswith(b"%d " % record.offset)
    lives = [int(record.payload.split(b" ", 2)[1]) for record in got]
    assert lives == sorted(lives)
    assert len(segment_bases(tmp_path)) > 1
    # A reader that starts now sees the same.
    assert [r.payload for r in iter(SpoolReader(tmp_path).read, None) if isinstance(r, Frame)] == [
        record.payload for record in got
    ]


def test_a_reader_keeps_up_with_a_writer_in_another_process(tmp_path: Path) -> None:
    reader, got = SpoolReader(tmp_path), list[object]()
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), "0"], stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 60
        while len(got) < 400 and time.monotonic() < deadline:
            if record := reader.read():
                got.append(record.payload[:20] if isinstance(record, Frame) else record)
        child.kill()
    assert len(got) == 400
    for n, start in enumerate(got):
        assert isinstance(start, bytes), start
        assert start.startswith(b"%d " % n)
    assert len(segment_bases(tmp_path)) > 3
    assert reader.skipped == reader.rewound == 0


def test_a_killed_consumer_keeps_an_offset_it_committed_or_the_next(tmp_path: Path) -> None:
    chance, last = random.Random(0), 0
    for _ in range(8):
        said = kill_after(chance.random() * 0.05, COMMITTER, str(tmp_path))
        assert said[0] in (last, last + 1)
        last = said[-1]
    assert os.listdir(tmp_path / "groups")
