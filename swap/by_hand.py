"""Promotion and rollback by an operator: the controller's way, without its gate and its watch."""

from __future__ import annotations

from livedraft.contracts.errors import SwapFailed
from livedraft.contracts.messages import Decision
from livedraft.swap.swapper import Swapper


def promote(swapper: Swapper, version: str) -> Decision:
    """Swap to a registered version.

    One that the engine was started with, instead of what was decided before, is only written down: from then on it is
    what is intended.  Raises NotFound for an unknown version, DrafterRejected when it is not fit for the engine,
    SwapFailed when it is live already or the engine does not confirm, RegistryUnavailable.
    """
    with swapper.journal.alone():
        status = swapper.settle()
        live = swapper.inform(status)
        wanted = swapper.registry.get(version)
        held = wanted.checksum == status.drafter_checksum
        if held and swapper.journal.served in (None, version):
            raise SwapFailed(f"version {version} is live already")
        folder = swapper.fetch(wanted, status)[0]
        decision = Decision(
            action="promote",
            reason="by hand",
            candidate=version,
            live=live.version if live else None,
            at=swapper.clock(),
        )
        if held:
            swapper.journal.append(decision)
        else:
            decision = swapper.exchange(folder, version, decision)
        swapper.inform(swapper.settle())
        return decision


def rollback(swapper: Swapper) -> Decision:
    """Swap back to the version that ``previous`` points at.  Raises as ``promote``, SwapFailed without one."""
    with swapper.journal.alone():
        status = swapper.settle()
        live = swapper.inform(status)
        previous = swapper.registry.resolve("previous")
        if previous is None or live is None or previous.checksum == live.checksum:
            raise SwapFailed("there is no previous version to go back to")
        folder = swapper.fetch(previous, status)[0]
        decision = Decision(
            action="rollback", reason="by hand", candidate=live.version, live=previous.version, at=swapper.clock()
        )
        decision = swapper.exchange(folder, previous.version, decision)
        swapper.inform(swapper.settle())
        return decision
