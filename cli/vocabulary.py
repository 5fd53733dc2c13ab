"""``livedraft drafts refresh-vocabulary``: the tokens that the drafter can propose, chosen anew from recent traffic."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from livedraft.cli.console import ConfigOption, output, progress_output, settings_from
from livedraft.contracts.errors import NotFound, SettingsError
from livedraft.contracts.messages import Manifest, Offsets, Trace
from livedraft.contracts.ports import Registry
from livedraft.contracts.settings import Settings
from msgspec.structs import replace
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    import numpy as np
    from livedraft.contracts.checkpoint import DrafterConfig

#: Fewer traces than this say little about thousands of tokens.
_LEAST_TRACES = 8


class _Drafter(NamedTuple):
    """A registered drafter."""

    version: str
    config: DrafterConfig
    manifest: Manifest
    tensors: dict[str, np.ndarray]


class _Counted(NamedTuple):
    """What recent traffic says: expected counts by token, of how many traces, read up to where."""

    counts: np.ndarray
    traces: int
    offsets: Offsets
    #: The newest of the traces, to learn from.
    newest: Sequence[Trace]


def refresh(
    version: Annotated[str, typer.Argument(metavar="VERSION|ALIAS", help="The drafter to go on from.")] = "live",
    config: ConfigOption = None,
    records: Annotated[
        int, typer.Option("--records", min=1, metavar="N", help="Count the newest so many records of each partition.")
    ] = 20_000,
    steps: Annotated[
        int, typer.Option("--steps", min=0, metavar="N", help="Learn the new tokens for so many steps; 0: not at all.")
    ] = 100,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", show_default=False, help="Default: below trainer.folder, by lineage."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be gained.")] = False,
) -> None:
    """Choose the tokens that the drafter can propose anew, as often as the target says them in recent traces.

    Where traffic has moved to other words than those of `drafts init --text`, the drafter loses every round at them:
    livedraft_trainer_excluded_share tells how often. This makes a candidate with as many tokens as before, the most
    frequent ones of now. Tokens that stay keep their rows of the head, new ones take the target's; the rest of the
    weights is the old drafter's, and then learns from the newest of those traces for --steps steps. It begins a
    lineage: what is trained from it has its tokens.

    The gate judges it like any other candidate, and the embedded engine takes it between two steps; the trainer then
    goes on from it. SGLang keeps the tokens that it started with: it must be started again, from the folder written
    here (see the runbook).

    Requests held out for the gate are not counted.

    Example: livedraft drafts refresh-vocabulary --dry-run
    """
    import numpy as np
    from livedraft.cli.wiring_registry import open_registry
    from livedraft.contracts import checkpoint
    from livedraft.serving.local import place
    from livedraft.trainer.target import end_tokens, read_target
    from livedraft.trainer.vocabulary import most_frequent, with_vocabulary

    settings = settings_from(config)
    if out is not None:
        _require_free(out)
    registry = open_registry(settings.registry)
    with _bar() as bar:
        task = bar.add_task("asking the registry", total=None)
        target = place.find(settings.engine.target)
        parent = _fetch(registry, version, place.revision(target))
        bar.remove_task(task)
        counted = _count(settings, parent.manifest, parent.config.vocab_size, records, bar)
        before = parent.tensors["d2t"] + np.arange(parent.config.draft_vocab_size)
        kept = most_frequent(counted.counts, len(before), end_tokens(target), before)
        covered, covers = (float(counted.counts[ids].sum() / counted.counts.sum()) for ids in (before, kept))
        new = len(np.setdiff1d(kept, before))
        output().print(
            f"{counted.traces:,} traces: version {parent.version} can propose {covered:.1%} of what the target says, "
            f"{covers:.1%} with {new:,} of {len(kept):,} tokens exchanged"
        )
        if dry_run or not new:
            output().print("nothing written" if new else "they are the most frequent ones already; nothing written")
            return
        refreshed = with_vocabulary(parent.tensors, kept, read_target(target).head.numpy())
        if steps:
            refreshed, learned = _learn(settings, parent, refreshed, counted.newest, target, steps, bar)
            parent = parent._replace(manifest=learned)
        bar.add_task("writing the drafter", total=None)
        lineage = checkpoint.lineage(checkpoint.hash_tensors(refreshed))
        folder = (out or Path(settings.trainer.folder) / f"vocabulary-{lineage}").resolve()
        measured = {"covered_before": covered, "covered_after": covers, "tokens_exchanged": float(new)}
        published = _publish(registry, folder, parent, refreshed, counted.offsets, measured)
    output().print(f"registered as version {published}, lineage {lineage}, for the gate to judge", style="green")
    output().print(f"SGLang must be started again for it: --speculative-draft-model-path {folder}", style="dim")


def _fetch(registry: Registry, version: str, target_revision: str) -> _Drafter:
    """Raises SettingsError for a drafter that can propose everything."""
    from livedraft.cli.drafts import find
    from livedraft.contracts import checkpoint

    number = find(registry, version).version
    with tempfile.TemporaryDirectory(prefix="livedraft-") as scratch:
        folder = registry.fetch(number, Path(scratch))
        config, manifest = checkpoint.verify(folder, target_revision=target_revision)
        tensors = checkpoint.load(folder)
    if config.draft_vocab_size == config.vocab_size:
        raise SettingsError(f"version {number} can propose all {config.vocab_size:,} tokens; nothing is to be chosen")
    return _Drafter(number, config, manifest, tensors)


def _learn(
    settings: Settings,
    parent: _Drafter,
    tensors: Mapping[str, np.ndarray],
    traces: Sequence[Trace],
    target: Path,
    steps: int,
    bar: Progress,
) -> tuple[dict[str, np.ndarray], Manifest]:
    from livedraft.trainer.lineage import first_lessons

    task = bar.add_task("learning the new tokens", total=steps)
    taught = first_lessons(
        parent.config, tensors, parent.manifest, traces, settings.trainer, target, steps, lambda: bar.advance(task)
    )
    bar.remove_task(task)
    return taught


def _publish(
    registry: Registry,
    folder: Path,
    parent: _Drafter,
    tensors: Mapping[str, np.ndarray],
    counted: Offsets,
    measured: dict[str, float],
) -> str:
    """The version of a candidate for the gate, which also lies in ``folder``, whole or not at all."""
    from livedraft.contracts import checkpoint
    from livedraft.swap.controller import REFRESHED

    about = replace(
        parent.manifest,
        tensors={},
        parent=parent.version,
        vocabulary="refreshed",
        # Its words were chosen by these traces, so they are no fair test of it.
        offsets={
            name: max(parent.manifest.offsets.get(name, 0), counted.get(name, 0))
            for name in parent.manifest.offsets.keys() | counted.keys()
        },
        created_at=time.time(),
    )
    _require_free(folder)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=_made(folder.parent))) / "drafter"
    try:
        written = checkpoint.write(half, parent.config, tensors, about)
        published = registry.publish(half, written, measured).version
        registry.point(REFRESHED, published)
        half.rename(folder)
    finally:
        shutil.rmtree(half.parent, ignore_errors=True)
    return published


def _count(settings: Settings, manifest: Manifest, vocab_size: int, records: int, bar: Progress) -> _Counted:
    """Raises NotFound where the stream holds too few traces of the manifest's target."""
    import numpy as np
    from livedraft.cli.stream_view import holdings, view
    from livedraft.traces.admission import held_out
    from livedraft.trainer.vocabulary import expected_counts

    held = holdings(settings, None, offsets=False)
    begin = {name: max(bounds.oldest, bounds.end - records) for name, bounds in held.items()}
    task = bar.add_task("counting tokens", total=sum(held[name].end - first for name, first in begin.items()))
    counts, seen, offsets = np.zeros(vocab_size), 0, dict(begin)
    newest: deque[Trace] = deque(maxlen=settings.trainer.replay_traces // 2)
    for name, first in begin.items():
        for delivery in view(settings).read({name: first}):
            if delivery.offset >= held[name].end:
                break
            offsets[name] = delivery.offset + 1
            bar.update(task, completed=sum(offsets[n] - begin[n] for n in begin))
            trace = delivery.item
            if not isinstance(trace, Trace) or held_out(trace.request_id, settings.traces.held_out):
                continue
            if _is_of(manifest, trace) and _knows(trace, vocab_size):
                counts += expected_counts(trace, vocab_size)
                seen += 1
                newest.append(trace)
    bar.remove_task(task)
    if seen < _LEAST_TRACES:
        raise NotFound(f"{settings.traces.url}: {seen} traces of {manifest.target} to count, expected {_LEAST_TRACES}")
    return _Counted(counts, seen, offsets, tuple(newest))


def _is_of(manifest: Manifest, trace: Trace) -> bool:
    return (trace.target_revision, trace.tokenizer_hash) == (manifest.target_revision, manifest.tokenizer_hash)


def _knows(trace: Trace, vocab_size: int) -> bool:
    from livedraft.traces.arrays import to_numpy

    return all(int(to_numpy(a).max(initial=0)) < vocab_size for a in (trace.output, trace.rounds.top_ids))


def _require_free(folder: Path) -> None:
    if folder.exists():
        raise SettingsError(f"--out: {folder} exists; drafters are never written over")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=progress_output(), transient=True)
