"""Who this engine is, in the words that traces, manifests and the embedded engine use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livedraft.contracts.settings import Settings
from livedraft.serving.local import place

NAME = "sglang"


@dataclass(frozen=True, slots=True)
class Identity:
    """The target that SGLang serves.  A drafter and a trace belong to exactly one."""

    engine: str
    target: str
    target_revision: str
    tokenizer_hash: str
    context_length: int
    #: Whether this is the rank that answers and captures for all.
    leads: bool


def identify(settings: Settings, server_args: Any, context_length: int, *, leads: bool) -> Identity:
    """Read the target's files: seconds to minutes for a large one, so nobody waits for it.

    Revision and tokenizer hash are those of the embedded engine.  The name is that of ``engine.target`` where this
    is the folder that SGLang serves, else SGLang's ``--model-path``.  Raises LivedraftError.
    """
    from livedraft.serving.local.text import Text

    served = str(server_args.model_path)
    folder = place.find(served)
    tokenizer = str(server_args.tokenizer_path or served)
    configured = settings.engine.target
    same = configured == "bundled" and place.find("bundled").samefile(folder)
    same = same or (Path(configured).is_dir() and Path(configured).samefile(folder))
    return Identity(
        engine=NAME,
        target=place.name(configured if same else served),
        target_revision=place.revision(folder),
        tokenizer_hash=Text(folder if tokenizer == served else place.find(tokenizer)).hash,
        context_length=context_length,
        leads=leads,
    )


class Drafting:
    """The version that proposes: read by whoever stamps a round, written between two batches by the swap alone."""

    def __init__(self, version: str = "initial") -> None:
        self.version = version
