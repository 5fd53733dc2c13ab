"""One trace on one line."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING

from livedraft.cli.console import printable
from livedraft.contracts.messages import DeadLetter, Delivery, Record, Trace
from livedraft.traces.arrays import to_numpy
from livedraft.traces.source import PARTITION
from livedraft.traces.stats import summarize

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Output tokens spelled for a preview.
_PREVIEW_TOKENS = 48
#: 66 columns before the output, so that a terminal of 80 shows some of it.
_FORMAT = "{:>7} {:<8} {:<8} {:<8} {:>7} {:>6} {:>4} {:<5} {:>4} {}"

HEADER = _FORMAT.format("offset", "finished", "domain", "tenant", "tokens", "rounds", "AL", "draft", "temp", "output")


class TraceLine(Record, frozen=True, kw_only=True):
    """What ``livedraft traces tail`` shows of a trace."""

    offset: int
    finished_at: float
    domain: str
    tenant: str
    prompt_tokens: int
    output_tokens: int
    rounds: int
    accept_length: float
    drafters: tuple[str, ...]
    temperature: float
    #: Beginning of the output; None where the target's tokenizer is not at hand.
    text: str | None
    #: "" on a stream that has only one.
    partition: str = ""

    def __str__(self) -> str:
        return _FORMAT.format(
            _where(self.offset, self.partition),
            time.strftime("%H:%M:%S", time.localtime(self.finished_at)),
            printable(self.domain),
            printable(self.tenant),
            f"{self.prompt_tokens}+{self.output_tokens}",
            self.rounds,
            f"{self.accept_length:.2f}",
            printable(",".join(self.drafters)) or "-",
            f"{self.temperature:g}",
            "-" if self.text is None else printable(self.text),
        )


class DeadLine(Record, frozen=True, kw_only=True):
    """What it shows of an item that could not be read."""

    offset: int
    dead_letter: str
    partition: str = ""

    def __str__(self) -> str:
        return f"{_where(self.offset, self.partition):>7} dead letter: {printable(self.dead_letter)}"


class Spelling:
    """Spells tokens with the tokenizer of a target, needing neither torch nor transformers nor the network.

    ``target`` is the setting ``engine.target``.
    """

    def __init__(self, target: str) -> None:
        self._tokenizer = _load(target)
        content = self._tokenizer.to_str() if self._tokenizer else ""
        self._hash = hashlib.sha256(content.encode()).hexdigest()[:16]

    def preview(self, trace: Trace) -> str | None:
        """The beginning of a trace's output; None where it comes from another tokenizer than ours."""
        if self._tokenizer is None or trace.tokenizer_hash != self._hash:
            return None
        return str(self._tokenizer.decode(to_numpy(trace.output)[:_PREVIEW_TOKENS].tolist()))


def describe(delivery: Delivery, spelling: Spelling) -> TraceLine | DeadLine:
    """The line of one item of the stream."""
    trace = delivery.item
    if isinstance(trace, DeadLetter):
        return DeadLine(offset=delivery.offset, dead_letter=trace.reason, partition=_partition(delivery))
    drafting = summarize([delivery]).overall
    return TraceLine(
        offset=delivery.offset,
        finished_at=trace.finished_at,
        domain=trace.domain,
        tenant=trace.tenant,
        prompt_tokens=trace.prompt.shape[0],
        output_tokens=trace.output.shape[0],
        rounds=drafting.rounds,
        accept_length=drafting.accept_length,
        drafters=trace.drafters,
        temperature=trace.sampling.temperature,
        text=spelling.preview(trace),
        partition=_partition(delivery),
    )


def _where(offset: int, partition: str) -> str:
    return f"{partition.rpartition('/')[2]}/{offset}" if partition else str(offset)


def _partition(delivery: Delivery) -> str:
    return "" if delivery.partition == PARTITION else delivery.partition


def _load(target: str) -> Tokenizer | None:
    if importlib.util.find_spec("tokenizers") is None:  # not in the environment of a trainer or a registry
        return None
    from tokenizers import Tokenizer

    path = _tokenizer_file(target)
    return Tokenizer.from_file(str(path)) if path and path.is_file() else None


def _tokenizer_file(target: str) -> Path | None:
    if target == "bundled":
        return Path(__file__).parents[1] / "models" / "tiny" / "tokenizer.json"
    if Path(target).is_dir():
        return Path(target) / "tokenizer.json"
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(target, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
