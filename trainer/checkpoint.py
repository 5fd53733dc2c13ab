"""Learner checkpoints: complete or not there, and never half-read.

    <folder>/step-00000120/state.msgpack        offsets, counters, replay order, dedupe window, random state
                          /tensors.safetensors  weights and optimiser moments
                          /seal.json            sha256 of both, and of every trace that replay holds
    <folder>/traces/<sha256>                    those traces, encoded; shared by checkpoints, written once

The consumed offsets lie in the same folder as the weights that consumed them: after any death the two agree.

Ranks write one checkpoint, in a folder that all of them reach: each its traces, rank 0 the rest.  Nothing in it tells
how many they were, so any number goes on from it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import msgspec
from livedraft.contracts.errors import TraceError
from livedraft.contracts.messages import Record, Trace
from livedraft.traces.codec import decode, encode
from livedraft.trainer.learner import Learner, LearnerState
from livedraft.trainer.ranks import Ranks
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

_log = logging.getLogger(__name__)


class _Seal(Record, frozen=True, kw_only=True):
    files: dict[str, str]
    #: Trace id -> sha256 of its file.
    traces: dict[str, str]


#: State, tensors, traces by id, and where those are.
_Found = tuple[LearnerState, dict[str, Tensor], dict[str, Trace], dict[str, str]]


class Checkpoints:
    """The last ``keep`` checkpoints of a learner in ``folder``.  One learner at a time, all its ranks at once."""

    def __init__(self, folder: Path, *, keep: int = 2, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._folder = folder
        self._traces = folder / "traces"
        self._keep = keep
        #: Trace id -> the trace as it was written, and its file.  One that is prefilled later is another one.
        self._written: dict[str, tuple[Trace, str]] = {}
        self._latest: Path | None = None

    def save(self, learner: Learner) -> Path:
        """Write a checkpoint durably, then drop old ones.  Writes nothing when nothing was learned or read since."""
        plain, tensors, traces = learner.state()
        place = self._folder / f"step-{plain.steps:010d}-{sum(plain.counts.values()):010d}"
        if place == self._latest:
            return place
        self._traces.mkdir(parents=True, exist_ok=True)
        self._written = {trace.trace_id: (trace, self._keep_trace(trace)) for trace in traces}
        mine = {name: sha256 for name, (_, sha256) in self._written.items()}
        _sync(self._traces)
        written = {name: sha256 for files in self._ranks.gather(mine) for name, sha256 in files.items()}
        self._ranks.lead(lambda: self._seal(place, plain, tensors, written))
        self._latest = place
        return place

    def _seal(self, place: Path, plain: LearnerState, tensors: dict[str, Tensor], traces: dict[str, str]) -> None:
        files = {
            "state.msgpack": msgspec.msgpack.encode(plain),
            "tensors.safetensors": save_tensors({name: t.contiguous() for name, t in tensors.items()}),
        }
        seal = _Seal(files={name: _sha256(data) for name, data in files.items()}, traces=traces)
        half = Path(tempfile.mkdtemp(prefix=".half-", dir=self._folder))
        for name, data in {**files, "seal.json": msgspec.json.encode(seal)}.items():
            _write(half / name, data)
        _sync(half)
        shutil.rmtree(place, ignore_errors=True)
        half.rename(place)
        _sync(self._folder)
        self._prune()

    def load(self, learner: Learner) -> Path | None:
        """Bring ``learner`` to the newest checkpoint that is whole; None when there is none.

        Torn or damaged ones are passed over, with a warning each.
        """
        for place in self._ranks.lead(self._places):
            found, error = self._try(place)
            if errors := [told for told in self._ranks.gather(error) if told]:
                _log.warning("checkpoint %s passed over: %s", place.name, errors[0])
            elif found:
                plain, tensors, traces, files = found
                learner.restore(plain, tensors, traces)
                self._written = {name: (trace, files[name]) for name, trace in traces.items()}
                return place
        return None

    def _try(self, place: Path) -> tuple[_Found | None, str]:
        try:
            return self._read(place), ""
        except (OSError, ValueError, msgspec.DecodeError, SafetensorError, TraceError) as error:
            return None, str(error) or repr(error)

    def _read(self, place: Path) -> _Found:
        """All but the traces that are other ranks' to hold."""
        seal = msgspec.json.decode((place / "seal.json").read_bytes(), type=_Seal)
        files = {name: _read_sealed(place / name, sha256) for name, sha256 in seal.files.items()}
        mine = {n: sha256 for n, sha256 in seal.traces.items() if self._ranks.holder(n) == self._ranks.rank}
        traces = {name: decode(_read_sealed(self._traces / sha256, sha256)) for name, sha256 in mine.items()}
        plain = msgspec.msgpack.decode(files["state.msgpack"], type=LearnerState)
        return plain, load_tensors(files["tensors.safetensors"]), traces, mine

    def _keep_trace(self, trace: Trace) -> str:
        known, sha256 = self._written.get(trace.trace_id, (None, ""))
        if known is trace:
            return sha256
        data = encode(trace)
        name = _sha256(data)
        if not (self._traces / name).exists():
            half = self._traces / f".{name}"
            _write(half, data)
            half.rename(self._traces / name)
        return name

    def _prune(self) -> None:
        places = self._places()
        for old in places[self._keep :]:
            shutil.rmtree(old)
        for half in self._folder.glob(".half-*"):
            shutil.rmtree(half)
        held: set[str] = set()
        for place in places[: self._keep]:
            try:
                held.update(msgspec.json.decode((place / "seal.json").read_bytes(), type=_Seal).traces.values())
            except (OSError, msgspec.DecodeError):
                continue  # torn: load passes it over too
        for path in self._traces.iterdir():
            if path.name not in held:
                path.unlink()

    def _places(self) -> list[Path]:
        """Newest first."""
        return sorted(self._folder.glob("step-*"), reverse=True)


def _read_sealed(path: Path, sha256: str) -> bytes:
    data = path.read_bytes()
    if _sha256(data) != sha256:
        raise ValueError(f"{path.name} differs from its seal")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
