"""What SGLang drafts with: the checkpoint it started from, proven, and those that replace it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.errors import DrafterRejected, LivedraftError, SwapFailed
from livedraft.contracts.messages import SwapRequest
from livedraft.serving.sglang.identity import Drafting, Identity
from livedraft.serving.sglang.weights import Image, LiveWeights
from torch import Tensor

log = logging.getLogger(__name__)

#: Seconds between two looks at the parameters themselves.
_AUDIT_S = 60.0

#: Fields in which a candidate's config.json must equal the running drafter's: shapes, and arithmetic no tensor shows.
_ALIKE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
)


class ServedDrafter:
    """``exchange.Weights`` of one rank.

    The one in service and the one before it stay in memory: going back needs no disk.
    """

    def __init__(self, live: LiveWeights, config: Any, target_ids: Tensor | None, drafting: Drafting) -> None:
        """``config`` and ``target_ids`` are SGLang's: the drafter's, and the target's id of each draft row."""
        self._live = live
        self._config = config
        self._target_ids = None if target_ids is None else target_ids.cpu()
        self._drafting = drafting
        self._identity: Identity | None = None
        self._current: Image | None = None
        self._previous: Image | None = None
        self._copied: Image | None = None
        self._wait: Callable[[], float] = lambda: 0.0
        #: Grows with every copy, so that an audit knows whether one came between.
        self._copies = 0
        self._foreign = False
        self._audited_at = 0.0
        self._ready = threading.Event()
        self._unfit = ""

    @property
    def version(self) -> str:
        """Of what the engine holds; "" while that is not known."""
        return self._current.version if self._current and not self._foreign else ""

    @property
    def checksum(self) -> str:
        """Of what the engine holds; "" while that is not known."""
        return self._current.checksum if self._current and not self._foreign else ""

    def prove(self, folder: Path, identity: Identity) -> None:
        """Hold the parameters against the folder that SGLang loaded; until then nothing can be swapped.

        Raises LivedraftError where they are not what the model's loader makes of it (quantised, repacked for the
        device): what is copied in later would be as wrong.
        """
        try:
            self._identity = identity
            tensors = _read(folder)
            image = self._live.image(self._drafting.version, _checksum(tensors), tensors)
            if "lm_head.weight" not in self._live.names:
                raise SwapFailed("the drafter's head is the target's; only one with a head of its own can be swapped")
            if name := self._live.difference(image):
                raise SwapFailed(f"parameter {name} is not what SGLang's loader makes of {folder}: it was repacked")
            self._current = image
        except Exception as error:
            self._unfit = str(error) if isinstance(error, LivedraftError) else f"{type(error).__name__}: {error}"
            raise
        finally:
            self._ready.set()

    def audit(self) -> None:
        """Look whether somebody else has written the parameters, through SGLang's own routes for instance."""
        current, copies = self._current, self._copies
        if current is None or self._copied not in (None, current) or self._foreign:
            return
        if (name := self._live.difference(current)) and copies == self._copies:
            log.error("parameter %s was changed by others: which drafter this is, is not known any more", name)
            self._foreign = True

    def audit_by_and_by(self) -> None:
        """``audit`` on a thread, unless that was done lately."""
        if time.monotonic() - self._audited_at > _AUDIT_S:
            self._audited_at = time.monotonic()
            threading.Thread(target=self.audit, name="livedraft-audit", daemon=True).start()

    def stage(self, request: SwapRequest) -> Image:
        """As ``exchange.Weights``."""
        self._ready.wait()
        if self._current is None or self._identity is None:
            raise SwapFailed(f"this engine does not swap: {self._unfit}")
        for held in (self._current, self._previous):
            if held is not None and held.checksum == request.checksum:
                return replace(held, version=request.version)
        folder = Path(request.path)
        config, manifest = checkpoint.verify(
            folder, target_revision=self._identity.target_revision, tokenizer_hash=self._identity.tokenizer_hash
        )
        found = checkpoint.checksum(manifest.tensors)
        if found != request.checksum:
            raise SwapFailed(f"checksum of {folder} is {found[:12]}, expected {request.checksum[:12]}")
        self._require_alike(config)
        tensors = {name: torch.from_numpy(array) for name, array in checkpoint.load(folder).items()}
        self._require_vocabulary(tensors["d2t"])
        return self._live.image(request.version, found, tensors)

    def settle(self) -> None:
        """As ``exchange.Weights``."""
        self._live.settle()

    def apply(self, staged: Image) -> None:
        """As ``exchange.Weights``."""
        self._copies += 1
        self._copied = staged
        self._wait = self._live.write(staged)

    def confirm(self) -> float:
        """As ``exchange.Weights``."""
        assert self._copied is not None
        seconds = self._wait()
        if name := self._live.difference(self._copied):
            raise SwapFailed(f"parameter {name} does not hold what was copied into it")
        return seconds

    def restore(self) -> None:
        """As ``exchange.Weights``."""
        assert self._current is not None
        self.apply(self._current)

    def keep(self) -> None:
        """As ``exchange.Weights``."""
        assert self._copied is not None
        assert self._current is not None
        if self._copied.checksum != self._current.checksum:
            self._previous = self._current
        self._current, self._foreign = self._copied, False

    def _require_alike(self, config: DrafterConfig) -> None:
        running = running_fields(self._config)
        for field in _ALIKE:
            if (wanted := running.get(field)) is not None and getattr(config, field) != wanted:
                raise DrafterRejected(
                    f"config.json: {field} is {getattr(config, field)}, the drafter in service has {wanted}"
                )

    def _require_vocabulary(self, d2t: Tensor) -> None:
        """SGLang keeps the map it started with, so a candidate must have the same."""
        rows = torch.arange(len(d2t))
        running = rows if self._target_ids is None else self._target_ids
        if not torch.equal(d2t + rows, running):
            raise DrafterRejected("tensor d2t: differs from the drafter's in service; its vocabulary cannot be swapped")


def running_fields(config: Any) -> dict[str, Any]:
    """``_ALIKE`` of a transformers config, as far as it has them."""
    fields = {name: getattr(config, name, None) for name in _ALIKE}
    if fields["head_dim"] is None:
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
    rotary = getattr(config, "rope_parameters", None) or {}
    fields["rope_theta"] = rotary.get("rope_theta", fields["rope_theta"])
    return fields


def _read(folder: Path) -> dict[str, Tensor]:
    """A drafter's tensors as published: safetensors, or torch's own format.  Raises SwapFailed."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    if files := sorted(folder.glob("*.safetensors")):
        for file in files:
            tensors |= load_file(file)
    else:
        for file in sorted(folder.glob("*.bin")):
            tensors |= torch.load(file, map_location="cpu", weights_only=True)
    if not tensors:
        raise SwapFailed(f"{folder} holds neither .safetensors nor .bin files")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    words = {name: tensor.reshape(-1).contiguous().view(torch.uint8).numpy() for name, tensor in tensors.items()}
    return checkpoint.checksum(checkpoint.hash_tensors(words))
