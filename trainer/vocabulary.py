"""Which tokens a drafter can propose: EAGLE-3 keeps the most frequent ones (arXiv 2503.01840; FR-Spec, 2502.14856).

Rows of the head are most of a small drafter's work; what it cannot propose costs the round, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from livedraft.contracts.errors import SettingsError

#: Characters tokenised at once; a piece ends with a line.
_PIECE = 1 << 16


def count_tokens(
    files: Sequence[Path], encode: Callable[[str], Sequence[int]], vocab_size: int, read: Callable[[int], None]
) -> np.ndarray:
    """i64[vocab_size] how often each token occurs in UTF-8 text files; ``read`` hears of bytes as they are done.

    Raises SettingsError naming a file that cannot be read.
    """
    counts = np.zeros(vocab_size, np.int64)
    for path in files:
        try:
            with path.open(encoding="utf-8") as file:
                while lines := file.readlines(_PIECE):
                    piece = "".join(lines)
                    counts += np.bincount(encode(piece), minlength=vocab_size)
                    read(len(piece.encode()))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--text {path}: {error}") from error
    return counts


def most_frequent(counts: np.ndarray, size: int, always: Iterable[int] = ()) -> np.ndarray:
    """i64[size] ids of the most frequent tokens, ascending; ``always`` are among them, of equals the lower id.

    Byte-pair merges come in the order of their frequency in the tokenizer's own text, so that is what decides among
    tokens that never occurred.
    """
    rank = np.array(counts, np.int64)
    kept = [token for token in always if token < len(rank)]
    rank[kept] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-rank, kind="stable")[:size])
