"""What a registry keeps about a version besides its files: where it came from, as searchable strings."""

from __future__ import annotations

import json

from livedraft.contracts.checkpoint import lineage
from livedraft.contracts.messages import Manifest


def lineage_tags(manifest: Manifest) -> dict[str, str]:
    """Tags of a version; ``offsets`` is a JSON object, partition to the next offset to read."""
    return {
        "target": manifest.target,
        "target_revision": manifest.target_revision,
        "tokenizer_hash": manifest.tokenizer_hash,
        "tokens_trained": str(manifest.tokens_trained),
        "steps": str(manifest.steps),
        "lineage": lineage(manifest.tensors),
        "vocabulary": manifest.vocabulary,
        "offsets": json.dumps(manifest.offsets, sort_keys=True),
    }
