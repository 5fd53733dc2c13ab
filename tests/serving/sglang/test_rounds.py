from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from livedraft.serving.sglang.proposals import Chain, Proposals, Tap, best_logprob, proposed
from livedraft.serving.sglang.recording import Layout
from livedraft.serving.sglang.rounds import Lifted, Verdict, arrived, best, largest
from livedraft.serving.sglang.surface import Feature, guarded


@pytest.mark.parametrize("elements", [1 << 24, 1])
def test_the_best_and_what_lies_outside(elements: int) -> None:
    logits, temperatures = torch.randn(5, 40), torch.rand(5, 1) + 0.5
    for heat in (None, temperatures):
        word = best(logits, heat, 7, elements=elements)
        expected = torch.log_softmax(logits / (1 if heat is None else heat), -1)
        values, ids = expected.topk(7)
        assert torch.equal(word.ids, ids)
        torch.testing.assert_close(word.logprobs, values)
        torch.testing.assert_close(word.tail, 1 - values.exp().sum(-1))


@pytest.mark.parametrize(("size", "k"), [(4096, 32), (4096, 1), (1024, 32), (1008, 32), (1000, 7), (40, 40)])
def test_the_largest_are_those_of_topk(size: int, k: int) -> None:
    values = torch.randn(9, size)
    found, ids = largest(values, k)
    expected = values.topk(k)
    assert torch.equal(found, expected.values)
    assert torch.equal(ids, expected.indices)


def test_the_largest_among_equals() -> None:
    values = torch.randint(0, 3, (5, 4096)).float()
    found, ids = largest(values, 32)
    assert torch.equal(found, values.topk(32).values)
    assert torch.equal(values.gather(1, ids), found)
    assert all(len(row.unique()) == 32 for row in ids)


def test_words_of_a_tree_come_back_as_they_went() -> None:
    count, n, depth, k = 3, 5, 4, 2
    layout = Layout(n, depth, k, tree=True)
    logits, temperatures = torch.randn(count * n, 9), torch.rand(count * n, 1) + 0.5
    word = best(logits, temperatures, k)
    tokens = torch.randint(0, 9, (count, n))
    path = torch.tensor([[0, 2, 4, -1], [5, -1, -1, -1], [10, 11, 13, 14]])
    links = torch.randint(-1, n, (2, count, n))
    logprobs = torch.randn(count, n - 1)
    accepted, bonus = torch.tensor([3, 1, 4]), torch.tensor([7, 8, 9])
    words = Verdict(logits, temperatures, tokens, accepted, bonus, logprobs, None, path, links[0], links[1]).packed(
        layout
    )
    assert words.shape == (count, layout.width)
    back = {name: words[:, layout.at(name)] for name, _ in layout.fields}
    assert torch.equal(back["tokens"], tokens.int())
    assert back["accepted"][:, 0].tolist() == [3, 1, 4]
    assert back["path"][0, :3].tolist() == [0, 2, 4]
    assert back["path"][1, :1].tolist() == [0]
    assert back["path"][2].tolist() == [0, 1, 3, 4]
    assert torch.equal(back["child"], links[0].int())
    assert torch.equal(back["logprobs"].contiguous().view(torch.float32), logprobs)
    assert torch.equal(back["tail"].contiguous().view(torch.float32).flatten(), word.tail)
    assert torch.equal(back["top_ids"].reshape(-1, k), word.ids.int())


def verdict(count: int, n: int, *, hot: bool = False, tree: bool = False, aside: bool = False) -> Verdict:
    return Verdict(
        torch.randn(count * n, 50),
        torch.rand(count * n, 1) + 0.5 if hot else None,
        torch.randint(0, 50, (count, n)),
        torch.randint(1, n + 1, (count,)),
        torch.randint(0, 50, (count,)),
        torch.randn(count, n - 1) if n > 1 and not aside else None,
        Chain(torch.rand(count, 1), [torch.randn(count, 30) for _ in range(n - 2)]) if aside else None,
        *(torch.randint(0, count * n, (3, count, n)) if tree else ()),
    )


@pytest.mark.parametrize("together", [1 << 22, 1])
def test_what_is_computed_later_is_what_would_be_computed_now(together: int) -> None:
    verdicts = [
        (4, verdict(2, 4)),
        (1, verdict(3, 1)),
        (4, verdict(2, 4, aside=True)),
        (4, verdict(1, 4, hot=True)),
        (4, verdict(1, 4)),
        (4, verdict(3, 4, hot=True, tree=True)),
        (2, verdict(2, 2, aside=True)),
        (4, verdict(1, 4, aside=True)),
        (4, verdict(1, 4, tree=True)),
        (4, verdict(2, 4, tree=True)),
    ]
    left = [(Layout(n, n, 8, v.path is not None), v, torch.randn(len(v.tokens) * n, 6)) for n, v in verdicts]
    now, later = (
        [Lifted(layout, range(len(v.tokens)), [], v, features, "1", later=late) for layout, v, features in left]
        for late in (False, True)
    )
    for (words, bits), (expected, bits_now) in zip(arrived(later, together), arrived(now), strict=True):
        assert words.tolist() == expected.tolist()
        assert bits.tolist() == bits_now.tolist()
    for one, other, (layout, v, features) in zip(now, later, left, strict=True):
        assert one.size == 4 * len(v.tokens) * layout.width + 2 * features.numel()
        assert other.size == v.size + 2 * features.numel()


