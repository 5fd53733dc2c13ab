"""What a target says when nobody drafts for it, by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Greedy:
    """Greedy continuations by the model in a folder, end tokens passed over; each is computed once."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.generation_config.eos_token_id = None
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """So many tokens after ``prompt``."""
        key = tuple(prompt)
        if len(self._known.get(key, [])) < tokens:
            ids = torch.tensor([key])
            mask = torch.ones_like(ids)
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
            self._known[key] = [int(token) for token in out[0, len(key) :]]
        return self._known[key][:tokens]
