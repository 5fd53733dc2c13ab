"""The frozen target, run over a trace's text: the features that no engine sent, and its word where none verified.

An engine may leave features out (``traces.features = "recompute"``), lack those of a cached prefix, or know nothing of
us, so that only text is left of what it served.  The target is frozen: what it computes over the same text is what the
engine saw, up to rounding.  One pass over a sequence gives all of it, since text is causal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import Array, Features, Rounds, Trace
from livedraft.traces.arrays import from_numpy, to_numpy
from livedraft.trainer.target import feature_layers, read_config
from msgspec.structs import replace
from torch import Tensor, nn

_log = logging.getLogger(__name__)

#: Rows of logits that exist at once: a vocabulary may have 150,000 tokens.
_LOGIT_ROWS = 256

#: Which traces are prefilled: none; those without features or without the target's word; those, too, whose features
#: begin behind a prefix that the engine had cached.
Scope = Literal["never", "absent", "partial"]


class Prefill:
    """Completes traces by the target in ``folder``, which is read when the first one needs it.

    lacking = [trace for trace in traces if not is_whole(trace, width) and prefill.can_fill(trace)]
    traces = prefill.fill(lacking)

    At most ``tokens`` positions go through the target at once: short sequences together, a long one in pieces.
    Its weights stay in memory as float32, or bfloat16 with ``low_precision``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        scope: Scope = "absent",
        tokens: int = 2048,
        topk: int = 32,
        low_precision: bool = False,
    ) -> None:
        config = read_config(folder)
        self.layers = feature_layers(config["num_hidden_layers"])
        self._vocab: int = config["vocab_size"]
        self._folder = folder
        self._scope = scope
        self._tokens = tokens
        self._topk = topk
        self._dtype = torch.bfloat16 if low_precision else torch.float32
        self._model: _FrozenTarget | None = None
        self._unfit = ""

    def can_fill(self, trace: Trace) -> bool:
        """Whether ``fill`` makes this trace whole.  The first such question reads the target, which takes a while."""
        if self._scope == "never" or (trace.features.values is not None and self._scope != "partial"):
            return False
        if trace.features.layers not in ((), self.layers) or not trace.prompt.shape[0] or trace.output.shape[0] < 2:
            return False
        return int(_text(trace).max()) < self._vocab and self._is_ready

    @torch.inference_mode()
    def fill(self, traces: Sequence[Trace]) -> list[Trace]:
        """Each trace with features of all its positions, and with the target's word on its output where it has none."""
        filled: dict[int, Trace] = {}
        for group in self._groups(traces):
            assert self._model is not None, "only what can_fill agreed to is filled"
            found = self._model.read([_text(traces[place]) for place in group], self._tokens)
            filled |= {place: self._filled(traces[place], read) for place, read in zip(group, found, strict=True)}
        return [filled[place] for place in range(len(traces))]

    @property
    def _is_ready(self) -> bool:
        if self._model is None and not self._unfit:
            try:
                self._model = _FrozenTarget(self._folder, self.layers, self._dtype)
                _log.info("traces without features are prefilled by the target in %s", self._folder)
            except SettingsError as error:
                self._unfit = str(error)
                _log.warning("traces without features teach nothing: %s", error)
        return self._model is not None

    def _groups(self, traces: Sequence[Trace]) -> Iterator[list[int]]:
        """Indices of traces of like length, to be padded to the longest of them."""
        group: list[int] = []
        for place in sorted(range(len(traces)), key=lambda i: -_length(traces[i])):
            if group and (len(group) + 1) * _length(traces[group[0]]) > self._tokens:
                yield group
                group = []
            group.append(place)
        if group:
            yield group

    def _filled(self, trace: Trace, found: _Read) -> Trace:
        assert self._model is not None
        values = found.features.bfloat16().view(torch.int16).numpy().view(np.uint16)
        features = Features(mode="inline", layers=self.layers, values=from_numpy(values, "bf2"))
        if trace.rounds.root.shape[0]:
            return replace(trace, features=features)
        prompt = trace.prompt.shape[0]
        word = self._model.word(found.outputs[prompt - 1 :], trace.top_temperature, self._topk)
        return replace(trace, features=features, rounds=_plain_rounds(_text(trace), prompt, word))


