"""What SGLang calls in each of its processes (entry point ``sglang.srt.plugins``)."""

from __future__ import annotations


def register() -> None:
    """Set our hooks, in a scheduler process; do nothing in any other."""
