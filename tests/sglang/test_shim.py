"""Each operator of the shim against loops that say the same thing slowly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import sgl_kernel
import sgl_kernel.speculative
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

SEEDS = range(4)
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


@dataclass(frozen=True)
class Pool:
    """Requests whose positions lie in random slots of a cache."""

    #: i32[requests, positions]
    req_to_token: Tensor
    #: i64[B] rows of the requests of a batch, in no order.
    rows: Tensor
    #: i64[B]
    lengths: Tensor
    #: f[slots, KV_HEADS, HEAD_DIM]
    keys: Tensor
    values: Tensor


def make_pool(seed: int, batch: int = 3, longest: int = 20, spare: int = 24) -> Pool:
    """Lengths from 1 to ``longest``, and slots for ``spare`` positions more."""
    g = torch.Generator().manual_seed(seed)
    requests, positions = batch + 2, longest + spare
    slots = requests * positions
    return Pool(
        req_to_token=torch.randperm(slots, generator=g).view(requests, positions).int(),
        rows=torch.randperm(requests, generator=g)[:batch],
        lengths=torch.randint(1, longest + 1, (batch,), generator=g),
        keys=torch.randn(slots, KV_HEADS, HEAD_DIM, generator=g),
        values=torch.randn(slots, KV_HEADS, HEAD_DIM, generator=g),
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, seen: list[int], scale: float) -> Tensor:
    """One query [HEADS, HEAD_DIM] over the rows ``seen``, head by head in float64."""
    out = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
    for head in range(HEADS):
        group = head * KV_HEADS // HEADS
        scores = [scale * float(query[head].double() @ keys[i, group].double()) for i in seen]
        weights = [math.exp(s - max(scores)) for s in scores]
        for weight, i in zip(weights, seen, strict=True):
            out[head] += weight / sum(weights) * values[i, group].double()
    return out.float()


@pytest.mark.parametrize("seed", SEEDS)
def test_assign_req_to_token_pool(seed: int) -> None:
    pool = make_pool(seed)
    added = torch.tensor([4, 0, 7])
    slots = torch.arange(1000, 1011)
    expected, taken = pool.req_to_token.clone(), 0
    for row, start, count in zip(pool.rows.tolist(), pool.lengths.tolist(), added.tolist(), strict=True):
        for i in range(count):
            expected[row, start + i] = slots[taken]
            taken += 1
    sgl_kernel.assign_req_to_token_pool_cpu(
        pool.rows, pool.req_to_token, pool.lengths, pool.lengths + added, slots, pool.req_to_token.shape[1]
    )
    assert torch.equal(pool.req_to_token, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_assign_extend_cache_locs(seed: int) -> None:
    pool = make_pool(seed)
    counts = [5, 0, 2]
    expected = [
        int(pool.req_to_token[row, start + i])
        for row, start, count in zip(pool.rows.tolist(), pool.lengths.tolist(), counts, strict=True)
        for i in range(count)
    ]
    out = torch.full((9,), -7)
    sgl_kernel.assign_extend_cache_locs_cpu(
        pool.rows, pool.req_to_token, pool.lengths, pool.lengths + torch.tensor(counts), out, 0
    )
    assert out.tolist() == [*expected, -7, -7]


@pytest.mark.parametrize(("topk", "steps"), [(1, 3), (4, 3)])
def test_assign_draft_cache_locs_contiguous(topk: int, steps: int) -> None:
    pool = make_pool(topk)
    expected = [
        int(pool.req_to_token[row, length + i])
        for row, length in zip(pool.rows.tolist(), pool.lengths.tolist(), strict=True)
        for i in range(topk * steps)
    ]
    out = torch.zeros(len(expected), dtype=torch.int64)
    sgl_kernel.assign_draft_cache_locs_contiguous_cpu(
        pool.rows, pool.req_to_token, pool.lengths, out, pool.req_to_token.shape[1], topk, steps
    )
    assert out.tolist() == expected


@pytest.mark.parametrize(("topk", "steps"), [(1, 3), (4, 3), (2, 5)])
def test_build_draft_decode_metadata(topk: int, steps: int) -> None:
    pool = make_pool(topk)
    table = sgl_kernel.build_draft_decode_metadata_cpu(
        pool.req_to_token, pool.rows, pool.lengths, topk, steps, pool.req_to_token.shape[1]
    )
    assert table.shape == (3 * topk, pool.req_to_token.shape[1])
    for request, (row, length) in enumerate(zip(pool.rows.tolist(), pool.lengths.tolist(), strict=True)):
        for branch in range(topk):
            seen = [int(pool.req_to_token[row, i]) for i in range(length)]
            seen += [int(pool.req_to_token[row, length + branch * steps + i]) for i in range(steps)]
            assert table[request * topk + branch, : length + steps].tolist() == seen


def test_fill_accept_out_cache_loc() -> None:
    slots = torch.tensor([50, 51, 52, 53, 60, 61, 62, 63])
    accepted = torch.tensor([[0, 2, -1], [4, 5, 7]], dtype=torch.int32)
    out = torch.zeros(8, dtype=torch.int64)
    sgl_kernel.fill_accept_out_cache_loc_cpu(accepted, slots, out)
    assert out.tolist() == [50, 52, 60, 61, 63, 0, 0, 0]


def test_copy_all_layer_kv_cache() -> None:
    """Slots that are written while others still need them: 3 <- 5, 5 <- 6, 6 <- 3."""
    buffers = [torch.randn(10, 2, 4), torch.randn(10, 3).double()]
    before = [b.clone() for b in buffers]
    target, source = torch.tensor([3, 5, 6]), torch.tensor([5, 6, 3], dtype=torch.int32)
    pointers = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.uint64)
    strides = torch.tensor([b[0].numel() * b.element_size() for b in buffers])
    sgl_kernel.copy_all_layer_kv_cache_cpu(pointers, strides, target, source)
    for buffer, old in zip(buffers, before, strict=True):
        for slot in range(10):
            came_from = {3: 5, 5: 6, 6: 3}.get(slot, slot)
            assert torch.equal(buffer[slot], old[came_from])


@pytest.mark.parametrize("seed", SEEDS)
def test_decode_attention(seed: int) -> None:
    pool = make_pool(seed)
    query, key, value = (torch.randn(3, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    slots = torch.stack([pool.req_to_token[r, n - 1] for r, n in zip(pool.rows, pool.lengths, strict=True)]).long()
    keys, values = pool.keys.clone(), pool.values.clone()
    keys[slots], values[slots] = key, value
    output = torch.empty_like(query)
    torch.ops.sgl_kernel.decode_attention_cpu(
        *(query, pool.keys, pool.values, 1.0, 1.0, output, key, value, slots, torch.empty(0)),
        *(pool.req_to_token, pool.rows, pool.lengths, 0.3, 0.0, False, 0, None, None),
    )
    assert torch.equal(pool.keys, keys)
    assert torch.equal(pool.values, values)
    for i, (row, length) in enumerate(zip(pool.rows.tolist(), pool.lengths.tolist(), strict=True)):
        seen = pool.req_to_token[row, :length].tolist()
        torch.testing.assert_close(output[i], attend(query[i], keys, values, seen, 0.3))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "tree"])
@pytest.mark.parametrize("seed", SEEDS)
def test_extend_attention(seed: int, masked: bool) -> None:
    """Requests with nothing before them, with a prefix in the cache, and with a tree's mask."""
    pool = make_pool(seed)
    rng = np.random.default_rng(seed)
    new = torch.tensor([4, 4, 4] if masked else [7, 1, 3])
    prefix = torch.tensor([0, *pool.lengths.tolist()[1:]])
    starts = new.cumsum(0) - new
    rows = int(new.sum())
    query, key, value = (torch.randn(rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    tree = torch.from_numpy(rng.random((3, 4, 4)) < 0.5)
    tree[:, range(4), range(4)] = True
    output = torch.empty_like(query)
    torch.ops.sgl_kernel.extend_attention_cpu(
        *(query, key, value, output, pool.keys, pool.values, 1.0, 1.0, pool.req_to_token, pool.rows),
        *(prefix + new, new.int(), starts.int(), int(new.max()), 0.3, 0.0, False, 0, None, None),
        *(tree.flatten() if masked else None, True),
    )
    for b, (row, before, count) in enumerate(zip(pool.rows.tolist(), prefix.tolist(), new.tolist(), strict=True)):
        cached = pool.req_to_token[row, :before].long()
        own = slice(int(starts[b]), int(starts[b]) + count)
        keys, values = torch.cat([pool.keys[cached], key[own]]), torch.cat([pool.values[cached], value[own]])
        for i in range(count):
            among = [j for j in range(count) if (tree[b, i, j] if masked else j <= i)]
            expected = attend(query[own][i], keys, values, [*range(before), *(before + j for j in among)], 0.3)
            torch.testing.assert_close(output[own][i], expected)


@pytest.mark.parametrize(
    "asked", [(2.0, 0.0, False, 0), (1.0, 30.0, False, 0), (1.0, 0.0, True, 0), (1.0, 0.0, False, 128)]
)
def test_attention_that_other_models_ask_for_is_refused(asked: tuple[float, float, bool, int]) -> None:
    scale, cap, cross, window = asked
    pool, query = make_pool(0), torch.randn(3, HEADS, HEAD_DIM)
    with pytest.raises(NotImplementedError, match="attention of the CPU shim"):
        torch.ops.sgl_kernel.decode_attention_cpu(
            *(query, pool.keys, pool.values, scale, 1.0, torch.empty_like(query), None, None, pool.lengths),
            *(torch.empty(0), pool.req_to_token, pool.rows, pool.lengths, 0.3, cap, cross, window, None, None),
        )


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, list[list[int]], list[list[int]]]:
    """``topk``, and per request the groups' parents and the selected candidates.

    Drafting goes as in EAGLE-2: of each level's candidates the best ``topk`` are drafted from, and of all
    candidates the best are selected; here the scores are drawn, and may make a child better than its parent.
    """
    topk = draw(st.integers(1, 3))
    depth = draw(st.integers(1, 3))
    candidates = topk + (depth - 1) * topk * topk
    size = draw(st.integers(1, candidates))
    parents, selected = [], []
    for _ in range(draw(st.integers(1, 2))):
        groups = [-1]
        first, count = 0, topk
        for _ in range(depth - 1):
            level = draw(st.permutations(range(first, first + count)))[:topk]
            groups += sorted(level)
            first, count = first + count, topk * topk
        parents.append(groups)
        selected.append(sorted(draw(st.permutations(range(candidates)))[:size]))
    return topk, parents, selected


@given(trees(), st.data())
def test_tree(drawn: tuple[int, list[list[int]], list[list[int]]], data: st.DataObject) -> None:
    """Built and verified like a tree of Python lists."""
    topk, parents, selected = drawn
    batch, n = len(selected), len(selected[0]) + 1
    lengths = torch.tensor([data.draw(st.integers(1, 9)) for _ in range(batch)])
    mask = torch.ones(batch * n * n + 5, dtype=torch.bool)
    positions = torch.empty(batch * n, dtype=torch.int64)
    index, child, sibling = torch.full((3, batch, n), -1)
    sgl_kernel.build_tree_kernel_efficient_cpu(
        *(torch.tensor(parents), torch.tensor(selected), lengths, mask, positions, index, child, sibling),
        *(topk, 3, n, 1),
    )
    tokens = torch.tensor([[data.draw(st.integers(0, 2)) for _ in range(n)] for _ in range(batch)])
    best = torch.tensor([[data.draw(st.integers(0, 2)) for _ in range(n)] for _ in range(batch)])
    deepest = data.draw(st.integers(1, 4))
    predicts = torch.full((batch * n,), -1, dtype=torch.int32)
    accepted = torch.full((batch, deepest), -1, dtype=torch.int32)
    counts = torch.empty(batch, dtype=torch.int32)
    sgl_kernel.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=counts,
        candidates=tokens,
        retrive_index=index,
        retrive_next_token=child,
        retrive_next_sibling=sibling,
        target_predict=best,
    )
    assert index.flatten().tolist() == list(range(batch * n))
    assert mask[batch * n * n :].all(), "past the trees"
    for b in range(batch):
        above = [-1, *(parent_node(c, topk, parents[b], selected[b]) for c in selected[b])]
        children = [[i for i in range(n) if above[i] == node] for node in range(n)]
        for node in range(n):
            line = ancestors(node, above)
            assert [j for j in range(n) if mask[: batch * n * n].view(batch, n, n)[b, node, j]] == sorted({0, *line})
            assert positions.view(batch, n)[b, node] == lengths[b] + len({0, *line}) - 1
            assert chained(int(child[b, node]), sibling[b].tolist()) == children[node]
        path = [0]
        while len(path) < deepest:
            hits = [i for i in children[path[-1]] if tokens[b, i] == best[b, path[-1]]]
            if not hits:
                break
            path.append(hits[0])
        assert accepted[b].tolist() == [b * n + node for node in path] + [-1] * (deepest - len(path))
        assert counts[b] == len(path) - 1
        said = {b * n + node: int(best[b, node]) for node in path}
        assert predicts[b * n : (b + 1) * n].tolist() == [said.get(b * n + node, -1) for node in range(n)]


