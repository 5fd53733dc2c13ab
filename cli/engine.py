"""``livedraft engine``: the OpenAI endpoint with the embedded engine, as a process of its own."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from pathlib import Path

import msgspec
from livedraft.cli import wiring
from livedraft.cli.wiring_registry import open_registry
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, RegistryUnavailable
from livedraft.contracts.messages import DrafterVersion, Record, SwapRequest
from livedraft.contracts.settings import Settings
from livedraft.contracts.stopping import stopping

log = logging.getLogger(__name__)


class _Named(Record, frozen=True, kw_only=True):
    version: str
    checksum: str


class LastKnown:
    """The drafter that served last, in a folder of ours: registry and controller may be gone when we start again.

    known = LastKnown(folder)
    known.remember(checkpoint_folder, "7")
    folder, version = known.recall()     # None: nothing whole is there
    """

    def __init__(self, folder: Path) -> None:
        self._name = folder / "last.json"
        self._copies = folder / "last"

    def remember(self, source: Path, version: str) -> None:
        """Keep a copy of a checkpoint and forget the one before."""
        checksum = checkpoint.checksum(checkpoint.verify(source)[1].tensors)
        copy = self._copies / checksum
        if not copy.exists():
            self._copies.mkdir(parents=True, exist_ok=True)
            half = Path(tempfile.mkdtemp(prefix=".half-", dir=self._copies))
            shutil.copytree(source, half, dirs_exist_ok=True)
            half.rename(copy)
        half_name = self._name.with_suffix(".half")
        half_name.write_bytes(msgspec.json.encode(_Named(version=version, checksum=checksum)))
        half_name.replace(self._name)
        for other in self._copies.iterdir():
            if other != copy:
                shutil.rmtree(other, ignore_errors=True)

    def recall(self) -> tuple[Path, str] | None:
        """Folder and version of the last one, if it is there and whole."""
        try:
            named = msgspec.json.decode(self._name.read_bytes(), type=_Named)
            copy = self._copies / named.checksum
            whole = checkpoint.checksum(checkpoint.verify(copy)[1].tensors) == named.checksum
        except (OSError, msgspec.DecodeError, DrafterRejected) as error:
            log.debug("no last drafter: %s", error)
            return None
        return (copy, named.version) if whole else None

    def swapped(self, request: SwapRequest) -> None:
        """Remember what was swapped in; that it cannot be kept harms nobody now."""
        try:
            self.remember(Path(request.path), request.version)
        except (OSError, DrafterRejected) as error:
            log.warning("version %s serves, but could not be kept for the next start: %s", request.version, error)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    folder = Path(settings.engine.folder).resolve()
    known = LastKnown(folder)
    with stopping() as stop:
        if (first := _first(settings, folder, known, stop)) is None:
            return
        log.info("drafting with version %s", first[1])
        wiring.serve(settings, *first, stop=stop, swapped=known.swapped)


def _first(settings: Settings, folder: Path, known: LastKnown, stop: threading.Event) -> tuple[Path, str] | None:
    """Folder and version to start with; None when ``stop`` came first.

    The registry's live drafter or, where there is none, a fresh one that becomes version 1.  While the registry does
    not answer: the one that served here last, or wait.
    """
    registry = open_registry(settings.registry)

    def ask() -> tuple[Path, DrafterVersion]:
        return wiring.live_drafter(settings, registry, folder)

    try:
        found = ask()
    except RegistryUnavailable as error:
        if last := known.recall():
            log.warning("%s; starting with version %s, which served last", error, last[1])
            return last
        if (waited := wiring.once_answered(ask, stop)) is None:
            return None
        found = waited
    drafter, live = found
    known.remember(drafter, live.version)
    return drafter, live.version
