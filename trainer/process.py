"""The trainer as a process of its own: starts from a registered drafter."""

from __future__ import annotations

import threading
from pathlib import Path

from livedraft.contracts import checkpoint
from livedraft.contracts.ports import Registry, TraceSource
from livedraft.contracts.settings import Trainer as Settings
from livedraft.trainer.learner import Learner, TargetId, low_precision
from livedraft.trainer.loop import run
from livedraft.trainer.model import Drafter
from livedraft.trainer.prefill import Prefill
from livedraft.trainer.ranks import Ranks
from livedraft.trainer.target import read_target


def main(
    settings: Settings,
    *,
    target_folder: Path,
    drafter_folder: Path,
    version: str | None,
    source: TraceSource,
    registry: Registry | None,
    held_out: float,
    stop: threading.Event,
    until_drained: bool = False,
    ranks: Ranks | None = None,
) -> None:
    """Learn from ``source``, starting at the drafter in ``drafter_folder`` (registry version ``version``).

    A checkpoint in ``settings.folder`` goes before it.  ``stop`` ends the step in hand, saves and returns; the
    target's identity is the drafter's manifest's.  Of several ``ranks`` each calls it, the first with a registry.
    Raises DrafterRejected or SettingsError before it starts.
    """
    _, manifest = checkpoint.verify(drafter_folder)
    identity = TargetId(
        target=manifest.target, target_revision=manifest.target_revision, tokenizer_hash=manifest.tokenizer_hash
    )
    target = read_target(target_folder)
    drafter = Drafter.from_checkpoint(drafter_folder, target.embedding)
    learner = Learner(
        drafter,
        identity,
        settings,
        held_out=held_out,
        layers=target.feature_layers,
        prefill=prefill_of(target_folder, settings),
        ranks=ranks,
    )
    run(learner, source, registry, settings, stop, parent=version, until_drained=until_drained)


def prefill_of(target_folder: Path, settings: Settings) -> Prefill:
    """What completes traces for the trainer, and for whoever replays them."""
    return Prefill(
        target_folder,
        scope=settings.recompute,
        tokens=settings.recompute_tokens,
        low_precision=low_precision(settings),
    )
