"""What Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from livedraft.contracts import metrics as names
from livedraft.traces.sink import SinkCounters
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as text_string_to_openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Serve, Served
from .fake_engine import FakeEngine

CHAT = "/v1/chat/completions"


def scrape(served: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(served.http.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_engines_counters_are_read_at_each_scrape(start: Serve, chat: dict[str, Any]) -> None:
    served = start()
    assert scrape(served)[names.OUTPUT_TOKENS + "_total", ()] == 0
    served.http.post(CHAT, json=chat | {"max_tokens": 30})
    samples = scrape(served)
    assert samples[names.OUTPUT_TOKENS + "_total", ()] == 30
    assert samples[names.VERIFY_ROUNDS + "_total", ()] == 10
    assert samples[names.ACCEPT_LENGTH, (("drafter", "7"),)] == 3
    assert (names.ACCEPT_LENGTH, (("drafter", "8"),)) not in samples, "no rounds, no accept length"
    assert samples[names.RUNNING, ()] == 0
    assert samples[names.WAITING, ()] == 2
    assert samples[names.TRACES_OFFERED + "_total", ()] == 5
    assert samples[names.TRACES_DROPPED + "_total", ()] == 1
    assert samples[names.DRAFTER_INFO + "_info", (("checksum", "c7"), ("version", "7"))] == 1


def test_what_became_of_the_traces_is_read_from_the_sink(start: Serve) -> None:
    seen = SinkCounters(
        offered=20,
        written=7,
        waiting=2,
        dropped={"full": 3, "broker": 1},
        written_bytes=700,
        waiting_bytes=200,
        in_flight_bytes=150,
        spilled=7,
        backfilled=4,
        lag=3,
        age_s=1.5,
    )
    served = start(stream=lambda: seen)
    samples = scrape(served)
    assert samples[names.STREAM_WRITTEN + "_total", ()] == 7
    assert samples[names.STREAM_WRITTEN_BYTES + "_total", ()] == 700
    assert samples[names.STREAM_DROPPED + "_total", (("reason", "full"),)] == 3
    assert samples[names.STREAM_DROPPED + "_total", (("reason", "broker"),)] == 1
    assert samples[names.STREAM_SPILLED + "_total", ()] == 7
    assert samples[names.STREAM_BACKFILLED + "_total", ()] == 4
    assert samples[names.STREAM_SPILL_LAG, ()] == 3
    assert samples[names.STREAM_WAITING_BYTES, ()] == 200
    assert samples[names.STREAM_IN_FLIGHT_BYTES, ()] == 150
    assert samples[names.STREAM_AGE_SECONDS, ()] == 1.5


def test_requests_are_counted_and_timed_by_route_and_status(start: Serve, chat: dict[str, Any]) -> None:
    served = start(FakeEngine(step_s=0.01))
    served.http.post(CHAT, json=chat)
    served.http.post(CHAT, json=chat | {"stream": True})
    served.http.post(CHAT, json={})
    served.http.get("/v1/models/one")
    served.http.get("/v1/models/two")
    for path in ("/a", "/b", "/c"):
        served.http.get(path)
    samples = scrape(served)

    def count(route: str, status: str) -> float:
        return samples[names.REQUESTS + "_total", (("route", route), ("status", status))]

    assert count(CHAT, "200") == 2
    assert count(CHAT, "400") == 1
    assert count("/v1/models/{model:path}", "404") == 2
    assert count("unmatched", "404") == 3
    assert samples[names.REQUEST_SECONDS + "_count", (("route", CHAT),)] == 3
    assert samples[names.FIRST_TOKEN_SECONDS + "_count", ()] == 2
    # 20 rounds of 10 ms each; the first token comes with the first of them
    first = samples[names.FIRST_TOKEN_SECONDS + "_sum", ()]
    whole = samples[names.REQUEST_SECONDS + "_sum", (("route", CHAT),)]
    assert whole > 0.3
    assert 0 < first < whole / 2


def test_a_bug_counts_as_500(start: Serve, chat: dict[str, Any]) -> None:
    served = start()
    served.engine.broken = ZeroDivisionError()
    served.http.post(CHAT, json=chat)
    samples = scrape(served)
    assert samples[names.REQUESTS + "_total", (("route", CHAT), ("status", "500"))] == 1
    assert not [name for name, _ in samples if name.startswith(names.OUTPUT_TOKENS)], "a dead engine has no numbers"


def test_openmetrics_on_request(shared: Served) -> None:
    answer = shared.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    parse: Callable[[str], Iterable[Metric]] = text_string_to_openmetrics_families
    assert names.OUTPUT_TOKENS in {family.name for family in parse(answer.text)}


def test_apps_do_not_share_a_registry(start: Serve, chat: dict[str, Any]) -> None:
    one, other = start(), start()
    one.http.post(CHAT, json=chat)
    key = (names.FIRST_TOKEN_SECONDS + "_count", ())
    assert (scrape(one)[key], scrape(other)[key]) == (1, 0)
