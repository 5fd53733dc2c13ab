from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.messages import FinishReason, Sampling, Trace
from livedraft.serving.sglang.recording import Ended, Layout, Recording, Source, Torn, parents_of, reachable, traces
from livedraft.traces.arrays import to_float32, to_numpy
from livedraft.traces.validation import validate

SOURCE = Source("sglang", "tiny", "revision", "hash", (1, 5, 8))
WIDTH, CANDIDATES, VOCABULARY = 6, 3, 1000


def recording(prompt: int = 3, temperature: float = 0.0) -> Recording:
    return Recording("r", "acme", "prose", Sampling(temperature=temperature), prompt)


def trace(recording: Recording, prompt: list[int], output: list[int], reason: FinishReason) -> Trace:
    """Of one alone.  Raises Torn."""
    (made,) = traces([Ended(recording, prompt, output, reason)], SOURCE)
    if isinstance(made, Torn):
        raise made
    return made


def rows(start: int, end: int) -> np.ndarray:
    """Features that say their position."""
    return np.repeat(np.arange(start, end, dtype=np.uint16)[:, None], WIDTH, 1)


@dataclass
class Tree:
    """A round as it was: ``parents`` of nodes 1.., None for one that hangs on nothing; ``path`` down from the root."""

    parents: list[int | None]
    path: list[int]
    tokens: list[int]
    bonus: int
    number: int = 0

    @property
    def committed(self) -> list[int]:
        return [*(self.tokens[node] for node in self.path[1:]), self.bonus]

    @property
    def kept(self) -> list[int]:
        """Nodes that hang on the root, itself left out."""
        kept = {0}
        for node, parent in enumerate(self.parents, 1):
            if parent in kept:
                kept.add(node)
        return sorted(kept - {0})

    def words(self, *, tree: bool = True) -> tuple[Layout, np.ndarray]:
        n = len(self.tokens)
        depth = max(4, len(self.path)) if tree else n
        layout = Layout(n, depth, CANDIDATES, tree)
        child, sibling, last = [-1] * n, [-1] * n, dict[int, int]()
        for node, parent in enumerate(self.parents, 1):
            if parent is None:
                continue
            if parent in last:
                sibling[last[parent]] = node
            else:
                child[parent] = node
            last[parent] = node
        nodes = np.arange(n)
        ints = {
            "tokens": self.tokens,
            "accepted": [len(self.path)],
            "bonus": [self.bonus],
            "path": [*self.path, *[n - 1] * (depth - len(self.path))],
            "child": child,
            "sibling": sibling,
            "top_ids": np.repeat(1000 * self.number + nodes, CANDIDATES),
        }
        floats = {
            "logprobs": -0.5 * nodes[1:],
            "top_logprobs": np.repeat(-1.0 - nodes, CANDIDATES),
            "tail": nodes / 100,
        }
        words = np.zeros(layout.width, np.int32)
        for name, _ in layout.fields:
            values = np.asarray(ints[name]) if name in ints else np.asarray(floats[name], np.float32).view(np.int32)
            words[layout.at(name)] = values
        return layout, words


def chain(tokens: list[int], accepted: int, bonus: int) -> Tree:
    """``tokens`` proposed below the root, the first ``accepted`` of them taken."""
    return Tree([*range(len(tokens))], [*range(accepted + 1)], [0, *tokens], bonus)


def alone(token: int) -> Tree:
    """A prefill: the root alone."""
    return chain([], 0, token)


def random_tree(rng: random.Random, number: int) -> Tree:
    n = rng.randint(1, 9)
    parents = [rng.choice([None, *range(node)] if rng.random() < 0.1 else [*range(node)]) for node in range(1, n)]
    tree = Tree(parents, [0], [rng.randrange(VOCABULARY) for _ in range(n)], rng.randrange(VOCABULARY), number)
    while rng.random() < 0.7:
        children = [node for node in tree.kept if parents[node - 1] == tree.path[-1]]
        if not children:
            break
        tree.path.append(rng.choice(children))
    return tree


