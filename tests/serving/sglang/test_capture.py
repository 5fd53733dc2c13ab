from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from livedraft.contracts.messages import Features, Trace
from livedraft.contracts.settings import Settings, Traces
from livedraft.serving.sglang.capture import Capture
from livedraft.serving.sglang.identity import Drafting, Identity
from livedraft.traces.arrays import feature_values, to_float32, to_numpy
from livedraft.traces.validation import validate

from .scheduler import Finish, Req, Scheduler

IDENTITY = Identity("sglang", "tiny", "revision", "hash", 1024, leads=True)
URL = "relay+tcp://127.0.0.1:1"


class Sink:
    """Keeps what it takes."""

    def __init__(self) -> None:
        self.traces: dict[str, Trace] = {}
        self.dropped = 0
        self.broken = False

    def offer(self, trace: Trace) -> bool:
        if self.broken:
            raise OSError("no such sink")
        validate(trace)
        self.traces[trace.request_id] = trace
        return True

    def close(self, timeout: float = 5.0) -> None:
        pass


class Bench:
    """A capture, the scheduler it looks at and the sink it fills."""

    def __init__(self, **traces: object) -> None:
        self.sink = Sink()
        self.drafting = Drafting("v1")
        settings = Settings(traces=msgspec.structs.replace(Traces(url=URL), **traces))
        self.capture = Capture(settings, self.drafting, sink=lambda _: self.sink)
        self.scheduler = Scheduler(self.capture)

    def start(self) -> None:
        self.capture.start(IDENTITY)

    def traces(self) -> dict[str, Trace]:
        """All that were made."""
        self.capture.close()
        return self.sink.traces


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.start()
    yield bench
    bench.capture.close()
    assert bench.capture.feature.on
    assert bench.capture.counting.on


def positions(trace: Trace) -> list[int]:
    """Positions of the features, told by the tokens that they were computed from."""
    assert trace.features.values is not None
    tokens = [*to_numpy(trace.prompt), *to_numpy(trace.output)]
    values = to_float32(trace.features.values)[:, 0].tolist()
    assert values == tokens[trace.features.start : trace.features.start + len(values)]
    return [*range(trace.features.start, trace.features.start + len(values))]


def test_a_request_from_prefill_to_its_limit(bench: Bench) -> None:
    req = Req("a", [5, 6, 7], limit=5, tenant="acme", domain="verse")
    bench.scheduler.prefill(req)
    bench.scheduler.verify(req, accept=0)
    bench.drafting.version = "v2"
    bench.scheduler.verify(req, accept=2)
    trace = bench.traces()["a"]
    assert to_numpy(trace.output).tolist() == [8, 9, 10, 11, 12]
    assert (trace.tenant, trace.domain, trace.finish_reason, trace.drafters) == (
        "acme",
        "verse",
        "length",
        ("v1", "v2"),
    )
    assert (trace.sampling.temperature, trace.sampling.top_k, trace.top_temperature) == (0.0, 0, 1.0)
    assert to_numpy(trace.rounds.root).tolist() == [2, 3, 4]
    assert to_numpy(trace.rounds.size).tolist() == [0, 2, 2]
    assert to_numpy(trace.rounds.drafter).tolist() == [0, 0, 1]
    assert to_numpy(trace.rounds.tokens).tolist() == [0, 0, 10, 11]
    assert to_numpy(trace.rounds.parents).tolist() == [-1, 0, -1, 0]
    assert to_numpy(trace.rounds.accepted).tolist() == [0, 0, 1, 1]
    assert to_numpy(trace.rounds.bonus).tolist() == [8, 9, 12]
    # After token t comes t + 1, also below what was rejected (token 0).
    assert to_numpy(trace.rounds.top_ids)[:, 0].tolist() == [8, 9, 1, 1, 10, 11, 12]
    mass = np.exp(to_float32(trace.rounds.top_logprobs)).sum(1) + to_float32(trace.rounds.tail)
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    assert to_float32(trace.rounds.logprobs).tolist() == [-0.25] * 4
    assert positions(trace) == [*range(7)]
    assert trace.features.layers == (0, 1, 2)


