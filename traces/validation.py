"""What a consumer may rely on in a trace, checked once, where bytes become a trace.

A numpy operation on a small array costs what thousands of its elements do, so traces are validated together: their
arrays are joined, and each check is made once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from livedraft.contracts.errors import CorruptRecord
from livedraft.contracts.messages import Array, DType, Features, Rounds, Trace
from livedraft.traces.arrays import NUMPY, describe
from numpy.typing import NDArray

#: Rounding allowed in probabilities and log-probabilities computed in float32 or less.
TOLERANCE = 1e-2

#: Of features: unsigned integers of their width and, shifted left by their sign, the least that is no finite number.
_FEATURES: dict[DType, tuple[str, int]] = {"bf2": ("<u2", 0xFF00), "f4": ("<u4", 0xFF000000), "e4m3": ("u1", 0xFE)}
#: With the largest e4m3, 448, the largest float32.
_LARGEST_SCALE = float(np.finfo(np.float32).max) / 448

#: The most elements of one dimension that numpy can hold, of any dtype of ours.
_LARGEST = np.iinfo(np.intp).max // 8


def validate(*traces: Trace) -> None:
    """Raise CorruptRecord, naming the field, unless each trace is one that a consumer can use unchecked.

    Checked: dtypes, shapes and byte counts of every array; ids not negative; sizes that add up; roots inside
    prompt + output and ascending; drafter indices in range; parents before children; accepted nodes that form
    one path from the root; probabilities that are ones; finite features inside prompt + output.
    """
    if not traces:
        return
    for trace in traces:
        _check_numbers(trace)
        _check_shapes(trace)
    _check_ids(traces)
    rounds = [trace.rounds for trace in traces]
    _check_rounds(traces, rounds)
    _check_paths(rounds)
    _check_probabilities(rounds)
    for trace in traces:
        _check_features(trace.features, _length(trace))


def _check_numbers(trace: Trace) -> None:
    for name, number in (
        ("started_at", trace.started_at),
        ("finished_at", trace.finished_at),
        ("sampling.temperature", trace.sampling.temperature),
    ):
        _require(math.isfinite(number) and number >= 0, name, "expected a finite number, at least 0")
    _require(math.isfinite(trace.top_temperature) and trace.top_temperature > 0, "top_temperature", "expected above 0")


def _check_shapes(trace: Trace) -> None:
    rounds = trace.rounds
    _fits("prompt", trace.prompt, "i4", (None,))
    _fits("output", trace.output, "i4", (None,))
    _fits("rounds.root", rounds.root, "i4", (None,))
    _fits("rounds.tokens", rounds.tokens, "i4", (None,))
    count, nodes = rounds.root.shape[0], rounds.tokens.shape[0]
    rows = count + nodes
    _fits("rounds.size", rounds.size, "i4", (count,))
    _fits("rounds.drafter", rounds.drafter, "i2", (count,))
    _fits("rounds.bonus", rounds.bonus, "i4", (count,))
    _fits("rounds.parents", rounds.parents, "i2", (nodes,))
    _fits("rounds.accepted", rounds.accepted, "u1", (nodes,))
    _fits("rounds.logprobs", rounds.logprobs, "f4", (nodes,))
    _fits("rounds.top_ids", rounds.top_ids, "i4", (rows, None))
    _fits("rounds.top_logprobs", rounds.top_logprobs, "f4", rounds.top_ids.shape)
    _fits("rounds.tail", rounds.tail, "f4", (rows,))


def _check_ids(traces: Sequence[Trace]) -> None:
    ids = {
        "prompt": [trace.prompt for trace in traces],
        "output": [trace.output for trace in traces],
        "rounds.root": [trace.rounds.root for trace in traces],
        "rounds.size": [trace.rounds.size for trace in traces],
        "rounds.tokens": [trace.rounds.tokens for trace in traces],
        "rounds.bonus": [trace.rounds.bonus for trace in traces],
        "rounds.top_ids": [trace.rounds.top_ids for trace in traces],
    }
    for name, arrays in ids.items():
        _require(int(np.minimum.reduce(_joined(arrays), initial=0)) >= 0, name, "negative")


def _check_rounds(traces: Sequence[Trace], rounds: Sequence[Rounds]) -> None:
    root, size = _joined([each.root for each in rounds]), _joined([each.size for each in rounds])
    # Of each trace: rounds, nodes, tokens, drafters.  And their sums over the traces before it, and over all.
    of = np.array([(t.rounds.root.shape[0], t.rounds.tokens.shape[0], _length(t), len(t.drafters)) for t in traces])
    before = np.zeros((len(traces) + 1, 4), np.int64)
    of.cumsum(axis=0, out=before[1:])
    nodes = np.zeros(len(size) + 1, np.int64)
    size.cumsum(out=nodes[1:])
    _require_none(nodes[before[:, 0]] != before[:, 1], "rounds.size", "does not add up to tokens")
    trace_of = np.arange(len(traces)).repeat(of[:, 0])
    _require_none(root >= of[trace_of, 2], "rounds.root", "past the last token")
    # Each trace's text laid behind the one before it, roots ascend across the traces.
    root = root + before[trace_of, 2]
    _require_none(root[1:] <= root[:-1], "rounds.root", "not ascending")
    drafter = _joined([each.drafter for each in rounds])
    outside = (drafter < 0) | (drafter >= of[trace_of, 3])
    # A round that did not speculate has no drafter to name.
    _require_none(outside & (size > 0), "rounds.drafter", "negative, or past the end of drafters")


def _check_paths(rounds: Sequence[Rounds]) -> None:
    size, parents = _joined([each.size for each in rounds]), _joined([each.parents for each in rounds])
    # Of each node: the first of its round, and which one of its round it is.
    first = np.repeat(size.cumsum() - size, size)
    local = np.arange(len(parents)) - first
    _require_none((parents < -1) | (parents >= local), "rounds.parents", "a parent after its child")
    accepted = _joined([each.accepted for each in rounds])
    _require_none(accepted > 1, "rounds.accepted", "expected 0 or 1")
    path = accepted.nonzero()[0]
    # The accepted node before each, if it is of the same round; else the root.
    before = np.maximum(np.concatenate(((-1,), path[:-1])) - first[path], -1)
    _require_none(parents[path] != before, "rounds.accepted", "not one path from the root")


def _check_probabilities(rounds: Sequence[Rounds]) -> None:
    logprobs = {
        "rounds.logprobs": [each.logprobs for each in rounds],
        "rounds.top_logprobs": [each.top_logprobs for each in rounds],
    }
    for name, arrays in logprobs.items():
        # Minus infinity is a token that cannot be; NaN fails the comparison.
        highest = np.maximum.reduce(_joined(arrays), initial=-np.inf)
        _require(float(highest) <= TOLERANCE, name, "not a log-probability")
    tail = _joined([each.tail for each in rounds])
    least, highest = np.minimum.reduce(tail, initial=0.0), np.maximum.reduce(tail, initial=0.0)
    _require(float(least) >= -TOLERANCE and float(highest) <= 1 + TOLERANCE, "rounds.tail", "not a probability")


def _check_features(features: Features, length: int) -> None:
    if features.mode == "store":
        _require(bool(features.reference), "features.reference", "missing, with mode store")
    if features.mode != "inline":
        return
    values = features.values
    if values is None:
        raise CorruptRecord("features.values: missing, with mode inline")
    _fits("features.values", values, values.dtype if values.dtype in _FEATURES else "f4", (None, None))
    positions, width = values.shape
    if values.dtype == "e4m3":
        _check_scale(features.scale, positions)
    _require(values.dtype == "e4m3" or features.scale is None, "features.scale", "given, but values are not e4m3")
    _require(0 <= features.start <= length - positions, "features.start", "values lie outside prompt + output")
    layers = len(features.layers)
    _require(not layers or width % layers == 0, "features.layers", "does not divide the width of values")
    # Without their sign, infinities are the largest, but for NaNs.
    unsigned, infinity = _FEATURES[values.dtype]
    largest = np.maximum.reduce(_joined([values]).view(unsigned) << 1, initial=0)
    _require(int(largest) < infinity, "features.values", "NaN or infinity")


def _check_scale(scale: Array | None, positions: int) -> None:
    if scale is None:
        raise CorruptRecord("features.scale: missing, with e4m3 values")
    _fits("features.scale", scale, "f4", (positions,))
    factors = _joined([scale])
    least, largest = np.minimum.reduce(factors, initial=1.0), np.maximum.reduce(factors, initial=1.0)
    # A value is at most 448 times its row's scale; NaN fails the comparison.
    _require(float(least) > 0 and float(largest) < _LARGEST_SCALE, "features.scale", "expected above 0 and finite")


def _fits(name: str, array: Array, dtype: DType, shape: tuple[int | None, ...]) -> None:
    """Raise CorruptRecord unless dtype and shape (None: any length) are these, and the bytes fill the shape."""
    is_so = array.shape == shape or (
        len(array.shape) == len(shape)
        and all(n == want or (want is None and 0 <= n <= _LARGEST) for want, n in zip(shape, array.shape, strict=True))
    )
    if not is_so or array.dtype != dtype:  # spelled only here: a trace has dozens of arrays
        wanted = f"{dtype}[{','.join('*' if n is None else str(n) for n in shape)}]"
        raise CorruptRecord(f"{name}: is {describe(array)}, expected {wanted}")
    if math.prod(array.shape) * NUMPY[dtype].itemsize != len(array.data):
        raise CorruptRecord(f"{name}: {len(array.data)} bytes do not fill {describe(array)}")


def _length(trace: Trace) -> int:
    return trace.prompt.shape[0] + trace.output.shape[0]


def _joined(arrays: Sequence[Array]) -> NDArray[Any]:
    """The elements of arrays of one dtype, one after the other."""
    return np.frombuffer(b"".join([array.data for array in arrays]), NUMPY[arrays[0].dtype])


def _require(holds: bool, name: str, problem: str) -> None:
    if not holds:
        raise CorruptRecord(f"{name}: {problem}")


def _require_none(wrong: NDArray[Any], name: str, problem: str) -> None:
    if np.count_nonzero(wrong):
        raise CorruptRecord(f"{name}: {problem}")
