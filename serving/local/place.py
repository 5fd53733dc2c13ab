"""Where a target lies and what it is called; without torch, for processes that only read its text."""

from __future__ import annotations

import hashlib
from pathlib import Path

from livedraft.contracts.errors import BadRequest


def find(name: str) -> Path:
    """Folder of a target: "bundled", a path, or a Hugging Face id (downloaded when absent from its cache)."""
    if name == "bundled":
        return Path(__file__).parents[2] / "models" / "tiny"
    return fetch(name, "target")


def fetch(name: str, field: str) -> Path:
    """Folder of a path or a Hugging Face id.  Raises BadRequest in terms of ``field``."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadRequest(
            f"{name!r} is neither a folder nor a Hugging Face id that can be fetched: {error}", field=field
        ) from error


def name(target: str) -> str:
    """What the target of the setting ``engine.target`` is called: in ``/v1/models``, traces and manifests."""
    return "livedraft-tiny" if target == "bundled" else target


def revision(folder: Path) -> str:
    """First 16 hex digits of the sha256 over config and weight files: which target this is, whatever its path."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:16]
