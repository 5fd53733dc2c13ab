from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.settings import Traces
from livedraft.traces.urls import open_sink, open_source, spool_folder


def test_a_url_names_an_absolute_or_a_relative_folder() -> None:
    assert spool_folder("spool:///a/b") == Path("/a/b")
    assert spool_folder("spool://a/b") == Path("a/b")


@pytest.mark.parametrize("url", ["kafka://host:9092", "/a/b", "spool:/a", "", "spools://a"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(url: str) -> None:
    with pytest.raises(SettingsError, match=r"traces\.url is .*expected one of spool://"):
        open_sink(Traces(url=url))
    with pytest.raises(SettingsError, match=r"traces\.url"):
        open_source(Traces(url=url), "g")


def test_a_url_without_a_folder_is_refused() -> None:
    with pytest.raises(SettingsError, match="folder"):
        spool_folder("spool://")


def test_what_goes_into_a_sink_comes_out_of_a_source(tmp_path: Path, make_trace: Any) -> None:
    settings = Traces(url=f"spool://{tmp_path}/deep/spool", fsync="always", message_bytes=2048)
    source = open_source(settings, "trainer")
    sink = open_sink(settings)
    sink.offer(make_trace(1, rounds=30))
    sink.close()
    assert [item.item for item in source.poll(timeout=10)] == [make_trace(1, rounds=30)]
