from __future__ import annotations

from typing import Any

import msgspec
from livedraft.contracts.messages import Features, Trace
from livedraft.traces.arrays import from_numpy
from livedraft.traces.memory import MemoryStream
from livedraft.traces.stats import Acceptance, Drafting, StreamStats, summarize

replace = msgspec.structs.replace


def trace_of(trace: Trace, rounds: list[tuple[int, list[int], list[int]]], **fields: Any) -> Trace:
    """A trace with a prompt of one token and ``rounds`` of (drafter, parents, accepted)."""
    roots, at = [], 0
    for _, _, accepted in rounds:
        roots.append(at)
        at += sum(accepted) + 1
    parents = [parent for _, links, _ in rounds for parent in links]
    nodes = len(parents)
    return replace(
        trace,
        prompt=from_numpy([1], "i4"),
        output=from_numpy([1] * at, "i4"),
        features=Features(),
        rounds=replace(
            trace.rounds,
            root=from_numpy(roots, "i4"),
            size=from_numpy([len(links) for _, links, _ in rounds], "i4"),
            drafter=from_numpy([drafter for drafter, _, _ in rounds], "i2"),
            tokens=from_numpy([1] * nodes, "i4"),
            parents=from_numpy(parents, "i2"),
            logprobs=from_numpy([-1.0] * nodes, "f4"),
            accepted=from_numpy([hit for _, _, hits in rounds for hit in hits], "u1"),
            bonus=from_numpy([1] * len(rounds), "i4"),
            top_ids=from_numpy([[1]] * (nodes + len(rounds)), "i4"),
            top_logprobs=from_numpy([[-1.0]] * (nodes + len(rounds)), "f4"),
            tail=from_numpy([0.0] * (nodes + len(rounds)), "f4"),
        ),
        **fields,
    )


def stats_of(*traces: Trace) -> StreamStats:
    stream = MemoryStream()
    for trace in traces:
        stream.offer(trace)
    return summarize(stream.source("g").poll())


CHAIN = [-1, 0, 1]


def test_accept_length_by_version_and_domain(make_trace: Any) -> None:
    one = trace_of(make_trace(1), [(0, CHAIN, [1, 1, 0]), (1, CHAIN, [0, 0, 0]), (-1, [], [])], domain="prose")
    two = trace_of(make_trace(2), [(1, CHAIN, [1, 1, 1])], domain="code")
    stats = stats_of(one, two)
    assert stats.by_drafter == {"7": Drafting(rounds=1, tokens=3), "8": Drafting(rounds=2, tokens=5)}
    assert stats.by_domain == {"prose": Drafting(rounds=3, tokens=5), "code": Drafting(rounds=1, tokens=4)}
    assert stats.overall.accept_length == 9 / 4
    assert (stats.traces, stats.requests, stats.prompt_tokens, stats.output_tokens) == (2, 2, 2, 9)


def test_acceptance_by_depth_of_chains(make_trace: Any) -> None:
    stats = stats_of(trace_of(make_trace(1), [(0, CHAIN, [1, 1, 0]), (0, CHAIN, [0, 0, 0]), (0, CHAIN, [1, 1, 1])]))
    assert stats.acceptance == (
        Acceptance(tried=3, accepted=2),
        Acceptance(tried=2, accepted=2),
        Acceptance(tried=2, accepted=1),
    )
    assert stats.acceptance[2].rate == 0.5


def test_acceptance_by_depth_of_trees(make_trace: Any) -> None:
    # Two children of the root; the second is accepted and has no children of its own.
    leaf = (0, [-1, -1, 0], [0, 1, 0])
    # The second is accepted; its child is not.
    deeper = (0, [-1, -1, 1], [0, 1, 0])
    stats = stats_of(trace_of(make_trace(1), [leaf, deeper]))
    assert stats.acceptance == (Acceptance(tried=2, accepted=2), Acceptance(tried=1, accepted=0))


def test_tokens_cut_off_by_a_stop_are_not_counted(make_trace: Any) -> None:
    trace = trace_of(make_trace(1), [(0, CHAIN, [1, 1, 1])])
    stats = stats_of(replace(trace, output=from_numpy([1, 1], "i4")))
    assert stats.overall == Drafting(rounds=1, tokens=2)


def test_dead_letters_and_duplicates_are_counted_apart(make_trace: Any) -> None:
    stream = MemoryStream()
    for seed in (1, 1, 2):
        stream.offer(make_trace(seed))
    stream.damage("test")
    stats = summarize(stream.source("g").poll())
    assert (stats.traces, stats.duplicates, stats.dead_letters) == (2, 1, 1)


def test_nothing_is_no_speculation() -> None:
    stats = summarize([])
    assert stats.overall.accept_length == 1.0
    assert stats.acceptance == ()
