"""Imported wherever speculation runs; called by n-gram speculation only."""

from typing import NoReturn


def reconstruct_indices_from_tree_mask(*_: object) -> NoReturn:
    """Tree links out of an ancestor mask."""
    raise NotImplementedError("reconstruct_indices_from_tree_mask: n-gram speculation does not run on this shim")
