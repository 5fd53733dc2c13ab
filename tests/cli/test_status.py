from __future__ import annotations

import json
import signal
import time

import msgspec
import pytest
from livedraft.contracts.messages import Decision
from livedraft.swap.journal import Journal
from livedraft.traces.spool import SpoolWriter
from livedraft.traces.urls import open_source
from livedraft.trainer.loop import Progress

from .conftest import Site


@pytest.fixture
def busy(site: Site) -> Site:
    """A site where everything has happened once."""
    site.publish(1)
    site.publish(2, parent="1")
    site.registry.point("live", "2")
    site.registry.point("previous", "1")
    with SpoolWriter(site.spool) as spool:
        spool.append([b"record"] * 5)
    source = open_source(site.settings.traces, "trainer")
    source.commit({"0": 3})
    source.close()
    progress = Progress(
        steps=70,
        tokens=5000,
        loss=1.25,
        accept_length=2.5,
        tokens_per_s=321.0,
        offsets={"0": 3},
        counts={"trained": 3},
        lag=2,
        published="2",
        at=time.time() - 5,
    )
    (site.folder / "trainer").mkdir()
    (site.folder / "trainer" / "progress.json").write_bytes(msgspec.json.encode(progress))
    journal = Journal(site.folder / "swap")
    evidence = {
        "predicted_accept_length": 2.5,
        "previous_accept_length": 2.0,
        "tokens_at_swap": 0.0,
        "rounds_at_swap": 0.0,
    }
    journal.append(Decision(action="promote", reason="better", candidate="2", live="1", evidence=evidence, at=9.0))
    return site


def test_every_part_says_how_it_is(busy: Site) -> None:
    with busy.serving(2, "2") as engine:
        engine.serve(100, 2.25)
        found = busy.json("status")
        text = busy.run("status").stdout
    assert found["gateway"]["ready"] is True
    assert found["engine"]["drafter"] == "2"
    assert found["engine"]["accept_length"] == {"2": 2.25}
    assert (found["trainer"]["steps"], found["trainer"]["published"], found["trainer"]["lag"]) == (70, "2", 2)
    assert (found["traces"]["end"], found["traces"]["lag"]) == (5, {"trainer": 2})
    assert found["registry"]["aliases"] == {"live": "2", "previous": "1", "candidate": None}
    assert found["swap"]["decisions"][0]["reason"] == "better"
    assert found["swap"]["watch"]["candidate"] == "2"
    for words in (
        "2.25 with 2",
        "70 steps, 5000 tokens, 321 tokens/s; loss 1.250, accept length 2.50",
        "5 records (from 0 on)",
        "trainer 2",
        "live: 2, previous: 1, candidate: none",
        "promote 2: better",
        "watching version 2, predicted accept length 2.50",
    ):
        assert words in text


def test_parts_that_do_not_answer_leave_the_others_alone(busy: Site) -> None:
    (busy.folder / "trainer" / "progress.json").write_bytes(b"{torn")
    result = busy.run("status", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1, "serving does not answer"
    assert "127.0.0.1:1" in found["gateway"]["error"]
    assert "127.0.0.1:1" in found["engine"]["error"]
    assert "malformed" in found["trainer"]["error"]
    assert found["traces"]["end"] == 5
    assert found["registry"]["aliases"]["live"] == "2"
    assert "127.0.0.1:1 is not ready" in busy.run("status").stdout


def test_an_engine_that_does_not_answer_is_not_ready(busy: Site) -> None:
    with busy.serving(2, "2") as engine:
        engine.broken = True
        result = busy.run("status", "--json")
    assert result.exit_code == 1
    assert "503" in json.loads(result.stdout)["gateway"]["error"]


def test_before_the_first_start_it_says_so_and_makes_no_folder(site: Site) -> None:
    result = site.run("status", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert "has not run here" in found["trainer"]["error"]
    assert "has not run here" in found["swap"]["error"]
    assert found["traces"]["end"] == 0
    assert [path.name for path in site.folder.iterdir()] == [site.config.name]


def test_watch_looks_again_until_ctrl_c(busy: Site) -> None:
    with busy.serving(2, "2"):
        watch = busy.start("status", "--watch", "--every", "0.1", "--json")
        assert watch.stdout is not None
        looks = [json.loads(watch.stdout.readline()) for _ in range(3)]
        watch.send_signal(signal.SIGINT)
        watch.communicate(timeout=30)
    assert all(look["gateway"]["ready"] for look in looks)
    assert watch.returncode == 0