def parent_node(candidate: int, topk: int, groups: list[int], selected: list[int]) -> int:
    """The node above a candidate; -2 where that was not selected."""
    if candidate < topk:
        return 0
    above = groups[candidate // topk]
    return selected.index(above) + 1 if above in selected else -2


def ancestors(node: int, above: list[int]) -> list[int]:
    """A node and those above it."""
    line = []
    while node >= 0:
        line.append(node)
        node = above[node]
    return line


def chained(first: int, sibling: list[int]) -> list[int]:
    """The nodes of a chain of siblings."""
    nodes = []
    while first >= 0:
        nodes.append(first)
        first = sibling[first]
    return nodes


def test_other_tree_masks_are_refused() -> None:
    empty = torch.empty(0)
    with pytest.raises(NotImplementedError, match="tree mask mode 0"):
        sgl_kernel.build_tree_kernel_efficient_cpu(
            empty, empty, empty, empty, empty, empty, empty, empty, topk=1, depth=1, num_nodes=2, mask_mode=0
        )


def test_fill_bonus_tokens() -> None:
    accepted = torch.tensor([10, 11, 12, 20, 21, 22], dtype=torch.int32)
    bonus = torch.zeros(2, dtype=torch.int32)
    sgl_kernel.fill_bonus_tokens_cpu(accepted, torch.tensor([3, 1], dtype=torch.int32), bonus, 3)
    assert bonus.tolist() == [12, 20]


def test_operators_of_other_algorithms_say_so() -> None:
    with pytest.raises(NotImplementedError, match="multi-layer EAGLE"):
        sgl_kernel.rotate_input_ids_cpu()
    with pytest.raises(NotImplementedError, match="n-gram"):
        sgl_kernel.speculative.reconstruct_indices_from_tree_mask()


def test_processors_with_amx_get_no_kernels_for_it() -> None:
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")