@dataclass(frozen=True)
class _Read:
    """What the target computed over T tokens; the last is read by nobody."""

    #: f[T - 1, 3H] and, after its final norm, f[T - 1, H].
    features: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class _Word:
    """The target's distribution at n positions: i64[n, K], f[n, K], f[n]."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor


class _FrozenTarget:
    """A causal LM of transformers.  Raises SettingsError where it cannot be read or tells its parts otherwise."""

    def __init__(self, folder: Path, layers: Sequence[int], dtype: torch.dtype) -> None:
        try:
            from transformers import AutoModelForCausalLM
            from transformers import logging as transformers_logging
        except ImportError as error:
            raise SettingsError("transformers is missing: pip install 'livedraft[engine]'") from error
        transformers_logging.disable_progress_bar()
        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise SettingsError(f"target {folder}: {error}") from error
        if missing := sorted(told["missing_keys"]):  # transformers draws them by chance, and says so in its log
            raise SettingsError(f"target {folder}: tensor {missing[0]}: missing")
        model.eval().requires_grad_(False)
        self._body: nn.Module = model.base_model
        blocks = getattr(self._body, "layers", None)
        head = model.get_output_embeddings()
        if not isinstance(blocks, nn.ModuleList) or head is None:
            raise SettingsError(f"target {folder}: {type(model).__name__} has no plain list of layers and head")
        self._head: nn.Module = head
        self._layers = layers
        self._seen: dict[int, Tensor] = {}
        for layer in layers:
            blocks[layer].register_forward_hook(self._keep(layer))
        self._require_plain_head(model, folder)

    def read(self, texts: Sequence[np.ndarray], tokens: int) -> list[_Read]:
        """What is known after each token of ``texts`` but the last; in pieces of at most ``tokens`` positions in all.

        Sequences are padded behind their ends, where nothing before can see it.
        """
        from transformers import DynamicCache

        lengths = [len(text) - 1 for text in texts]
        ids = torch.zeros(len(texts), max(lengths), dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text) - 1] = torch.from_numpy(text[:-1])
        piece = max(tokens // len(texts), 1)
        cache = DynamicCache() if piece < ids.shape[1] else None
        features, outputs = [], []
        for begin, end in pairwise([*range(0, ids.shape[1], piece), ids.shape[1]]):
            outputs.append(self._run(ids[:, begin:end], cache))
            features.append(torch.cat([self._seen[layer] for layer in self._layers], -1))
        self._seen.clear()
        known, final = torch.cat(features, 1), torch.cat(outputs, 1)
        return [_Read(known[row, :length], final[row, :length]) for row, length in enumerate(lengths)]

    def word(self, outputs: Tensor, temperature: float, topk: int) -> _Word:
        """The ``topk`` likeliest tokens after each of ``outputs`` f[n, H], and the rest's probability."""
        found = []
        for rows in torch.split(outputs, _LOGIT_ROWS):
            logprobs = torch.log_softmax(self._head(rows).float() / temperature, -1)
            best = logprobs.topk(min(topk, logprobs.shape[-1]))
            found.append((best.indices, best.values, (1 - best.values.exp().sum(-1)).clamp(min=0)))
        return _Word(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _run(self, ids: Tensor, cache: Any) -> Tensor:
        outputs: Tensor = self._body(ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state
        return outputs

    def _keep(self, layer: int) -> Any:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            self._seen[layer] = output if isinstance(output, Tensor) else output[0]

        return keep

    def _require_plain_head(self, model: Any, folder: Path) -> None:
        """Some families scale or cap their logits: proven on two tokens instead of believed of a family."""
        ids = torch.tensor([[0, 1]])
        with torch.inference_mode():
            logits, alone = model(ids, use_cache=False).logits.float(), self._head(self._run(ids, None)).float()
        if not torch.allclose(logits, alone, rtol=1e-2, atol=1e-2):
            raise SettingsError(f"target {folder}: {type(model).__name__} does more to its logits than its head")


def is_whole(trace: Trace, width: int) -> bool:
    """Whether a trace has features of ``width`` that cover prompt and output, and the target's word on its output."""
    values = trace.features.values
    return (
        values is not None
        and values.shape[1] == width
        and trace.features.start == 0
        and values.shape[0] >= _length(trace) - 1
        and trace.rounds.root.shape[0] > 0
    )


def _plain_rounds(text: np.ndarray, prompt: int, word: _Word) -> Rounds:
    """Rounds of an engine that did not speculate: one for each output token, rooted at the token before."""
    roots = np.arange(prompt - 1, len(text) - 1)
    none = np.zeros(0, np.int64)

    def zeros(dtype: Literal["i4", "i2"]) -> Array:
        return from_numpy(np.zeros(len(roots), np.int64), dtype)

    return Rounds(
        root=from_numpy(roots, "i4"),
        size=zeros("i4"),
        drafter=zeros("i2"),
        tokens=from_numpy(none, "i4"),
        parents=from_numpy(none, "i2"),
        logprobs=from_numpy(none, "f4"),
        accepted=from_numpy(none, "u1"),
        bonus=from_numpy(text[roots + 1], "i4"),
        top_ids=from_numpy(word.ids.numpy(), "i4"),
        top_logprobs=from_numpy(word.logprobs.numpy(), "f4"),
        tail=from_numpy(word.tail.numpy(), "f4"),
    )


def _text(trace: Trace) -> np.ndarray:
    return np.concatenate([to_numpy(trace.prompt), to_numpy(trace.output)]).astype(np.int64)


def _length(trace: Trace) -> int:
    return trace.prompt.shape[0] + trace.output.shape[0]
