"""Lets PyPI's torchvision, which is built for CUDA, be imported beside a torch without it.

Its operators do not load then, yet ``torchvision._meta_registrations`` describes two of them: they are declared just
before.  Python imports this module in each process that has its folder on PYTHONPATH.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType


class _Declarations(importlib.abc.MetaPathFinder):
    """Finds nothing, but declares the operators when they are about to be described."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname != "torchvision._meta_registrations":
            return
        import torch

        if not hasattr(torch.ops.torchvision, "nms"):
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")


sys.meta_path.insert(0, _Declarations())
