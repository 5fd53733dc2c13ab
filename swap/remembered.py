"""Scores that are made once: of drafters that one gate shares with the next, over traces that both look at.

Two thirds of a gate's work was scoring again what the gate before had scored, on the cores that serving and learning
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from livedraft.contracts.messages import ReplayScore, Trace
from livedraft.contracts.ports import Replay


class RememberedReplay:
    """``ports.Replay`` before another one.  A folder's content never changes: it is named after its version.

    Kept are the scores of the ``folders`` drafters asked for last, over the traces asked for last.
    """

    def __init__(self, behind: Replay, *, folders: int = 4) -> None:
        self._behind = behind
        self._folders = folders
        self._known: dict[Path, dict[str, ReplayScore | None]] = {}

    def score(self, folder: Path, traces: Sequence[Trace]) -> list[ReplayScore]:
        """As ``ports.Replay``."""
        before = self._known.pop(folder, {})
        new = [trace for trace in traces if trace.trace_id not in before]
        found = {score.trace_id: score for score in self._behind.score(folder, new)} if new else {}
        kept = {t.trace_id: before.get(t.trace_id) or found.get(t.trace_id) for t in traces}
        self._known[folder] = kept  # popped and set again: the dictionary is in order of use
        while len(self._known) > self._folders:
            self._known.pop(next(iter(self._known)))
        return [score for score in kept.values() if score is not None]
