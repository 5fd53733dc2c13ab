"""The exchange of drafters: fetched, proven, written down, applied, confirmed; then, and only then, the aliases.

The engine's checksum is the truth.  Whatever was killed, ``settle`` and ``inform`` make journal and registry agree
with it, and both may be repeated.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from livedraft.contracts import checkpoint
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.errors import DrafterRejected, NotFound, SwapFailed
from livedraft.contracts.messages import Decision, DrafterVersion, EngineStatus, Manifest, SwapRequest
from livedraft.contracts.ports import EngineAdmin, Registry
from livedraft.swap.journal import Exchange, Journal
from msgspec.structs import replace

log = logging.getLogger(__name__)


class Swapper:
    """The only way to another drafter.  Its caller holds ``journal.alone()``:

    with swapper.journal.alone():
        live = swapper.inform(swapper.settle())         # finish or forget what was begun; aliases follow the engine
        swapper.exchange(folder, version, decision)
        swapper.inform(swapper.settle())                # the engine has confirmed: aliases move
    """

    def __init__(
        self, registry: Registry, engine: EngineAdmin, folder: Path, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.registry = registry
        self.engine = engine
        self.journal = Journal(folder.resolve())
        self.clock = clock
        self._versions = self.journal.folder / "versions"
        self._live: DrafterVersion | None = None
        self._proven: dict[Any, tuple[Path, DrafterConfig, Manifest]] = {}

    def settle(self) -> EngineStatus:
        """Learn how a swap that was begun ended; returns the engine's status.  Raises SwapFailed without an answer."""
        status = self.engine.status()
        if (begun := self.journal.exchange) is None:
            return status
        if status.drafter_checksum == begun.request.checksum:
            self.journal.append(begun.decision)
        elif begun.failure and begun.decision.action == "promote":
            reason = f"the engine did not take it: {begun.failure}"
            self.journal.append(replace(begun.decision, action="reject", reason=reason))
        self.journal.end()  # without a failure it never reached the engine: whoever wanted it may want it again
        return self.engine.status()  # what is intended is known again, and an engine that lacks it gets it

    def inform(self, status: EngineStatus) -> DrafterVersion | None:
        """Tell the registry the decisions it lacks and what the engine drafts with, and return that version.

        None: the registry does not know the engine's drafter.  The engine is then given the one that the registry
        calls live, if there is one, and the next call finds it.
        """
        self._deliver()
        return self._align(status)

    def fetch(
        self, version: DrafterVersion, status: EngineStatus, like: DrafterConfig | None = None
    ) -> tuple[Path, DrafterConfig, Manifest]:
        """A version's folder, proven fit for this engine; proven once, since it is asked for at every poll.

        Raises DrafterRejected naming what is wrong.
        """
        asked = (version.checksum, status.target, status.tokenizer_hash, like)
        if (proven := self._proven.get(asked)) and proven[0].exists():
            return proven
        self._forget_damaged(version)
        folder = self.registry.fetch(version.version, self._versions)
        config, manifest = checkpoint.verify(
            folder, target=status.target, tokenizer_hash=status.tokenizer_hash, like=like
        )
        if checkpoint.checksum(manifest.tensors) != version.checksum:
            raise DrafterRejected("manifest.json: not the tensors that were registered under this version")
        self._proven[asked] = folder, config, manifest
        return folder, config, manifest

    def exchange(self, folder: Path, version: str, decision: Decision) -> Decision:
        """Swap to ``version`` in ``folder`` and journal ``decision`` with what the engine reported.

        Raises DrafterRejected when folder or engine refuse it, and SwapFailed when the engine kept what it had or
        its answer is unknown; then the next ``settle`` finds out.
        """
        checksum = checkpoint.checksum(checkpoint.verify(folder)[1].tensors)
        begun = Exchange(request=SwapRequest(path=str(folder), version=version, checksum=checksum), decision=decision)
        self.journal.begin(begun)
        try:
            receipt = self.engine.swap(begun.request)
            if receipt.checksum != checksum:
                raise SwapFailed(f"the engine confirmed {receipt.checksum[:12]}, expected {checksum[:12]}")
        except DrafterRejected:
            self.journal.end()
            raise
        except SwapFailed as error:
            self.journal.begin(replace(begun, failure=str(error)))
            raise
        decision = replace(
            decision, evidence=decision.evidence | {"stall_s": receipt.stall_s, "applied_at": receipt.applied_at}
        )
        self.journal.append(decision)
        self.journal.end()
        return decision

    def back(self, decision: Decision) -> Decision:
        """Exchange back to ``decision.live``, whose folder was kept: needs no registry."""
        if decision.live is None:
            raise NotFound("no version to go back to")
        folder = self._versions / decision.live
        if not folder.exists():
            self.registry.fetch(decision.live, self._versions)
        return self.exchange(folder, decision.live, decision)

    def tidy(self, keep: set[str]) -> None:
        """Delete the folders of versions that nobody may want back."""
        self._proven.clear()
        for folder in self._versions.glob("*"):
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _align(self, status: EngineStatus) -> DrafterVersion | None:
        """Point ``live`` and ``previous`` at what the engine drafts with, as far as they do not."""
        if self._live and self._live.checksum == status.drafter_checksum:
            return self._live
        live = self.registry.resolve("live")
        if live is None or live.checksum != status.drafter_checksum:
            known = (v for v in self.registry.versions() if v.checksum == status.drafter_checksum)
            if (serving := next(known, None)) is None:
                self._restore(live, status)
                return None
            self._point_previous(serving)
            self.registry.point("live", serving.version)
            live = serving
        else:  # killed between the aliases of a promotion that was rolled back since, ``previous`` had moved alone
            self._point_previous(live)
        self._live = live
        return live

    def _point_previous(self, live: DrafterVersion) -> None:
        previous = self.journal.predecessor(live.version)
        if previous:
            self.registry.point("previous", previous)

    def _deliver(self) -> None:
        """Tell the registry what it has not been told, in order."""
        for decision in list(self.journal.undelivered()):
            self.registry.decide(decision)
            if decision.candidate and decision.evidence:
                measured = {f"{decision.action}/{name}": value for name, value in decision.evidence.items()}
                try:
                    self.registry.record(decision.candidate, measured)
                except NotFound:
                    log.warning("decided on version %s, which the registry does not know", decision.candidate)
            self.journal.mark_delivered()

    def _restore(self, live: DrafterVersion | None, status: EngineStatus) -> None:
        if live is None:
            log.warning("the engine drafts with %r, which the registry does not know", status.drafter)
            return
        reason = f"the engine drafted with unregistered weights {status.drafter_checksum[:12]}"
        decision = Decision(
            action="rollback", reason=reason, candidate=status.drafter, live=live.version, at=self.clock()
        )
        self.exchange(self.fetch(live, status)[0], live.version, decision)

    def _forget_damaged(self, version: DrafterVersion) -> None:
        """Delete our copy of a version unless it is whole, so that it is fetched again."""
        folder = self._versions / version.version
        if not folder.exists():
            return
        try:
            whole = checkpoint.checksum(checkpoint.verify(folder)[1].tensors) == version.checksum
        except DrafterRejected:
            whole = False
        if not whole:
            shutil.rmtree(folder)
