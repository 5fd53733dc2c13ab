"""The Triton kernels: on a GPU where there is one, else by Triton's interpreter.

Not part of `make test`, which needs no Triton; `make test-kernels` installs it and runs these.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
