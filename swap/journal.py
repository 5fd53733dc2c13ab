"""What the swap controller must not forget: decisions, the swap in progress, and what the registry has been told.

decisions.jsonl   every decision, appended and fsynced; a torn last line is a decision never made
delivered         how many of them the registry has
exchange.json     a swap that was begun and not yet known to have ended
lock              held by whoever acts: the controller's turn, or a command by hand
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
from livedraft.contracts.messages import Decision, Record, SwapRequest
from livedraft.swap.watch import Watch


class Exchange(Record, frozen=True, kw_only=True):
    """A swap in progress, written down before the engine is asked."""

    request: SwapRequest
    #: What will have been decided once the engine has the checkpoint.
    decision: Decision
    #: Why the engine did not confirm, if it said so; "" when nobody knows.
    failure: str = ""


class Journal:
    """The files of one controller.  Every write is atomic and durable when its method returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._decisions = folder / "decisions.jsonl"
        self._delivered = folder / "delivered"
        self._exchange = folder / "exchange.json"
        self._read: tuple[int, list[Decision]] = (0, [])

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock, waiting for whoever has it; the kernel releases a dead holder's."""
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def decisions(self) -> list[Decision]:
        """All decisions, oldest first."""
        try:
            size = self._decisions.stat().st_size
        except FileNotFoundError:
            return []
        if size != self._read[0]:  # append-only, so the size tells; asked several times a second
            lines = self._decisions.read_bytes().split(b"\n")[:-1]
            self._read = size, [msgspec.json.decode(line, type=Decision) for line in lines]
        return self._read[1]

    def append(self, decision: Decision) -> None:
        """Write a decision down, once: after a crash its author may not know that it already has."""
        if any(
            (d.action, d.candidate, d.at) == (decision.action, decision.candidate, decision.at)
            for d in self.decisions()
        ):
            return
        with self._decisions.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a torn line goes
            file.write(msgspec.json.encode(decision) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def undelivered(self) -> list[Decision]:
        """Decisions that the registry does not have yet, oldest first."""
        return self.decisions()[self._count() :]

    def mark_delivered(self) -> None:
        """The registry has one more."""
        self._replace(self._delivered, b"%d\n" % (self._count() + 1))

    @property
    def exchange(self) -> Exchange | None:
        """The swap in progress."""
        try:
            return msgspec.json.decode(self._exchange.read_bytes(), type=Exchange)
        except FileNotFoundError:
            return None

    def begin(self, exchange: Exchange) -> None:
        """Write the swap in progress down."""
        self._replace(self._exchange, msgspec.json.encode(exchange))

    def end(self) -> None:
        """No swap is in progress."""
        self._exchange.unlink(missing_ok=True)

    def judged(self, version: str) -> bool:
        """Whether a candidate has had its verdict."""
        return any(d.candidate == version for d in self.decisions())

    def predictions(self) -> dict[str, float]:
        """Accept length that the gate predicted, by promoted version."""
        return {
            d.candidate: d.evidence["predicted_accept_length"]
            for d in self.decisions()
            if d.action == "promote" and d.candidate and "predicted_accept_length" in d.evidence
        }

    @property
    def served(self) -> str | None:
        """The version that the last promotion or rollback put into service."""
        for decision in reversed(self.decisions()):
            if decision.action == "promote":
                return decision.candidate
            if decision.action == "rollback":
                return decision.live
        return None

    def predecessor(self, version: str) -> str | None:
        """The version that ``version`` replaced when it was last promoted."""
        promotions = (d for d in reversed(self.decisions()) if d.action == "promote" and d.candidate == version)
        return next((d.live for d in promotions), None)

    @property
    def watch(self) -> Watch | None:
        """The promotion still under observation.  Promotions by hand carry no prediction, and are not watched."""
        for decision in reversed(self.decisions()):
            if decision.action == "promote" and decision.candidate and "predicted_accept_length" in decision.evidence:
                seen = decision.evidence
                return Watch(
                    candidate=decision.candidate,
                    live=decision.live,
                    predicted=seen["predicted_accept_length"],
                    predicted_error=seen.get("predicted_error", 0.0),
                    predicted_by_stratum={
                        name.removeprefix("predicted/"): value
                        for name, value in seen.items()
                        if name.startswith("predicted/")
                    },
                    previous=seen["previous_accept_length"],
                    started_at=decision.at,
                    tokens=int(seen["tokens_at_swap"]),
                    rounds=int(seen["rounds_at_swap"]),
                    requests=int(seen.get("requests_at_swap", 0)),
                    served=int(seen.get("served_at_swap", 0)),
                )
            if decision.action != "reject":
                return None
        return None

    def _count(self) -> int:
        try:
            return int(self._delivered.read_bytes())
        except FileNotFoundError:
            return 0

    def _replace(self, path: Path, content: bytes) -> None:
        half = path.with_name(f".{path.name}.half")
        with half.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        half.rename(path)
