"""Ports: what each part asks of the others.  Every port has a real and an in-memory adapter.

Delivery contract of the stream: at least once, in order within a partition.  A consumer stores the offsets of
what it has used together with the result of using it, and calls ``seek`` with them when it starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from livedraft.contracts.messages import (
    Decision,
    Delivery,
    Delta,
    DrafterVersion,
    EngineStatus,
    Generation,
    Manifest,
    Offsets,
    ReplayScore,
    SwapReceipt,
    SwapRequest,
    Trace,
)


class TraceSink(Protocol):
    """Where serving leaves traces.  Serving never waits: a full or broken sink drops, and counts."""

    @property
    def dropped(self) -> int:
        """Traces offered that were not and will not be written, whatever the reason."""

    def offer(self, trace: Trace) -> bool:
        """Take a trace without blocking; False when it was dropped (and counted)."""

    def close(self, timeout: float = 5.0) -> None:
        """Write what was taken, then release files and threads.  Safe to call twice."""


class TraceSource(Protocol):
    """One consumer's view of the stream."""

    def seek(self, offsets: Offsets) -> None:
        """Continue from ``offsets`` (next to read).

        Absent partitions start at their oldest record; those that a group shares start where it has committed.
        """

    def on_release(self, save: Callable[[], None]) -> None:
        """``save`` is called, within ``poll``, before partitions go to another consumer of the group.

        It should make durable what was used of them, and commit.  A stream that is not shared never calls it.
        """

    def poll(self, timeout: float = 0.0, limit: int = 256) -> list[Delivery]:
        """Up to ``limit`` items, waiting at most ``timeout`` seconds for the first one.  Never raises for bad data."""

    def commit(self, offsets: Offsets) -> None:
        """Remember ``offsets`` durably for this consumer's group."""

    def committed(self) -> Offsets:
        """What this group committed last."""

    def lag(self) -> int:
        """Records written but not yet polled."""

    def close(self) -> None:
        """Release files.  Safe to call twice."""


class Engine(Protocol):
    """A target with its live drafter.  Thread-safe; ``emit`` runs on the engine's thread and must not block."""

    def status(self) -> EngineStatus:
        """A snapshot that costs the engine nothing."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, special tokens parsed."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, special tokens left out."""

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Prompt ids of a chat, by the target's template, with the generation prompt appended."""

    def submit(self, request: Generation, emit: Callable[[Delta], None]) -> None:
        """Queue a request.  Raises BadRequest, PromptTooLong or Overloaded; afterwards ``emit`` gets every Delta."""

    def cancel(self, request_id: str) -> None:
        """Stop a request at the next step; its last Delta says "cancelled".  Unknown ids are ignored."""

    def swap(self, request: SwapRequest) -> SwapReceipt:
        """Draft with another checkpoint from the next step on; running requests go on.

        Raises DrafterRejected before anything is touched, SwapFailed when it could not be applied.
        """

    def close(self, timeout: float = 10.0) -> None:
        """Finish running requests within ``timeout`` seconds, cancel the rest, stop."""


class EngineAdmin(Protocol):
    """The swap controller's handle on an engine, usually in another process."""

    def status(self) -> EngineStatus:
        """Raises SwapFailed when the engine does not answer."""

    def swap(self, request: SwapRequest) -> SwapReceipt:
        """As ``Engine.swap``."""


class Registry(Protocol):
    """Versions of the drafter with their lineage.  Aliases: ``candidate``, ``live``, ``previous``.

    Every method raises RegistryUnavailable when the registry does not answer, and NotFound for an unknown
    version.
    """

    def publish(self, folder: Path, manifest: Manifest, metrics: dict[str, float]) -> DrafterVersion:
        """Store a checkpoint folder as a new version; returns it once it can be fetched.

        Weights (by checksum) that are registered already keep their version, so an unsure caller may repeat it.
        """

    def resolve(self, alias: str) -> DrafterVersion | None:
        """The version an alias points at, without its metrics: cheap, because it is polled."""

    def point(self, alias: str, version: str) -> None:
        """Move an alias."""

    def versions(self) -> list[DrafterVersion]:
        """All versions, newest first."""

    def get(self, version: str) -> DrafterVersion:
        """One version."""

    def fetch(self, version: str, into: Path) -> Path:
        """Download a version's folder below ``into``; returns the folder.  Never leaves half a folder there."""

    def record(self, version: str, metrics: dict[str, float], step: int = 0) -> None:
        """Add measurements to a version."""

    def decide(self, decision: Decision) -> None:
        """Append a decision, with its evidence, to the history.  The same decision again changes nothing."""

    def decisions(self) -> list[Decision]:
        """The history, oldest first."""


class Announcements(Protocol):
    """Where others hear of candidates and decisions.

    At least once or, through an outage, not at all: the registry has them.
    """

    def candidate(self, version: DrafterVersion) -> None:
        """A drafter was registered.  Never waits, never raises."""

    def decision(self, decision: Decision) -> None:
        """A verdict was recorded.  Never waits, never raises."""

    def close(self, timeout: float = 2.0) -> None:
        """Send what waits.  Safe to call twice."""


class Replay(Protocol):
    """Scores a drafter by drafting for real over traces.  The gate's evidence."""

    def score(self, folder: Path, traces: Sequence[Trace]) -> list[ReplayScore]:
        """One score per trace that can be scored, in order.  Raises DrafterRejected for an unusable checkpoint."""