def test_a_cached_prefix_leaves_its_features_out(bench: Bench) -> None:
    req = Req("a", [5, 6, 7], limit=2)
    bench.scheduler.prefill(req, cached=2)
    bench.scheduler.verify(req)
    assert positions(bench.traces()["a"]) == [2, 3]


def test_features_that_are_computed_again_are_never_copied() -> None:
    bench = Bench(features="recompute")
    bench.start()
    req = Req("a", [5, 6, 7], limit=5)
    bench.scheduler.prefill(req, cached=1)
    bench.scheduler.verify(req, accept=0)
    bench.scheduler.verify(req, accept=2)
    trace = bench.traces()["a"]
    assert trace.features == Features(mode="recompute", layers=(0, 1, 2))
    assert to_numpy(trace.output).tolist() == [8, 9, 10, 11, 12]
    assert to_numpy(trace.rounds.top_ids)[:, 0].tolist() == [8, 9, 1, 1, 10, 11, 12]


def test_features_may_go_in_8_bits(bench: Bench) -> None:
    eight = Bench(feature_dtype="fp8")
    eight.start()
    for each in (bench, eight):
        req = Req("a", [5, 6, 7], limit=4)
        each.scheduler.prefill(req, cached=1)
        each.scheduler.verify(req, accept=2)
    wide, narrow = bench.traces()["a"].features, eight.traces()["a"].features
    assert narrow.values is not None
    assert (narrow.values.dtype, narrow.start, narrow.layers) == ("e4m3", 1, wide.layers)
    np.testing.assert_allclose(feature_values(narrow), feature_values(wide), rtol=1 / 16)


def test_chunks_and_a_retraction_take_each_position_once(bench: Bench) -> None:
    req = Req("a", [5, 6, 7, 8], limit=6)
    bench.scheduler.prefill(req, upto=2)
    req.extend_batch_idx += 1
    bench.scheduler.prefill(req, cached=2)
    launched = bench.scheduler.launch(req)
    req.is_retracted, req.retracted_stain, req.extend_batch_idx = True, True, 1
    bench.scheduler.commit(launched)  # of nobody: overlapping scheduling had launched it before
    req.is_retracted = False
    bench.scheduler.prefill(req, cached=1)
    bench.scheduler.verify(req, accept=2)
    bench.scheduler.verify(req)
    trace = bench.traces()["a"]
    assert to_numpy(trace.rounds.root).tolist() == [3, 4, 5, 8]
    assert to_numpy(trace.rounds.size).tolist() == [0, 0, 2, 2]
    assert positions(trace) == [*range(9)]


def test_only_what_may_be_is_recorded() -> None:
    bench = Bench(opted_out=("discreet",))
    early = Req("early", [1], limit=3)
    bench.scheduler.prefill(early)
    bench.start()
    asked = [
        Req("discreet", [1], limit=3, tenant="discreet"),
        Req("untraced", [1], limit=3, traced=False),
        Req("odd", [1], limit=3, traced="yes", tenant=7),
        Req("picture", [1], limit=3),
        Req("kept", [1], limit=3, tenant=7),
    ]
    asked[3].multimodal_inputs = object()  # type: ignore[assignment]
    bench.scheduler.prefill(*asked)
    bench.scheduler.verify(early, *asked)
    assert bench.traces().keys() == {"kept"}
    assert bench.traces()["kept"].tenant == "default"
    assert (bench.capture.traces_offered, bench.capture.traces_dropped) == (1, 0)
    # Counted are all.
    assert (bench.capture.output_tokens, bench.capture.rounds) == (18, 6)


def test_nobody_is_recorded_by_a_rank_that_does_not_lead() -> None:
    bench = Bench()
    bench.capture.start(dataclasses.replace(IDENTITY, leads=False))
    req = Req("a", [1], limit=3)
    bench.scheduler.prefill(req)
    bench.scheduler.verify(req)
    assert not bench.traces()
    assert bench.capture.feature.on


