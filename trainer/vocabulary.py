"""Which tokens a drafter can propose: EAGLE-3 keeps the most frequent ones (arXiv 2503.01840; FR-Spec, 2502.14856).

Rows of the head are most of a small drafter's work; what it cannot propose costs the round, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import Trace
from livedraft.traces.arrays import to_float32, to_numpy
from livedraft.trainer.lesson import lay_open, row_after

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


def most_frequent(
    counts: np.ndarray, size: int, always: Iterable[int] = (), before: np.ndarray | None = None
) -> np.ndarray:
    """i64[size] ids of the most frequent tokens, ascending; ``always`` are among them.

    Of equals those in ``before`` (ids) come first, then the lower id: byte-pair merges come in the order of their
    frequency in the tokenizer's own text, so that is what decides among tokens that never occurred.
    """
    rank = np.array(counts, np.float64)
    rank[[token for token in always if token < len(rank)]] = np.inf
    new = np.ones(len(rank), bool)
    if before is not None:
        new[before] = False
    return np.sort(np.lexsort((new, -rank))[:size])


def expected_counts(trace: Trace, vocab_size: int) -> np.ndarray:
    """f64[vocab_size] how often the target would say each token where the trace has it say one.

    Of the candidates that were recorded their probabilities, instead of the one that was drawn; a token drawn from
    among the others counts as one.  The mean is that of counting tokens, with less scatter.
    """
    counts = np.zeros(vocab_size)
    prompt, output = trace.prompt.shape[0], to_numpy(trace.output).astype(np.int64)
    rows = row_after(trace, lay_open(trace.rounds), prompt + len(output))[prompt - 1 : -1] if prompt else output * 0 - 1
    recorded = rows >= 0
    ids = to_numpy(trace.rounds.top_ids)[rows[recorded]]
    np.add.at(counts, ids, np.exp(to_float32(trace.rounds.top_logprobs)[rows[recorded]]))
    drawn = np.ones(len(output), bool)
    drawn[recorded] = (ids != output[recorded][:, None]).all(1)
    np.add.at(counts, output[drawn], 1)
    return counts


def with_vocabulary(tensors: Mapping[str, np.ndarray], kept: np.ndarray, head: np.ndarray) -> dict[str, np.ndarray]:
    """A drafter's tensors with the tokens ``kept`` (ids, ascending) to propose.

    The rows of those it could propose before stay what they learned to be; new ones are the target's ``head`` [V, H].
    """
    d2t, vocab_size = tensors["d2t"], len(tensors["t2d"])
    before = d2t + np.arange(len(d2t))
    row = np.full(vocab_size, -1)
    row[before] = np.arange(len(before))
    known = row[kept] >= 0
    rows = head[kept].astype(np.float32)
    rows[known] = tensors["lm_head.weight"][row[kept[known]]]
    marked = np.zeros(vocab_size, bool)
    marked[kept] = True
    return {**tensors, "lm_head.weight": rows, "d2t": kept - np.arange(len(kept)), "t2d": marked}