class Drafter:
    """Drafts as SGLang does: best of each step along a chain, likeliest children of each node in a tree."""

    def __init__(self, topk: int, logits: list[torch.Tensor], *, later: bool = False) -> None:
        self.topk = topk
        self._logits = logits
        self.feature = Feature("capture")
        tap = Tap(self.feature)
        self.wanted = True
        self.proposals = Proposals(self.feature, tap, lambda: self.wanted, lambda _: later)
        hooks = [*tap.hooks, *self.proposals.hooks]
        self._hooks = {hook.target.rpartition(".")[2]: hook for hook in hooks}

    def call(self, name: str, original: Callable[..., Any], *args: Any) -> Any:
        return guarded(self._hooks[name], original, *args)

    def draft(self, first: torch.Tensor) -> torch.Tensor | None:
        """The log-probabilities that come out; ``first`` [B, topk] probabilities of the first step."""

        def forward(worker: object, batch: object) -> tuple[object, torch.Tensor, torch.Tensor, None]:
            if self.topk == 1:
                for logits in self._logits:
                    self.call("forward", lambda *_, x=logits: _output(x), None, None)
                return None, torch.zeros(1), torch.zeros(len(first), 1), None
            for i, probabilities in enumerate([first, *(x.softmax(-1).topk(self.topk).values for x in self._logits)]):
                self.call("select_top_k_tokens", lambda *_: None, i, probabilities)
            return None, torch.tensor([[0, 1, 3, 5], [0, 1, 2, 5]]), torch.zeros(2, 4), None

        batch = SimpleNamespace(spec_info=SimpleNamespace(topk_p=first))
        told: torch.Tensor | None = self.call("draft_forward", forward, self, batch)[3]
        return told


def _output(logits: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=logits))


def test_a_chain_tells_the_probability_of_each_best() -> None:
    logits = [torch.randn(2, 11), torch.randn(2, 11)]
    told = Drafter(1, logits).draft(torch.tensor([[0.5], [0.25]]))
    assert told is not None
    expected = [torch.tensor([math.log(0.5), math.log(0.25)]), *(x.log_softmax(-1).amax(-1) for x in logits)]
    torch.testing.assert_close(told, torch.stack(expected, 1))


def test_a_chain_leaves_what_it_was_chosen_from_to_the_round_that_follows() -> None:
    first, logits = torch.tensor([[0.5], [0.25]]), [torch.randn(2, 11), torch.randn(2, 11)]
    drafter = Drafter(1, logits, later=True)
    assert drafter.draft(first) is None
    left = drafter.proposals.take()
    assert left is not None
    assert left.size == 2 * 2 * 11 * 4
    told = Drafter(1, logits).draft(first)
    assert told is not None
    assert torch.equal(left.logprobs(), told)
    assert torch.equal(left.picked(lambda values: values[[1]]).logprobs(), told[[1]])
    assert drafter.proposals.take() is None
    drafter.draft(first)
    drafter.wanted = False
    drafter.draft(first)
    assert drafter.proposals.take() is None


def test_a_tree_tells_the_probability_of_each_child_given_its_parent() -> None:
    first, logits = torch.tensor([[0.6, 0.3], [0.7, 0.2]]), torch.randn(4, 11)
    told = Drafter(2, [logits]).draft(first)
    assert told is not None
    children = logits.log_softmax(-1).topk(2).values.view(2, 4)
    candidates = torch.cat([first.log(), children], 1)
    torch.testing.assert_close(told, candidates.gather(1, torch.tensor([[0, 1, 3, 5], [0, 1, 2, 5]])))


def test_nothing_is_computed_that_nobody_wants() -> None:
    drafter = Drafter(1, [torch.randn(2, 11)])
    drafter.wanted = False
    assert drafter.draft(torch.ones(2, 1)) is None


def test_the_extend_of_a_chain_tells_the_first_probability() -> None:
    drafter, logits = Drafter(1, []), torch.randn(6, 11)
    result = SimpleNamespace(next_draft_input=SimpleNamespace(topk_p=torch.ones(2, 1), draft_probs=None))

    def extend(worker: object, batch: object, batch_result: object) -> None:
        output = _output(logits)
        drafter.call("forward", lambda *_: output, None, None)
        output.logits_output.next_token_logits = logits[[1, 4]]  # SGLang keeps the rows that it chooses from

    drafter.call("_draft_extend_for_decode", extend, drafter, None, result)
    torch.testing.assert_close(result.next_draft_input.topk_p, best_logprob(logits[[1, 4]]).exp())


def test_rejection_sampling_brings_whole_distributions() -> None:
    q = torch.rand(2, 3, 11)
    tokens = torch.randint(0, 11, (2, 4))
    told = proposed(SimpleNamespace(draft_probs=q), tokens)
    assert told is not None
    assert told[1, 2] == q[1, 2, tokens[1, 3]].log()
    assert proposed(SimpleNamespace(draft_probs=None), tokens) is None
