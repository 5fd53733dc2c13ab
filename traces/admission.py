"""Which requests are captured, and which of those are evidence instead of lessons.  Pure, and the same everywhere."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import blake2b
from typing import Literal

from livedraft.contracts.messages import Generation, Record


class Admission(Record, frozen=True, kw_only=True):
    """Whether a request is captured, and why (not)."""

    captured: bool
    reason: Literal["captured", "tenant opted out", "request opted out", "not sampled"]


def admit(request: Generation, *, opted_out: Collection[str] = (), sample_rate: float = 1.0) -> Admission:
    """Decide on one request.  ``sample_rate`` is the fraction of willing requests captured, by hash of their id."""
    if not request.traced:
        return Admission(captured=False, reason="request opted out")
    if request.tenant in opted_out:
        return Admission(captured=False, reason="tenant opted out")
    if not _falls_in("sample", request.request_id, sample_rate):
        return Admission(captured=False, reason="not sampled")
    return Admission(captured=True, reason="captured")


def held_out(request_id: str, fraction: float) -> bool:
    """Whether a request is the gate's evidence and never trained on.

    Every process answers alike, and a larger ``fraction`` holds out a superset.
    """
    return _falls_in("held-out", request_id, fraction)


def _falls_in(split: str, request_id: str, fraction: float) -> bool:
    # Salted, so that what is sampled and what is held out are independent.
    digest = blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8, salt=split.encode()).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
