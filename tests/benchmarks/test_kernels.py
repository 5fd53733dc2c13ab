"""The benchmark of the head compares what computes the same, and counts what each side holds."""

from __future__ import annotations

from livedraft.benchmarks.kernels import Shape, _measure


def test_every_side_is_measured_and_agrees() -> None:
    found = _measure("small", Shape(1024, 2048, 8), repeats=2)
    assert found["ms"].keys() == {"naive", "chunked", "chunked_twice"}
    assert all(low <= found["speedup_over_naive"][side] <= high for side, (low, high) in found["spread"].items())
    if found["peak_mb"]["naive"] is not None:
        # All logits, their softmax and both gradients, against 512 rows of logits.
        assert found["peak_mb"]["chunked"] < found["peak_mb"]["naive"]
        assert found["logits_mb"] == round(1024 * 2048 * 4 / 1e6, 1)
