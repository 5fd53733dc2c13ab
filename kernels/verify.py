"""Verification: which draft tokens stand, and what the target says next.  The output is the target's, exactly.

Three cases.  Greedy: a draft token stands where it is the target's best.  Sampled chain: speculative sampling
(Leviathan et al. 2023, Algorithm 1; Chen et al. 2023): draft x ~ q stands with probability min(1, p(x)/q(x)), the
first that falls is replaced by a draw from the normalised max(p - q, 0).  Tree of deterministic proposals: the
target draws at each node and the walk goes on while a child holds the drawn token, which is SpecInfer's
verification (Miao et al. 2024, Theorem 4.2) for proposals of point mass.

Nodes are numbered parents first; a parent of -1 is the root; row 0 of ``p`` is the target after the root, row
i + 1 after node i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from livedraft.kernels.sampling import draw
from torch import Tensor


def verify_greedy(best: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> tuple[list[int], int]:
    """Accepted path (node numbers, root first) and the bonus token; ``best[i]`` is the target's argmax of row i."""
    return _walk(tokens, parents, lambda row: best[row])


def verify_tree(
    p: Tensor, tokens: Sequence[int], parents: Sequence[int], uniform: Callable[[], float]
) -> tuple[list[int], int]:
    """As ``verify_greedy`` with the target drawing from ``p`` [n + 1, V]; proposals must not depend on the draws."""
    return _walk(tokens, parents, lambda row: draw(p[row], uniform()))


def verify_chain(p: Tensor, q: Tensor, tokens: Sequence[int], uniform: Callable[[], float]) -> tuple[int, int]:
    """Number of accepted draft tokens and the bonus token of a chain drawn token by token from q.

    p: float32 [n + 1, V] target probabilities; q: float32 [n, V] the drafter's, over the target's vocabulary,
    exactly those ``tokens`` [n] were drawn from.
    """
    n = len(tokens)
    if n == 0:
        return 0, draw(p[0], uniform())
    rows, index = torch.arange(n), torch.tensor(tokens)
    chances = p[rows, index].tolist()
    proposed = q[rows, index].tolist()
    for i in range(n):
        # Strict: a token the target never emits must fall even when the draw is exactly 0.
        if uniform() * proposed[i] < chances[i]:
            continue
        residual = (p[i] - q[i]).clamp_(min=0)
        # Rounding can empty the residual only where p and q agree; then p itself is the residual's limit.
        return i, draw(residual if residual.any() else p[i], uniform())
    return n, draw(p[n], uniform())


def _walk(tokens: Sequence[int], parents: Sequence[int], choose: Callable[[int], int]) -> tuple[list[int], int]:
    children: dict[int, dict[int, int]] = {}
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        children.setdefault(parent, {})[token] = node
    path: list[int] = []
    at = -1
    while True:
        token = choose(at + 1)
        following = children.get(at, {}).get(token)
        if following is None:
            return path, token
        path.append(following)
        at = following
