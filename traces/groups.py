"""What each consumer group has used, kept beside the segments: ``groups/<group>.json``, replaced whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec
from livedraft.contracts.errors import SettingsError, TraceError
from livedraft.contracts.messages import Offsets
from livedraft.traces.spool import sync_folder


class GroupOffsets:
    """The durable offsets of one consumer group.  One process commits for a group at a time.

    Raises SettingsError for a group name that is no plain file name.
    """

    def __init__(self, folder: Path, group: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", group):
            raise SettingsError(f"consumer group {group!r}: expected letters, digits, '_', '.' and '-'")
        self._path = folder / "groups" / f"{group}.json"

    def load(self) -> Offsets:
        """What was stored last; nothing for a new group.  Raises TraceError for a file that was tampered with."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, int])
        except FileNotFoundError:
            return {}
        except msgspec.DecodeError as error:
            raise TraceError(f"{self._path}: {error}") from error

    def store(self, offsets: Offsets) -> None:
        """Replace them: after a crash at any moment the old or the new ones are there.  Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        half = self._path.with_suffix(".tmp")
        with half.open("wb") as file:
            file.write(msgspec.json.encode(offsets))
            file.flush()
            os.fsync(file.fileno())
        half.replace(self._path)
        sync_folder(self._path.parent)
