"""Plain torch in place of the CPU kernels that SGLang 0.5.23 calls for EAGLE-3, chains and trees.

PyPI's ``sglang-kernel`` holds CUDA kernels alone, and the CPU ones are for AVX-512 and AMX.  Names and signatures are
those of the call sites.  ``torch.ops.sgl_kernel.convert_weight_packed`` must stay absent: by it SGLang decides
whether a processor with AMX gets kernels for it.
"""

from typing import NoReturn

from . import attention as attention
from .cache import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
)
from .tree import build_tree_kernel_efficient_cpu, fill_bonus_tokens_cpu, verify_tree_greedy_cpu

__version__ = "0.4.10"

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]


def rotate_input_ids_cpu(*_: object) -> NoReturn:
    """Multi-layer EAGLE, which imports this wherever speculation runs."""
    raise NotImplementedError("rotate_input_ids_cpu: multi-layer EAGLE does not run on this shim")
