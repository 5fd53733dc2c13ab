"""``torch.ops.sgl_kernel.decode_attention_cpu`` and ``extend_attention_cpu``: attention over a cache of slots.

T query rows, H heads, K key-value heads, D head size, S slots.  Of the features that a model may ask for, only those
of the Llama family: a request for another fails.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op(
    "sgl_kernel::decode_attention_cpu", mutates_args=("k_cache", "v_cache", "output"), device_types="cpu"
)
def decode_attention_cpu(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: float,
    v_scale: float,
    output: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    loc: Tensor,
    attn_logits: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """One query per request, [B, H, D] over [S, K, D]; ``key`` and ``value`` [B, K, D] go to slots ``loc`` first."""
    _refuse(k_scale, v_scale, logit_cap, is_cross_attn, sliding_window_size, encoder_lens, sinks)
    if key is not None and value is not None:
        k_cache[loc] = key.view(-1, *k_cache.shape[1:])
        v_cache[loc] = value.view(-1, *v_cache.shape[1:])
    for i, (row, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[row, :length].long()
        output[i] = _attend(query[i : i + 1], k_cache[slots], v_cache[slots], None, sm_scale)[0]


@torch.library.custom_op("sgl_kernel::extend_attention_cpu", mutates_args=("output",), device_types="cpu")
def extend_attention_cpu(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_seq_lens: Tensor,
    extend_start_loc: Tensor,
    max_len_extend: int,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Several queries per request: its last ``extend_seq_lens`` positions, rows of ``query`` from its start on.

    They see everything before them in the cache and, among ``key`` and ``value``, themselves and those before; or,
    with ``tree_mask`` bool[sum of N * N], what it marks.
    """
    _refuse(k_scale, v_scale, logit_cap, is_cross_attn, sliding_window_size, encoder_lens, sinks)
    if not is_causal or key is None or value is None:
        raise NotImplementedError("extend_attention_cpu: only causal attention with keys and values of its own")
    seen = 0
    requests = zip(
        req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), extend_start_loc.tolist(), strict=True
    )
    for row, length, new, start in requests:
        rows = slice(start, start + new)
        slots = req_to_token[row, : length - new].long()
        keys = torch.cat([k_cache[slots], key[rows].view(-1, *k_cache.shape[1:])])
        values = torch.cat([v_cache[slots], value[rows].view(-1, *v_cache.shape[1:])])
        mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        if tree_mask is not None:
            mask[:, length - new :] = tree_mask.view(-1)[seen : seen + new * new].view(new, new)
            seen += new * new
        output[rows] = _attend(query[rows], keys, values, mask, sm_scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[T, H, D], [S, K, D], [S, K, D] -> [T, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def _refuse(
    k_scale: float,
    v_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
) -> None:
    asked = {
        "a quantized cache": (k_scale, v_scale) != (1.0, 1.0),
        "capped logits": logit_cap > 0,
        "cross attention": is_cross_attn or encoder_lens is not None,
        "a sliding window": sliding_window_size > 0,
        "attention sinks": sinks is not None,
    }
    for feature, wanted in asked.items():
        if wanted:
            raise NotImplementedError(f"attention of the CPU shim: {feature}")
