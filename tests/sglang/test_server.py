"""What the other tests rely on."""

from __future__ import annotations

from pathlib import Path

import pytest

from .server import serving


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"(?s)ended with status [1-9].*unrecognized arguments: --no-such-option"),
        serving(tmp_path, arguments=["--no-such-option"]),
    ):
        pass
