"""Held-out prompts of the bundled target: openings of documents it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

from livedraft.contracts.errors import SettingsError

_FILE = Path(__file__).parents[1] / "models" / "tiny" / "prompts.jsonl"


def held_out_prompts(domain: str | None = None) -> list[str]:
    """Prompts of one domain ("prose" or "code"), or of both in turn."""
    rows = [json.loads(line) for line in _FILE.read_text().splitlines()]
    prose = [row["text"] for row in rows if row["domain"] == "prose"]
    code = [row["text"] for row in rows if row["domain"] == "code"]
    if domain is None:
        return [text for pair in zip(prose, code, strict=False) for text in pair]
    if domain not in ("prose", "code"):
        raise SettingsError(f"domain {domain!r}, expected prose or code")
    return prose if domain == "prose" else code