@dataclass
class Served:
    """A request served in every way that SGLang may, and what a trace of it should say."""

    rng: random.Random
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    rounds: list[tuple[int, Tree, str]] = field(default_factory=list)
    start: int = 0

    def __post_init__(self) -> None:
        self.recording = recording(len(self.prompt))
        self.start = self.rng.randrange(len(self.prompt))

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    def prefill(self, cached: int) -> None:
        """Whatever is not ``cached``, in chunks; then a token."""
        at = cached
        while at < self.length:
            end = self.rng.randint(at + 1, self.length)
            self.recording.computed(at, rows(at, end))
            at = end
        self._commit(alone(self.rng.randrange(VOCABULARY)), tree=False)

    def verify(self, tree: Tree) -> None:
        root = self.length - 1
        self.recording.computed(root, rows(root, root + len(tree.committed)))
        self._commit(tree, tree=True)

    def _commit(self, round_: Tree, *, tree: bool) -> None:
        version = self.rng.choice(["a", "b"])
        self.recording.verified(*round_.words(tree=tree), version)
        self.rounds.append((self.length - 1, round_, version))
        self.output += round_.committed


@given(st.randoms(use_true_random=False), st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=4))
def test_traces_say_what_was_served(rng: random.Random, requests: list[tuple[int, int]]) -> None:
    all_served, ended = [], []
    for prompt, rounds in requests:
        served = Served(rng, [rng.randrange(VOCABULARY) for _ in range(prompt)])
        served.prefill(served.start)
        for number in range(rounds):
            if rng.random() < 0.2:  # retracted, and prefilled again
                served.prefill(rng.randrange(served.length))
            served.verify(random_tree(rng, number))
            if rng.random() < 0.5:
                served.recording.own()
        cut = rng.randrange(len(served.rounds[-1][1].committed))
        all_served.append(served)
        ended.append(Ended(served.recording, served.prompt, served.output[: len(served.output) - cut], "stop"))
    ended.insert(at := rng.randint(0, len(ended)), Ended(recording(), [0, 0, 0], [1], "stop"))
    made = [*traces(ended, SOURCE)]
    assert isinstance(made.pop(at), Torn)
    del ended[at]
    for served, one, trace in zip(all_served, ended, made, strict=True):
        assert isinstance(trace, Trace)
        assert_says(trace, served, [*one.output])


def assert_says(made: Trace, served: Served, output: list[int]) -> None:
    validate(made)
    known = len(served.prompt) + len(output) - 1
    assert made.features.start == served.start
    assert made.features.values is not None
    assert to_numpy(made.features.values)[:, 0].tolist() == [*range(served.start, known)]
    assert to_numpy(made.output).tolist() == output
    assert to_numpy(made.rounds.root).tolist() == [root for root, *_ in served.rounds]
    assert [made.drafters[i] for i in to_numpy(made.rounds.drafter)] == [version for *_, version in served.rounds]
    trees = [tree for _, tree, _ in served.rounds]
    assert to_numpy(made.rounds.size).tolist() == [len(tree.kept) for tree in trees]
    assert to_numpy(made.rounds.bonus).tolist() == [tree.bonus for tree in trees]
    numbered = [{0: -1} | {node: at for at, node in enumerate(tree.kept)} for tree in trees]
    kept = [(tree, node, number) for tree, number in zip(trees, numbered, strict=True) for node in tree.kept]
    assert to_numpy(made.rounds.tokens).tolist() == [tree.tokens[node] for tree, node, _ in kept]
    assert to_numpy(made.rounds.parents).tolist() == [
        number[tree.parents[node - 1] or 0] for tree, node, number in kept
    ]
    assert to_numpy(made.rounds.accepted).tolist() == [int(node in tree.path) for tree, node, _ in kept]
    assert to_float32(made.rounds.logprobs).tolist() == [-0.5 * node for _, node, _ in kept]
    with_roots = [(tree, node) for tree in trees for node in (0, *tree.kept)]
    assert to_numpy(made.rounds.top_ids)[:, 0].tolist() == [1000 * tree.number + node for tree, node in with_roots]
    assert to_float32(made.rounds.top_logprobs)[:, -1].tolist() == [-1.0 - node for _, node in with_roots]
    assert to_float32(made.rounds.tail) == pytest.approx([node / 100 for _, node in with_roots])


