"""What a consumer may rely on in a trace, checked once, where bytes become a trace."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from livedraft.contracts.errors import CorruptRecord
from livedraft.contracts.messages import Array, DType, Features, Rounds, Trace
from livedraft.traces.arrays import describe, to_numpy
from numpy.typing import NDArray

#: Rounding allowed in probabilities and log-probabilities computed in float32 or less.
TOLERANCE = 1e-2


def validate(trace: Trace) -> None:
    """Raise CorruptRecord, naming the field, unless the trace is one a consumer can use unchecked.

    Checked: dtypes, shapes and byte counts of every array; ids not negative; sizes that add up; roots inside
    prompt + output and ascending; drafter indices in range; parents before children; accepted nodes that form
    one path from the root; probabilities that are ones; finite features inside prompt + output.
    """
    for name, number in (
        ("started_at", trace.started_at),
        ("finished_at", trace.finished_at),
        ("sampling.temperature", trace.sampling.temperature),
    ):
        _require(math.isfinite(number) and number >= 0, name, "expected a finite number, at least 0")
    _require(math.isfinite(trace.top_temperature) and trace.top_temperature > 0, "top_temperature", "expected above 0")
    length = len(_ids("prompt", trace.prompt)) + len(_ids("output", trace.output))
    _check_rounds(trace.rounds, length, len(trace.drafters))
    _check_features(trace.features, length)


def _check_rounds(rounds: Rounds, length: int, drafters: int) -> None:
    root = _ids("rounds.root", rounds.root)
    size = _ids("rounds.size", rounds.size)
    tokens = _ids("rounds.tokens", rounds.tokens)
    count, nodes = len(root), len(tokens)
    rows = count + nodes
    _require(len(size) == count and int(size.sum(dtype=np.int64)) == nodes, "rounds.size", "does not add up to tokens")
    _require(bool((root[1:] > root[:-1]).all()), "rounds.root", "not ascending")
    _require(not count or int(root[-1]) < length, "rounds.root", "past the last token")
    _ids("rounds.bonus", rounds.bonus, count)

    drafter = _array("rounds.drafter", rounds.drafter, ("i2",), (count,))
    # A round that did not speculate has no drafter to name.
    _require(bool(((drafter >= 0) | (size == 0)).all()), "rounds.drafter", "negative")
    _require(bool(((drafter < drafters) | (size == 0)).all()), "rounds.drafter", "past the end of drafters")

    _check_paths(rounds, size, nodes)
    _check_logprobs("rounds.logprobs", rounds.logprobs, (nodes,))
    top = _array("rounds.top_ids", rounds.top_ids, ("i4",), (rows, None))
    _require(not top.size or int(top.min()) >= 0, "rounds.top_ids", "negative id")
    _check_logprobs("rounds.top_logprobs", rounds.top_logprobs, top.shape)
    tail = _array("rounds.tail", rounds.tail, ("f4",), (rows,))
    _require(bool(((tail >= -TOLERANCE) & (tail <= 1 + TOLERANCE)).all()), "rounds.tail", "not a probability")


def _check_paths(rounds: Rounds, size: NDArray[Any], nodes: int) -> None:
    parents = _array("rounds.parents", rounds.parents, ("i2",), (nodes,))
    accepted = _array("rounds.accepted", rounds.accepted, ("u1",), (nodes,))
    of_round = np.repeat(np.arange(len(size)), size)
    local = np.arange(nodes) - (size.cumsum() - size)[of_round]
    _require(bool(((parents >= -1) & (parents < local)).all()), "rounds.parents", "a parent after its child")
    _require(not nodes or int(accepted.max()) <= 1, "rounds.accepted", "expected 0 or 1")
    path = accepted.nonzero()[0]
    before = np.full(len(path), -1)
    follows = of_round[path[1:]] == of_round[path[:-1]]
    before[1:][follows] = local[path[:-1]][follows]
    _require(bool((parents[path] == before).all()), "rounds.accepted", "not one path from the root")


def _check_features(features: Features, length: int) -> None:
    if features.mode == "store":
        _require(bool(features.reference), "features.reference", "missing, with mode store")
    if features.mode != "inline":
        return
    _require(features.values is not None, "features.values", "missing, with mode inline")
    assert features.values is not None
    values = _array("features.values", features.values, ("bf2", "f4"), (None, None))
    _require(0 <= features.start <= length - len(values), "features.start", "values lie outside prompt + output")
    layers = len(features.layers)
    _require(not layers or values.shape[1] % layers == 0, "features.layers", "does not divide the width of values")
    exponent = (values & 0x7F80) == 0x7F80 if features.values.dtype == "bf2" else ~np.isfinite(values)
    _require(not exponent.any(), "features.values", "NaN or infinity")


def _check_logprobs(name: str, array: Array, shape: tuple[int, ...]) -> None:
    values = _array(name, array, ("f4",), shape)
    # Minus infinity is a token that cannot be; NaN fails the comparison.
    _require(bool((values <= TOLERANCE).all()), name, "not a log-probability")


def _ids(name: str, array: Array, length: int | None = None) -> NDArray[Any]:
    values = _array(name, array, ("i4",), (length,))
    _require(not values.size or int(values.min()) >= 0, name, "negative")
    return values


def _array(name: str, array: Array, dtypes: tuple[DType, ...], shape: tuple[int | None, ...]) -> NDArray[Any]:
    fits = array.shape == shape or (
        len(array.shape) == len(shape) and all(want in (None, n) for want, n in zip(shape, array.shape, strict=True))
    )
    if not fits or array.dtype not in dtypes:  # spelled only here: a trace has dozens of arrays
        wanted = f"{'/'.join(dtypes)}[{','.join('*' if n is None else str(n) for n in shape)}]"
        raise CorruptRecord(f"{name}: is {describe(array)}, expected {wanted}")
    return to_numpy(array)


def _require(holds: bool, name: str, problem: str) -> None:
    if not holds:
        raise CorruptRecord(f"{name}: {problem}")
