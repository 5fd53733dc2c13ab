"""Settings as a client and a broker take them, without either."""

from __future__ import annotations

import pytest
from livedraft.contracts.errors import SettingsError, TraceError
from livedraft.contracts.settings import Kafka
from livedraft.traces.kafka_settings import connecting, consuming, partition_name, partition_of, producing, topics


def test_a_partition_is_called_after_its_topic_and_back() -> None:
    assert partition_of(partition_name("a/b.traces", 7)) == ("a/b.traces", 7)
    for name in ("0", "traces/", "traces/x", "/"):
        with pytest.raises(TraceError, match="expected topic/number"):
            partition_of(name)


def test_traces_are_bounded_and_what_was_decided_is_kept() -> None:
    specs = topics(Kafka(prefix="p", partitions=3, replication=2, retention_hours=0.5, retention_bytes=9))
    assert {name: spec["num_partitions"] for name, spec in specs.items()} == {
        "p.traces": 3,
        "p.dead": 1,
        "p.drafts": 1,
        "p.swaps": 1,
    }
    assert {spec["replication_factor"] for spec in specs.values()} == {2}
    assert specs["p.traces"]["configs"]["retention.ms"] == "1800000"
    assert specs["p.traces"]["configs"]["retention.bytes"] == "9"
    assert specs["p.swaps"]["configs"]["retention.ms"] == "-1"
    assert "retention.bytes" not in specs["p.swaps"]["configs"]


@pytest.mark.parametrize("seconds", [0.05, 1.0, 30.0, 600.0])
def test_one_request_ends_before_its_messages_are_given_up(seconds: float) -> None:
    """As kafka-python demands: linger + request <= delivery, where that leaves a request any time at all."""
    options = producing(Kafka(delivery_timeout_s=seconds, linger_ms=5))
    assert options["request_timeout_ms"] <= max(100, options["delivery_timeout_ms"] - options["linger_ms"])
    assert options["request_timeout_ms"] <= 30_000
    assert options["max_in_flight_requests_per_connection"] == 1, "a retry would change the order"
    assert options["enable_idempotence"] is False


def test_whatever_may_be_sent_can_be_fetched() -> None:
    settings = Kafka(max_message_bytes=9 << 20)
    assert consuming(settings)["max_partition_fetch_bytes"] >= producing(settings)["max_request_size"]


def test_a_password_is_asked_for_where_it_is_needed() -> None:
    assert "sasl_plain_password" not in connecting(["a:1"], Kafka())
    with pytest.raises(SettingsError, match="sasl_username"):
        connecting(["a:1"], Kafka(security="sasl_ssl"))
    with pytest.raises(SettingsError, match="sasl_password_file"):
        connecting(["a:1"], Kafka(security="sasl_ssl", sasl_username="me"))
    options = connecting(["a:1"], Kafka(security="sasl_ssl", sasl_username="me", sasl_password="x"))
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("me", "x")
