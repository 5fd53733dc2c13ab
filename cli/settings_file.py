"""Write settings as the TOML file that child processes read."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from livedraft.contracts.settings import Settings


def write_settings(settings: Settings, path: Path) -> Path:
    """TOML of every section; ``contracts.settings.load`` gives the same settings back.

    JSON's spelling of strings, numbers, booleans and lists of them is TOML's too; None is left out.
    """
    lines = []
    for section, fields in msgspec.to_builtins(settings).items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in fields.items() if value is not None]
    path.write_text("\n".join(lines) + "\n")
    return path
