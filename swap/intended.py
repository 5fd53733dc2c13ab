"""What engines ought to draft with whose own start does not know: SGLang begins with the drafter of its command line.

The embedded engine starts again with what served last, so its checksum is the truth.  SGLang's is not: one that was
restarted is given what was last decided or, before anything was, what the registry calls live.
"""

from __future__ import annotations

from livedraft.contracts import checkpoint
from livedraft.contracts.messages import SwapRequest
from livedraft.contracts.ports import Registry
from livedraft.swap.journal import Journal


class Intended:
    """Asked at each look at the engines; needs the registry only until something has been decided here."""

    def __init__(self, registry: Registry, journal: Journal) -> None:
        self._registry = registry
        self._journal = journal
        self._known: SwapRequest | None = None

    def __call__(self) -> SwapRequest | None:
        """The version they are to have; None while a swap is under way, or when there is none yet.

        Raises RegistryUnavailable, NotFound, and DrafterRejected for a copy that was damaged.
        """
        if self._journal.exchange is not None:
            return None
        version = self._journal.served
        if version is None:
            live = self._registry.resolve("live")
            version = live.version if live else None
        if version is None:
            return None
        if self._known is None or self._known.version != version:
            versions = self._journal.folder / "versions"
            folder = versions / version
            if not folder.exists():
                folder = self._registry.fetch(version, versions)
            checksum = checkpoint.checksum(checkpoint.verify(folder)[1].tensors)
            self._known = SwapRequest(path=str(folder), version=version, checksum=checksum)
        return self._known
