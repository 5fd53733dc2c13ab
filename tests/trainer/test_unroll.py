"""The unrolled forward is what serving computes, one root and one step at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from livedraft.contracts.messages import Trace
from livedraft.trainer.batch import pack
from livedraft.trainer.lesson import Lesson, Rejections, lesson
from livedraft.trainer.model import Drafter
from livedraft.trainer.unroll import unroll
from torch import Tensor

TraceMaker = Callable[..., Trace]
DEPTH = 4
VOCAB = 40


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def exact(about: Lesson) -> Lesson:
    return replace(about, features=about.features.double())


class Serving:
    """A drafter with a growing cache, one row at a time, written from the paper rather than from the model."""

    def __init__(self, drafter: Drafter) -> None:
        self.w = dict(drafter.named_parameters())
        self.c, self.embedding = drafter.config, drafter.embedding
        self.cache: list[tuple[Tensor, Tensor]] = []

    def rotate(self, x: Tensor, position: int) -> Tensor:
        half = self.c.head_dim // 2
        out = torch.empty_like(x)
        for i in range(half):
            angle = position / self.c.rope_theta ** (2 * i / self.c.head_dim)
            a, b = x[:, i], x[:, i + half]
            out[:, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def row(self, hidden: Tensor, token: int, position: int) -> Tensor:
        w, c, layer = self.w, self.c, "midlayer."
        embedded = rms(self.embedding[token], w[layer + "input_layernorm.weight"])
        x = torch.cat([embedded, rms(hidden, w[layer + "hidden_norm.weight"])])
        q, k, v = ((w[f"{layer}self_attn.{name}_proj.weight"] @ x).view(-1, c.head_dim) for name in ("q", "k", "v"))
        self.cache.append((self.rotate(k, position), v))
        q = self.rotate(q, position)
        heads = []
        for h in range(c.num_attention_heads):
            kv = h * c.num_key_value_heads // c.num_attention_heads
            scores = torch.stack([q[h] @ key[kv] for key, _ in self.cache]) / math.sqrt(c.head_dim)
            heads.append(scores.softmax(0) @ torch.stack([value[kv] for _, value in self.cache]))
        hidden = hidden + w[layer + "self_attn.o_proj.weight"] @ torch.cat(heads)
        y = rms(hidden, w[layer + "post_attention_layernorm.weight"])
        gate, up = w[layer + "mlp.gate_proj.weight"] @ y, w[layer + "mlp.up_proj.weight"] @ y
        return hidden + w[layer + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)

    def draft(self, features: Tensor, next_tokens: Tensor, root: int, reads: list[int]) -> list[Tensor]:
        for t in range(root + 1):
            out = self.row(self.w["fc.weight"] @ features[t], int(next_tokens[t]), t)
        outs = [out]
        for step, token in enumerate(reads[1:], 1):
            outs.append(self.row(outs[-1], token, root + step))
        return outs


def branching(number: int, trace_of: TraceMaker, *, tokens: int = 8, width: int = 3) -> Trace:
    """A trace of tree rounds: each node has up to ``width`` children, some line of them accepted."""
    rng = np.random.default_rng(number)
    rounds = []
    for _ in range(tokens // 2):
        parents = [-1]
        for node in range(1, int(rng.integers(2, 9))):
            parents.append(int(rng.integers(-1, node)))
        accepted, at = [False] * len(parents), -1
        while (children := [n for n, p in enumerate(parents) if p == at]) and rng.random() < 0.6:
            at = int(rng.choice(children))
            accepted[at] = True
        proposed = [int(t) for t in rng.choice(VOCAB, len(parents), replace=False)]
        rounds.append((proposed, parents, accepted, int(rng.integers(0, VOCAB))))
    return trace_of([int(t) for t in rng.integers(0, VOCAB, int(rng.integers(2, 12)))], rounds, number=number)


def lines(about: Lesson) -> Iterator[tuple[int, int, int, list[int]]]:
    """Every row of a lesson as it would be drafted: (step, place in its level, root, tokens read up to it)."""
    chains, branches = about.committed, about.rejected
    for c, root in enumerate(chains.root.tolist()):
        for step in range(DEPTH):
            yield step, c, root, chains.tokens[c, : step + 1].tolist()
    places: Counter[int] = Counter()
    for b in range(len(branches.chain)):
        line, at = [], b
        while at >= 0:
            line.append(int(branches.token[at]))
            first, at = at, int(branches.parent[at])
        chain, step = int(branches.chain[b]), int(branches.step[b])
        trunk = chains.tokens[chain, : int(branches.step[first])].tolist()
        yield step, len(chains.root) + places[step], int(chains.root[chain]), trunk + line[::-1]
        places[step] += 1


def draft_alone(drafter: Drafter, about: Lesson, root: int, reads: list[int]) -> Tensor:
    return Serving(drafter).draft(about.features, about.next_tokens, root, reads)[-1]


def outputs(drafter: Drafter, lessons: list[Lesson]) -> list[list[Tensor]]:
    """[lesson][level] f[n, H] outputs."""
    batch = pack(lessons, drafter.draft_row)
    levels = zip(unroll(drafter, batch.forest, DEPTH), batch.forest.levels, strict=True)
    return list(map(list, zip(*(torch.split(out, level.counts) for out, level in levels), strict=True)))


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("shape", ["chains", "trees"])
def test_every_branch_equals_step_by_step_drafting(
    drafter: Drafter, random_trace: TraceMaker, trace_of: TraceMaker, start: int, shape: str
) -> None:
    traces = [branching(n, trace_of) if shape == "trees" else random_trace(n, tokens=8) for n in (1, 2, 3)]
    lessons = [lesson(trace, DEPTH, start=start, rejections=Rejections()) for trace in traces]
    checked: Counter[str] = Counter()
    with torch.no_grad():
        found = outputs(drafter, lessons)
        for about, levels in zip(lessons, found, strict=True):
            for step, place, root, reads in lines(about):
                expected = draft_alone(drafter, about, root, reads)
                torch.testing.assert_close(levels[step][place], expected, rtol=1e-4, atol=1e-4)
                checked["trunk" if place < len(about.committed.root) else "branch"] += 1
            assert sum(map(len, levels)) == sum(1 for _ in lines(about))
    assert checked["trunk"] > 40
    assert checked["branch"] > 5


def test_gradients_of_a_tree_are_those_of_its_branches(drafter: Drafter, trace_of: TraceMaker) -> None:
    about = exact(lesson(branching(5, trace_of), DEPTH, rejections=Rejections()))
    drafter.double()
    share = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for serving in (False, True):
        drafter.zero_grad()
        if serving:
            drafted = [
                Serving(drafter).draft(about.features, about.next_tokens, r, reads)[-1]
                for _, _, r, reads in lines(about)
            ]
        else:
            levels = outputs(drafter, [about])[0]
            drafted = [levels[step][place] for step, place, *_ in lines(about)]
        torch.autograd.backward(
            torch.stack([w * out.square().sum() for w, out in zip(share, drafted, strict=False)]).sum()
        )
        gradients.append({name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        # Rotary angles and the embedding stay float32.
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_root_never_sees_what_comes_after_it(drafter: Drafter, random_trace: TraceMaker) -> None:
    trace = random_trace(1)
    batch = pack([lesson(trace, DEPTH)], drafter.draft_row)
    features = batch.forest.features.requires_grad_()
    chain = len(batch.forest.root) // 2
    drafted = torch.stack(list(unroll(drafter, batch.forest, DEPTH)), 1)
    torch.autograd.backward(drafted[chain].sum())
    assert features.grad is not None
    seen = features.grad.abs().sum(1) > 0
    root = int(batch.forest.root[chain])
    assert seen[: root + 1].all()
    assert not seen[root + 1 :].any()


@pytest.mark.parametrize("sizes", [(8, 8, 8), (6, 30, 8, 12)])
def test_no_sequence_sees_another(drafter: Drafter, trace_of: TraceMaker, sizes: tuple[int, ...]) -> None:
    """Perturb one: outputs and input gradients of the others keep every bit."""
    lessons = [
        lesson(branching(n, trace_of, tokens=size), DEPTH, rejections=Rejections()) for n, size in enumerate(sizes)
    ]
    noise = torch.Generator().manual_seed(0)
    features = lessons[1].features
    other = replace(lessons[1], features=torch.randn(features.shape, generator=noise) * 50)
    results = []
    for second in (lessons[1], other):
        batch = pack([lessons[0], second, *lessons[2:]], drafter.draft_row)
        inputs = batch.forest.features.requires_grad_()
        drafted = list(unroll(drafter, batch.forest, DEPTH))
        torch.autograd.backward(torch.stack([out.square().sum() for out in drafted]).sum())
        assert inputs.grad is not None
        parts = [torch.split(inputs.grad, batch.forest.lengths)]
        parts += [torch.split(out.detach(), x.counts) for out, x in zip(drafted, batch.forest.levels, strict=True)]
        results.append(parts)
    for before, after in zip(*results, strict=True):
        for i in range(len(sizes)):
            assert torch.equal(before[i], after[i]) == (i != 1)


def test_low_precision_drafts_nearly_the_same(drafter: Drafter, random_trace: TraceMaker) -> None:
    batch = pack([lesson(random_trace(1), DEPTH)], drafter.draft_row)
    exact = torch.stack(list(unroll(drafter, batch.forest, DEPTH)))
    drafter.low_precision = True
    rounded = torch.stack(list(unroll(drafter, batch.forest, DEPTH)))
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=-1).min() > 0.98
