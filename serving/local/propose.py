"""Proposals: a chain drawn from the drafter, or a tree of its likeliest continuations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from livedraft.contracts.messages import Sampling
from livedraft.kernels.sampling import distribution, draw_rows
from livedraft.serving.local.drafter import Drafter
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Proposal:
    """Draft tokens of one sequence, parents before children; -1 is the root."""

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    #: float32 [n, draft_vocab] logits each node was chosen from; what a trace's log-probabilities come from.
    logits: Tensor | None = None
    #: int64 [n] row of ``tokens`` in the draft vocabulary.
    rows: Tensor | None = None
    #: float32 [n, V] distributions a sampled chain was drawn from, over the target's vocabulary.
    q: Tensor | None = None
    tree: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


EMPTY = Proposal()


def propose_chains(
    drafter: Drafter,
    hidden: Tensor,
    starts: list[int],
    samplings: Sequence[Sampling],
    rngs: Sequence[random.Random],
    lengths: Sequence[int],
) -> list[Proposal]:
    """A chain for each of B sequences: greedy where the request is, else drawn at the request's own sampling.

    hidden: [B, H] the drafter's outputs at each last committed position; starts: cache position of the first
    draft step; lengths: draft tokens wanted by each.
    """
    batch, depth = len(starts), max(lengths)
    target_ids = drafter.weights.target_ids
    alike: dict[tuple[float, int, float], list[int]] = {}
    for b, s in enumerate(samplings):
        if s.temperature > 0:
            alike.setdefault((s.temperature, s.top_k, s.top_p), []).append(b)
    greedy = sum(map(len, alike.values())) < batch
    steps: list[tuple[Tensor, Tensor, dict[int, Tensor]]] = []
    for k in range(depth):
        logits = drafter.logits(hidden)
        rows = logits.argmax(-1) if greedy else torch.empty(batch, dtype=torch.int64)
        q: dict[int, Tensor] = {}
        for sampling, members in alike.items():
            everyone = len(members) == batch
            drawn_from = distribution(logits if everyone else logits[members], *sampling)
            drawn = draw_rows(drawn_from, torch.tensor([rngs[b].random() for b in members]))
            rows = drawn if everyone else rows.index_copy_(0, torch.tensor(members), drawn)
            q |= zip(members, torch.split(drawn_from, 1), strict=True)
        steps.append((logits, rows, q))
        if k + 1 < depth:
            tokens = rows if target_ids is None else target_ids[rows]
            hidden = drafter.step(hidden, tokens, [start + k for start in starts])
    all_logits = torch.stack([s[0] for s in steps], 1)
    all_rows = torch.stack([s[1] for s in steps], 1)
    all_tokens = (all_rows if target_ids is None else target_ids[all_rows]).tolist()
    proposals = []
    for b, n in enumerate(lengths):
        proposals.append(
            Proposal(
                tokens=tuple(all_tokens[b][:n]),
                parents=tuple(range(-1, n - 1)),
                logits=all_logits[b, :n],
                rows=all_rows[b, :n],
                q=_widen(torch.cat([s[2][b] for s in steps[:n]]), drafter) if b in steps[0][2] and n else None,
            )
            if n
            else EMPTY
        )
    return proposals


def propose_tree(
    drafter: Drafter, hidden: Tensor, start: int, slot: int, depth: int, topk: int, nodes: int
) -> Proposal:
    """A dynamic tree (EAGLE-2: Li et al. 2024, section 4): the ``nodes`` likeliest continuations up to ``depth``.

    Each level expands its ``topk`` likeliest nodes by their ``topk`` likeliest children; a node's score is the sum
    of log-probabilities along its path, so the best nodes always form a tree.  Nothing is drawn: the same proposal
    whatever the random state, which is what ``verify_tree`` asks for.
    """
    root = drafter.logits(hidden)
    tokens: list[int] = []
    rows: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    sources: list[Tensor] = []
    run: list[int] = []  # nodes the drafter has run, in order of their rows in its cache
    outputs = torch.empty(0, hidden.shape[-1])

    def expand(parent: int, logits: Tensor, base: float) -> list[int]:
        best = torch.log_softmax(logits, -1).topk(min(topk, logits.shape[-1]))
        born = []
        for value, row in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            born.append(len(tokens))
            rows.append(row)
            tokens.append(row if drafter.weights.target_ids is None else int(drafter.weights.target_ids[row]))
            parents.append(parent)
            scores.append(base + value)
            sources.append(logits)
        return born

    frontier = expand(-1, root[0], 0.0)
    for _ in range(depth - 1):
        frontier = sorted(sorted(frontier, key=lambda i: -scores[i])[:topk])
        run += frontier
        place = {node: at for at, node in enumerate(run)}
        inputs = torch.stack([hidden[0] if parents[i] < 0 else outputs[place[parents[i]]] for i in run])
        lines = [_line(i, parents) for i in run]
        seen = torch.zeros(1, len(run), len(run), dtype=torch.bool)
        for at, line in enumerate(lines):
            seen[0, at, [place[i] for i in line]] = True
        levels = torch.tensor([[len(line) - 1 for line in lines]])
        outputs = drafter.branch(inputs, torch.tensor([tokens[i] for i in run]), start, levels, seen, slot)
        logits = drafter.logits(outputs[[place[i] for i in frontier]])
        frontier = [child for at, i in enumerate(frontier) for child in expand(i, logits[at], scores[i])]
    kept = sorted(sorted(range(len(tokens)), key=lambda i: (-scores[i], i))[:nodes])
    number = {node: at for at, node in enumerate(kept)} | {-1: -1}
    return Proposal(
        tokens=tuple(tokens[i] for i in kept),
        parents=tuple(number[parents[i]] for i in kept),
        logits=torch.stack([sources[i] for i in kept]),
        rows=torch.tensor([rows[i] for i in kept]),
        tree=True,
    )


def tree_layout(proposals: Sequence[Proposal], rows: int) -> tuple[Tensor, Tensor]:
    """Depths [B, rows] and ancestors bool [B, rows, rows] of verification rows: the root, then each node."""
    depths = torch.zeros(len(proposals), rows, dtype=torch.int64)
    ancestors = torch.eye(rows, dtype=torch.bool).repeat(len(proposals), 1, 1)
    ancestors[:, :, 0] = True
    for b, proposal in enumerate(proposals):
        for node, parent in enumerate(proposal.parents):
            ancestors[b, node + 1] |= ancestors[b, parent + 1]
            depths[b, node + 1] = depths[b, parent + 1] + 1
    return depths, ancestors


def _line(node: int, parents: Sequence[int]) -> list[int]:
    line = []
    while node >= 0:
        line.append(node)
        node = parents[node]
    return line


def _widen(q: Tensor, drafter: Drafter) -> Tensor:
    """[n, draft_vocab] -> [n, V] with zeros where the drafter cannot propose."""
    ids = drafter.weights.target_ids
    if ids is None:
        return q
    return torch.zeros(len(q), drafter.weights.config.vocab_size).index_copy_(1, ids, q)
