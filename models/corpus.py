"""Text the bundled target is trained on: two clearly different domains, split by document.

*prose*: the King James Version (public domain; Debian's ``bible-kjv`` prints it).
*code*: the Python standard library's own source (PSF licence), without its tests.

A document is a chapter or a source file.  One in ten, picked by a hash of its name, is held out: the target
never sees it, and the prompts that the demo, the tests and the benchmarks send all come from there.
"""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Domain = Literal["prose", "code"]

# Generated tables and word lists: long, licence-free of interest, and nothing a reader would call source.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__", "lib2to3"}


@dataclass(frozen=True, slots=True)
class Document:
    """One chapter or one source file."""

    domain: Domain
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether this document is kept from training (one in ten, by its name alone)."""
        return hashlib.sha256(self.name.encode()).digest()[0] % 10 == 0


def read_prose(path: Path | None = None) -> list[Document]:
    """The King James Version, a document per chapter, a line per verse.

    ``path`` is what ``bible -f Gen1:1-Rev22:21`` prints (``Ge1:1 In the beginning ...``); without it that
    command is run.  Raises FileNotFoundError with the package's name when it is not installed.
    """
    if path is not None:
        dump = path.read_text()
    else:
        try:
            dump = subprocess.run(
                ["bible", "-f", "Gen1:1-Rev22:21"], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
            ).stdout
        except FileNotFoundError:
            raise FileNotFoundError("the `bible` command is missing: apt-get install bible-kjv") from None
    chapters: dict[str, list[str]] = {}
    for line in dump.splitlines():
        verse = re.match(r"^(\w+?)(\d+):(\d+) (.*)$", line)
        if verse:
            chapters.setdefault(f"{verse[1]} {verse[2]}", []).append(verse[4])
    return [Document("prose", name, "\n".join(verses) + "\n") for name, verses in chapters.items()]


def read_code(root: Path | None = None) -> list[Document]:
    """The ``.py`` files of a standard library (this interpreter's by default), tests and tables left out."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        text = path.read_text(errors="ignore").expandtabs(4)
        if 400 < len(text) < 400_000:
            documents.append(Document("code", str(relative), text))
    return documents


def passages(document: Document, rng: random.Random, lines: tuple[int, int] = (8, 28)) -> list[tuple[str, str]]:
    """Cut a document into (opening, continuation) pairs at line ends, every line used once.

    Code is cut where a definition or class starts when one is near, so that an opening is a signature.
    """
    rows = document.text.splitlines(keepends=True)
    pairs, at = [], 0
    while at < len(rows):
        end = min(len(rows), at + rng.randint(*lines))
        if document.domain == "code":
            starts = [
                i for i in range(at + 4, min(len(rows), end + 12)) if re.match(r"\s*(def|class|async def) ", rows[i])
            ]
            end = min(starts, key=lambda i: abs(i - end), default=end)
        block = rows[at:end]
        at = end
        opening_lines = 1 if document.domain == "prose" else min(rng.randint(1, 4), max(1, len(block) // 2))
        opening = "".join(block[:opening_lines])
        if len(block) > opening_lines and 12 <= len(opening.strip()) <= 400:
            pairs.append((opening, "".join(block[opening_lines:])))
    return pairs
