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
    index = torch.tensor(tokens)[:, None]
    chances = p[:n].gather(1, index)[:, 0].tolist()
    proposed = q.gather(1, index)[:, 0].tolist()
    for i in range(n):
        # Strict: a token the target never emits must fall even when the draw is exactly 0.
        if uniform() * proposed[i] < chances[i]:
            continue
        residual = (p[i] - q[i]).clamp_(min=0)
        # Rounding can empty the residual only where p and q agree; then p itself is the residual's limit.
        return i, draw(residual if residual.any() else p[i], uniform())
    return n, draw(p[n], uniform())


def verify_chains_reference(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """``verify_chain`` of B sequences: i64[B] accepted and i64[B] bonus.  Specification of ``verify_triton``'s.

    p: f32[B, n + 1, V]; q: f32[B, n, V]; tokens: i64[B, n]; lengths: i64[B] of each chain, at most n;
    uniforms: f[B, n + 1] in [0, 1), taken from the left as they are needed.
    """
    found = []
    for b, length in enumerate(lengths.tolist()):
        rest = iter(uniforms[b].tolist())
        found.append(verify_chain(p[b, : length + 1], q[b, :length], tokens[b, :length].tolist(), rest.__next__))
    accepted, bonus = torch.tensor(found).T
    return accepted, bonus


def verify_trees_reference(
    p: Tensor, tokens: Tensor, parents: Tensor, lengths: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``verify_tree`` of B sequences: i64[B, n] accepted path (-1 past its end), i64[B] its length, i64[B] bonus.

    parents: i64[B, n], -1 for the root; lengths: i64[B] nodes of each tree; the rest as for chains.
    """
    paths = torch.full_like(tokens, -1)
    accepted, bonus = [], []
    for b, length in enumerate(lengths.tolist()):
        rest = iter(uniforms[b].tolist())
        nodes = tokens[b, :length].tolist(), parents[b, :length].tolist()
        path, last = verify_tree(p[b, : length + 1], *nodes, rest.__next__)
        paths[b, : len(path)] = torch.tensor(path, dtype=torch.int64)
        accepted.append(len(path))
        bonus.append(last)
    return paths, torch.tensor(accepted), torch.tensor(bonus)


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