def test_a_request_whose_round_was_missed_is_not_sent(bench: Bench) -> None:
    torn, whole = Req("torn", [1], limit=4), Req("whole", [1], limit=4)
    bench.scheduler.prefill(torn, whole)
    bench.scheduler.verify(torn, miss=True)
    bench.scheduler.verify(whole)
    bench.scheduler.verify(torn, whole)
    assert bench.traces().keys() == {"whole"}
    assert bench.capture.lost == {"torn": 1}
    assert (bench.capture.traces_offered, bench.capture.traces_dropped) == (2, 1)


def test_the_youngest_is_given_up_where_room_lacks() -> None:
    bench = Bench(buffer_bytes=7000)
    bench.start()
    old, young = Req("old", [1], limit=8), Req("young", [1], limit=8)
    bench.scheduler.prefill(old)
    bench.scheduler.prefill(young)
    for _ in range(4):
        bench.scheduler.verify(old, young)
    assert bench.traces().keys() == {"old"}
    assert bench.capture.lost == {"full": 1}
    assert bench.capture.waiting_bytes == 0


def test_requests_that_end_in_the_queue(bench: Bench) -> None:
    begun, fresh = Req("begun", [1, 2]), Req("fresh", [1, 2])
    bench.scheduler.prefill(begun)
    bench.scheduler.verify(begun)
    bench.scheduler.prefill(fresh, upto=1)
    bench.scheduler.abort(begun)
    bench.scheduler.abort(fresh)
    bench.scheduler.abort(Req("unknown", [1]))
    assert {name: t.finish_reason for name, t in bench.traces().items()} == {"begun": "cancelled"}
    assert bench.capture.traces_offered == 1


@pytest.mark.parametrize(
    ("finish", "reason"),
    [(Finish("abort"), "cancelled"), (Finish("abort", 503), "error"), (Finish("stop"), "stop")],
)
def test_finish_reasons(bench: Bench, finish: Finish, reason: str) -> None:
    req = Req("a", [1])
    bench.scheduler.prefill(req)
    req.ends = finish
    bench.scheduler.verify(req)
    assert bench.traces()["a"].finish_reason == reason


def test_a_failure_of_ours_ends_capture_and_nothing_else(bench: Bench) -> None:
    req = Req("a", [1], limit=3)
    bench.scheduler.prefill(req)
    bench.scheduler.worker.target_worker = None
    bench.scheduler.verify(req)
    assert req.output_ids == [2, 3, 4]
    assert "AttributeError" in (bench.capture.feature.reason or "")
    assert (bench.capture.output_tokens, bench.capture.rounds) == (3, 1)
    bench.capture.feature.reason = None  # for the fixture's sake


def test_counts_of_rounds_drafted_to_the_full(bench: Bench) -> None:
    req, near = Req("a", [1], domain="verse"), Req("b", [1], limit=3)
    near.sampling_params.top_k = 1 << 30
    bench.scheduler.prefill(req, near)
    bench.scheduler.verify(req, near, accept=2)  # the second has no room for two drafts and a bonus
    bench.drafting.version = "v2"
    bench.scheduler.verify(req, accept=0)
    assert bench.capture.by_stratum == {"v1": {"verse/greedy": (3, 1)}, "v2": {"verse/greedy": (1, 1)}}
    assert bench.capture.by_drafter == {"v1": (3, 1), "v2": (1, 1)}
    assert (bench.capture.output_tokens, bench.capture.rounds) == (2 + 3 + 2 + 1, 3)


@pytest.mark.parametrize("url", ["spool://runs/live/traces", "kafka://broker:9092"])
def test_only_a_relay_takes_traces(url: str) -> None:
    capture = Capture(Settings(traces=Traces(url=url)), Drafting())
    assert capture.feature.reason is not None
    assert f"traces.url is {url!r}, expected relay+tcp://host:port" in capture.feature.reason


def test_a_relay_without_a_port() -> None:
    capture = Capture(Settings(traces=Traces(url="relay+tcp://nowhere")), Drafting())
    capture.start(IDENTITY)
    assert "expected relay+tcp://host:port" in (capture.feature.reason or "")
