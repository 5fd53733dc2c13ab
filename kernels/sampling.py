"""From logits to a distribution to a token.  The plain-torch specification; on CPU also the implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def distribution(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities [n, V] float32 from logits [n, V]: temperature, then top-k, then top-p on what is left.

    The order of transformers and SGLang.  ``top_k`` 0 or at least V, and ``top_p`` 1, change nothing.  Top-p
    keeps the smallest set of most likely tokens whose mass reaches ``top_p`` (Holtzman et al. 2020), never fewer
    than one.  ``temperature`` must be positive: greedy decoding needs no distribution.
    """
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        least = scaled.topk(top_k, -1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    probabilities = scaled.softmax(-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(weights: Tensor, uniform: float) -> int:
    """Index drawn from unnormalised ``weights`` [V] by inverting their cumulative sum at ``uniform`` in [0, 1).

    Never returns an index of weight zero.  Sums in float64: float32 loses the tail of a large vocabulary.
    """
    cumulative = weights.double().cumsum(-1)
    total = cumulative[-1].item()
    index = int(torch.searchsorted(cumulative, uniform * total, right=True).item())
    if index < len(weights):
        return index
    # uniform * total rounded up to total: take the last token that has any weight.
    return int(weights.nonzero()[-1].item())


def draw_rows(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """One index per row of ``probabilities`` [n, V] at ``uniforms`` [n] in [0, 1): int64 [n]."""
    cumulative = probabilities.double().cumsum(-1)
    points = uniforms.double()[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, points, right=True)[:, 0]
    return index.clamp_(max=probabilities.shape[-1] - 1)