def test_a_round_cut_by_a_grammar_ends_with_the_last_token_kept() -> None:
    it = recording()
    it.computed(0, rows(0, 3))
    it.verified(*alone(7).words(tree=False), "a")
    for drafted, keep in ((chain([1, 2, 3], 3, 4), 2), (chain([5], 1, 6), None)):
        it.computed(it.end, rows(it.end, it.end + (keep or 2)))
        it.verified(*drafted.words(tree=False), "a", keep)

    made = trace(it, [0, 0, 0], [7, 1, 2, 5, 6], "stop")

    validate(made)
    assert to_numpy(made.rounds.accepted).tolist() == [1, 0, 0, 1]
    assert to_numpy(made.rounds.bonus).tolist() == [7, 2, 6]
    assert to_numpy(made.rounds.root).tolist() == [2, 3, 5]


def test_rows_before_a_gap_are_given_up() -> None:
    it = recording()
    it.computed(0, rows(0, 3))
    it.computed(5, rows(5, 7))
    assert (it.start, it.end) == (5, 7)
    assert np.concatenate(it.features)[:, 0].tolist() == [5, 6]


def test_what_was_lent_is_copied_once() -> None:
    it, batch = recording(), rows(0, 9)
    it.computed(0, batch[:3])
    layout, words = alone(7).words(tree=False)
    it.verified(layout, words, "a")
    assert it.own() == words.nbytes + batch[:3].nbytes
    assert it.own() == 0
    it.computed(3, batch[3:4])
    it.computed(4, batch[4:6])
    assert it.own() == batch[3:6].nbytes
    it.computed(8, batch[8:])  # what lies before the gap is given up
    assert it.own() == batch[8:].nbytes
    assert not any(np.shares_memory(values, batch) for values in it.features)
    assert not np.shares_memory(it.rounds[0][1], words)
    assert (it.start, it.end) == (8, 9)


@pytest.mark.parametrize("output", [[7, 1, 9], [7, 1, 2, 3, 4], [8]])
def test_what_the_rounds_did_not_commit_is_torn(output: list[int]) -> None:
    it = recording()
    it.computed(0, rows(0, 3))
    it.verified(*alone(7).words(tree=False), "a")
    it.computed(3, rows(3, 6))
    it.verified(*chain([1, 2], 2, 3).words(tree=False), "a")
    with pytest.raises(Torn, match="rounds"):
        trace(it, [0, 0, 0], output, "length")


def test_missing_features_are_torn() -> None:
    it = recording()
    it.computed(0, rows(0, 2))
    it.verified(*alone(7).words(tree=False), "a")
    with pytest.raises(Torn, match=r"features of 0\.\.1, expected up to 2"):
        trace(it, [0, 0, 0], [7], "length")
    with pytest.raises(Torn, match="no round"):
        trace(recording(), [0, 0, 0], [], "cancelled")


def test_temperature_of_the_target_is_the_requests_or_1() -> None:
    for temperature, expected in ((0.0, 1.0), (0.7, 0.7)):
        it = recording(temperature=temperature)
        it.computed(0, rows(0, 3))
        it.verified(*alone(7).words(tree=False), "a")
        assert trace(it, [0, 0, 0], [7], "length").top_temperature == expected


def test_links_to_parents() -> None:
    #     0 -> 1 -> 3, 4;  0 -> 2 -> 5;  6 hangs on nothing, and 7 on it
    child = np.array([[1, 3, 5, -1, -1, -1, 7, -1]])
    sibling = np.array([[-1, 2, -1, 4, -1, -1, -1, -1]])
    parents = parents_of(child, sibling)
    assert parents.tolist() == [[-1, 0, 0, 1, 1, 2, -1, 6]]
    assert reachable(parents).tolist() == [[True] * 6 + [False] * 2]
