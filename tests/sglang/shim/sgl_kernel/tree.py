"""Draft trees: built, verified greedily.  B requests, N nodes each, node 0 the last committed token.

A tree is two links per node, its first child and its next sibling (-1: none).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: ``TreeMaskMode.QLEN_ONLY``, which SGLang takes on a CPU: masks hold no columns for what is committed.
_NODES_ONLY = 1


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    depth: int,
    num_nodes: int,
    mask_mode: int,
) -> None:
    """Link the candidates that were selected, and say what each may attend to.

    Candidates come in groups of ``topk`` siblings; ``parent_list`` i64[B, groups] names each group's parent
    candidate, the first group's being node 0.  ``selected_index`` i64[B, N - 1] are the selected candidates,
    ascending, so that parents precede children.  One whose parent was not selected (scores can tie) is left out of
    the links.
    """
    if mask_mode != _NODES_ONLY:
        raise NotImplementedError(f"tree mask mode {mask_mode}: SGLang takes {_NODES_ONLY} on a CPU")
    size, n = len(seq_lens), num_nodes
    every = torch.arange(size)
    selected = selected_index.view(size, n - 1)
    group = selected // topk
    parent_candidate = parent_list.view(size, -1).gather(1, group)
    found = selected[:, None, :] == parent_candidate[:, :, None]
    parent = torch.where(group == 0, 0, found.int().argmax(2) + 1)
    linked = (group == 0) | found.any(2)

    seen = torch.eye(n, dtype=torch.bool).repeat(size, 1, 1)
    seen[:, :, 0] = True
    child = torch.full((size, n), -1)
    sibling = torch.full((size, n), -1)
    for node in range(1, n):
        above = torch.where(linked[:, node - 1], parent[:, node - 1], 0)
        seen[:, node] |= seen[every, above]
    for node in range(n - 1, 0, -1):  # backwards, so that the first child comes to stand first
        b = every[linked[:, node - 1]]
        above = parent[b, node - 1]
        sibling[b, node] = child[b, above]
        child[b, above] = node

    tree_mask.view(-1)[: size * n * n] = seen.flatten().to(tree_mask.dtype)
    positions.view(size, n).copy_(seq_lens[:, None] + seen.sum(2) - 1)
    retrieve_index.view(size, n).copy_(torch.arange(size * n).view(size, n))
    retrieve_next_token.view(size, n).copy_(child)
    retrieve_next_sibling.view(size, n).copy_(sibling)


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Follow the target's best tokens through each tree.

    Writes the indices of the nodes passed, node 0 first, into ``accept_index``; how many were drafts into
    ``accept_token_num``; and the target's token after each of them into ``predicts`` i32[B * N].
    """
    index, best = retrive_index.tolist(), target_predict.view(len(candidates), -1).tolist()
    child, sibling, tokens = retrive_next_token.tolist(), retrive_next_sibling.tolist(), candidates.tolist()
    for b in range(len(candidates)):
        path = [0]
        while len(path) < accept_index.shape[1]:
            node = child[b][path[-1]]
            while node >= 0 and tokens[b][node] != best[b][path[-1]]:
                node = sibling[b][node]
            if node < 0:
                break
            path.append(node)
        passed = torch.tensor([index[b][node] for node in path])
        accept_index[b, : len(path)] = passed.to(accept_index.dtype)
        accept_token_num[b] = len(path) - 1
        predicts[passed] = torch.tensor([best[b][node] for node in path], dtype=predicts.dtype)


def fill_bonus_tokens_cpu(accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, stride: int) -> None:
    """The last accepted token of each request, which owns ``stride`` entries of ``accept_tokens``."""
    last = torch.arange(len(accept_lens)) * stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.flatten()[last])
