"""The unrolled forward is what serving computes, one root and one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from livedraft.contracts.messages import Trace
from livedraft.trainer.batch import pack
from livedraft.trainer.lesson import lesson
from livedraft.trainer.model import Drafter
from livedraft.trainer.unroll import unroll
from torch import Tensor

TraceMaker = Callable[..., Trace]
DEPTH = 4


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain


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


@pytest.mark.parametrize("start", [0, 3])
def test_every_chain_equals_step_by_step_drafting(drafter: Drafter, random_trace: TraceMaker, start: int) -> None:
    lessons = [lesson(random_trace(n, tokens=8), DEPTH, start=start, stale=set()) for n in (1, 2)]
    batch = pack(lessons, drafter.draft_row)
    with torch.no_grad():
        found = torch.stack(list(unroll(drafter, batch.roots, DEPTH)), 1)
        row = 0
        for each in lessons:
            for line in (each.committed, each.rejected):
                for root, reads in zip(line.root.tolist(), line.tokens.tolist(), strict=True):
                    expected = Serving(drafter).draft(each.features, each.next_tokens, root, reads)
                    torch.testing.assert_close(found[row], torch.stack(expected), rtol=1e-4, atol=1e-4)
                    row += 1
    assert row == len(found) > 20


def test_a_root_never_sees_what_comes_after_it(drafter: Drafter, random_trace: TraceMaker) -> None:
    trace = random_trace(1)
    batch = pack([lesson(trace, DEPTH)], drafter.draft_row)
    features = batch.roots.features.requires_grad_()
    chain = len(batch.roots.root) // 2
    outputs = torch.stack(list(unroll(drafter, batch.roots, DEPTH)), 1)
    torch.autograd.backward(outputs[chain].sum())
    assert features.grad is not None
    seen = features.grad.abs().sum(1) > 0
    root = int(batch.roots.root[chain])
    assert seen[: root + 1].all()
    assert not seen[root + 1 :].any()


def test_low_precision_drafts_nearly_the_same(drafter: Drafter, random_trace: TraceMaker) -> None:
    batch = pack([lesson(random_trace(1), DEPTH)], drafter.draft_row)
    exact = torch.stack(list(unroll(drafter, batch.roots, DEPTH)))
    drafter.low_precision = True
    rounded = torch.stack(list(unroll(drafter, batch.roots, DEPTH)))
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=-1).min() > 0.98
