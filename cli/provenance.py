"""Where a number comes from: commit, versions, machine, command line."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """What every report carries."""
    root = Path(__file__).parents[1]
    # The commit of our own checkout, or none: an installed wheel must not report its surroundings'.
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False) if (root / ".git").exists() else None
    return {
        "commit": commit.stdout.strip() if commit and commit.returncode == 0 else None,
        "argv": sys.argv,
        "versions": dict(_versions("livedraft", "torch", "transformers", "mlflow-skinny", "sglang")),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def _versions(*names: str) -> Iterator[tuple[str, str]]:
    """Of those that are installed here."""
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def write(report: dict[str, Any], place: Path | None) -> None:
    """Print a report, or write it to ``place`` ("-" is standard output)."""
    text = json.dumps(report, indent=2)
    if place is None or str(place) == "-":
        print(text)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text + "\n")
