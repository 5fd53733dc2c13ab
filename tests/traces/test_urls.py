from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from livedraft.contracts.errors import SettingsError, StreamUnavailable
from livedraft.contracts.settings import Kafka, Traces
from livedraft.traces.urls import broker_addresses, open_sink, open_source, spool_folder


def test_a_url_names_an_absolute_or_a_relative_folder() -> None:
    assert spool_folder("spool:///a/b") == Path("/a/b")
    assert spool_folder("spool://a/b") == Path("a/b")


@pytest.mark.parametrize("url", ["kafka:host:9092", "/a/b", "spool:/a", "", "spools://a"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(url: str) -> None:
    with pytest.raises(SettingsError, match=r"traces\.url is .*expected one of spool://"):
        open_sink(Traces(url=url))
    with pytest.raises(SettingsError, match=r"traces\.url"):
        open_source(Traces(url=url), "g")


def test_a_url_without_a_folder_is_refused() -> None:
    with pytest.raises(SettingsError, match="folder"):
        spool_folder("spool://")


@pytest.mark.parametrize("url", ["", "host", "host:", ":1", "a:1,b", "a:1/topic"])
def test_a_broker_needs_a_host_and_a_port(url: str) -> None:
    with pytest.raises(SettingsError, match=r"traces\.url is .*expected kafka://host:port"):
        open_sink(Traces(url=f"kafka://{url}"))
    with pytest.raises(SettingsError, match="expected kafka://host:port"):
        open_source(Traces(url=f"kafka://{url}"), "g")


def test_brokers_are_listed_with_commas() -> None:
    assert broker_addresses("kafka://a:1,b.example:22") == ["a:1", "b.example:22"]


@pytest.mark.parametrize(
    ("kafka", "complaint"),
    [
        (Kafka(max_message_bytes=1 << 20), "kafka.max_message_bytes is 1048576, expected at least 4096 more than"),
        (Kafka(tls_ca="/nowhere.pem"), "kafka.tls_ca is '/nowhere.pem', expected a PEM file"),
        (Kafka(security="sasl_ssl"), "kafka.sasl_username is not set"),
        (Kafka(security="sasl_ssl", sasl_username="me"), "kafka.sasl_password_file is not set"),
        (
            Kafka(security="sasl_ssl", sasl_username="me", sasl_password_file="/nowhere"),
            "kafka.sasl_password_file /now",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_sent(kafka: Kafka, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        open_sink(Traces(url="kafka://127.0.0.1:1"), kafka=kafka)


def test_a_spill_that_cannot_be_used_does_not_keep_serving_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    open_sink(Traces(url="kafka://127.0.0.1:1"), kafka=Kafka(spill=str(tmp_path / "file"))).close(0.1)
    assert "kafka.spill cannot be used" in caplog.text


def test_a_source_says_when_there_is_no_broker() -> None:
    with pytest.raises(StreamUnavailable, match=r"no broker at 127\.0\.0\.1:1"):
        open_source(Traces(url="kafka://127.0.0.1:1"), "g")


def test_what_goes_into_a_sink_comes_out_of_a_source(tmp_path: Path, make_trace: Any) -> None:
    settings = Traces(url=f"spool://{tmp_path}/deep/spool", fsync="always", message_bytes=2048)
    source = open_source(settings, "trainer")
    sink = open_sink(settings)
    sink.offer(make_trace(1, rounds=30))
    sink.close()
    assert [item.item for item in source.poll(timeout=10)] == [make_trace(1, rounds=30)]
