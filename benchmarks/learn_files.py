"""What a learner's process reads and writes.  Without the engine: its memory is measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.messages import Manifest, Trace
from livedraft.contracts.settings import Trainer as TrainerSettings
from livedraft.serving.local import place
from livedraft.traces.codec import decode
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import read_target


def read(path: Path) -> list[Trace]:
    """The traces in a file that ``record`` wrote."""
    return [decode(message) for message in msgspec.msgpack.decode(path.read_bytes(), type=list[bytes])]


def learner_of(start: Path, like: Trace, settings: TrainerSettings, target: str) -> Learner:
    """A learner that begins with the checkpoint ``start`` and takes traces of the target that ``like`` is of."""
    torch.set_num_threads(settings.threads)
    embedding = read_target(place.find(target)).embedding
    identity = TargetId(target=like.target, target_revision=like.target_revision, tokenizer_hash=like.tokenizer_hash)
    return Learner(Drafter.from_checkpoint(start, embedding), identity, settings)


def write_candidate(learner: Learner, folder: Path) -> None:
    """What the learner would publish now, as a checkpoint."""
    manifest = Manifest(
        tensors={},
        target=learner.target.target,
        target_revision=learner.target.target_revision,
        tokenizer_hash=learner.target.tokenizer_hash,
        tokens_trained=learner.tokens,
        steps=learner.steps,
    )
    checkpoint.write(folder, learner.drafter.config, learner.candidate(), manifest)
