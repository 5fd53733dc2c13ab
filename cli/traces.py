"""``livedraft traces``: look into the trace stream, and send parts of it again."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from livedraft.cli.console import (
    ConfigOption,
    JsonOption,
    output,
    print_json,
    printable,
    progress_output,
    settings_from,
)
from livedraft.contracts.errors import BadRequest, CorruptRecord, NotFound
from livedraft.contracts.messages import DeadLetter, Delivery
from livedraft.contracts.settings import Settings
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from livedraft.traces.segments import Usage
    from livedraft.traces.stats import Drafting, StreamStats

app = typer.Typer(
    no_args_is_help=True,
    help="Look into the trace stream, and send parts of it again.\n\n"
    "The stream is the setting traces.url; LIVEDRAFT_TRACES__URL=spool:///elsewhere reads another one.",
)

#: Names the reader of these commands; it never commits, so that no consumer's offsets move.
_GROUP = "cli"

FromOption = Annotated[int | None, typer.Option("--from", min=0, metavar="OFFSET", help="First offset.")]
ToOption = Annotated[int | None, typer.Option("--to", min=0, metavar="OFFSET", help="Last offset, included.")]


@app.command()
def tail(
    config: ConfigOption = None,
    count: Annotated[
        int | None,
        typer.Option("--lines", "-n", min=0, help="How many: the last ones (10), or with --from the first ones (all)."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new traces until Ctrl-C.")] = False,
    start: FromOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show traces, one a line.

    Tokens are prompt+output; AL is the accept length: committed tokens per verify round.  The output is spelled where
    the target's tokenizer is at hand.

    Example: livedraft traces tail -n 5 --follow
    """
    from livedraft.cli.trace_line import HEADER, Spelling, describe

    settings = settings_from(config)
    if not follow:  # else they may still come
        _range(_usage(settings), start, None)
    spelling = Spelling(settings.engine.target)
    console = output()
    if not as_json:
        console.print(HEADER, style="bold", no_wrap=True, overflow="ellipsis")
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to end --follow
        for delivery in _tail(settings, count, start, follow):
            line = describe(delivery, spelling)
            if as_json:
                print_json(line, indent=0)
            else:
                style = "red" if isinstance(delivery.item, DeadLetter) else None
                console.print(str(line), style=style, no_wrap=True, overflow="ellipsis")


@app.command()
def stats(
    config: ConfigOption = None, start: FromOption = None, last: ToOption = None, as_json: JsonOption = False
) -> None:
    """Add the stream up: accept length by drafter and domain, acceptance by depth, damage.

    Example: livedraft traces stats --from 1000
    """
    from livedraft.traces.stats import summarize

    settings = settings_from(config)
    first, last = _range(_usage(settings), start, last)
    with _bar() as bar:
        task = bar.add_task("reading", total=last + 1 - first)
        found = summarize(_advancing(bar, task, first, _between(settings, first, last)))
    if as_json:
        print_json(_stats_json(found))
    else:
        _print_stats(found)


@app.command()
def replay(
    into: Annotated[str, typer.Option(metavar="URL", help="The stream to append to, as spool:///folder.")],
    config: ConfigOption = None,
    start: FromOption = None,
    last: ToOption = None,
) -> None:
    """Publish a range of the stream again, into another one, its records unchanged.

    They get new offsets there.  Ctrl-C stops between two traces and says where to go on.

    Example: livedraft traces replay --from 1000 --to 1999 --into spool:///tmp/again
    """
    from livedraft.cli.republish import republish, trace_start
    from livedraft.contracts.stopping import stopping
    from livedraft.traces.reader import SpoolReader
    from livedraft.traces.spool import SpoolWriter
    from livedraft.traces.urls import spool_folder

    settings = settings_from(config)
    kept = settings.traces
    source, target = spool_folder(kept.url), spool_folder(into)
    if source.resolve() == target.resolve():
        raise BadRequest(f"{into} is the stream that is read", field="--into")
    first, last = _range(_usage(settings), start, last)
    first = trace_start(source, first)
    copied = 0
    with (
        stopping() as stop,
        contextlib.closing(SpoolReader(source, first)) as reader,
        SpoolWriter(
            target, segment_bytes=kept.segment_bytes, retain_bytes=kept.retain_bytes, fsync=kept.fsync
        ) as writer,
        _bar() as bar,
    ):
        task = bar.add_task("replaying", total=last + 1 - first)
        for records in republish(reader, writer, last):
            copied += records
            bar.update(task, completed=reader.next - first)
            if stop.is_set():
                break
        upto = reader.next
    missing = min(upto, last + 1) - first - copied
    output().print(f"{copied} records into {into}" + (f"; {missing} could not be read" if missing else ""))
    if upto <= last and stop.is_set():
        output().print(f"stopped; go on with --from {upto}")
        raise typer.Exit(130)


@app.command()
def decode(
    config: ConfigOption = None,
    offset: Annotated[int | None, typer.Option(min=0, help="Offset of the trace; else the newest.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Print tensors in full instead of their shapes.")] = False,
) -> None:
    """Print one trace as JSON.

    Example: livedraft traces decode --offset 42 --whole
    """
    from livedraft.traces.codec import to_json

    settings = settings_from(config)
    held = _usage(settings)
    if offset is None:
        found = next(iter(_last(settings, 1)), None)
    else:
        _range(held, offset, offset)
        found = next((d for d in _deliveries(settings, offset) if d.offset >= offset), None)
    if found is None:
        raise NotFound(f"no whole trace there: the stream holds records {held.oldest} to {held.end - 1}")
    if isinstance(found.item, DeadLetter):
        raise CorruptRecord(f"offset {found.offset}: {found.item.reason}")
    print_json({"offset": found.offset, "trace": to_json(found.item, whole=whole)})


def _usage(settings: Settings) -> Usage:
    """What the stream holds.  Raises NotFound where it holds nothing."""
    from livedraft.traces.segments import usage
    from livedraft.traces.urls import spool_folder

    held = usage(spool_folder(settings.traces.url))
    if held.end == held.oldest:
        raise NotFound(f"{settings.traces.url}: no traces there; `livedraft up` and some requests bring them")
    return held


def _range(held: Usage, start: int | None, last: int | None) -> tuple[int, int]:
    """First and last offset of the part of a range that the stream holds.  Raises NotFound for none."""
    first = max(start or 0, held.oldest)
    final = held.end - 1 if last is None else min(last, held.end - 1)
    if first > final:
        raise NotFound(f"no such offsets: the stream holds {held.oldest} to {held.end - 1}")
    return first, final


def _deliveries(settings: Settings, first: int, *, follow: bool = False) -> Iterator[Delivery]:
    """Items from the one that record ``first`` is part of."""
    from livedraft.cli.republish import trace_start
    from livedraft.traces.replay import replay
    from livedraft.traces.source import PARTITION
    from livedraft.traces.urls import open_source, spool_folder

    first = trace_start(spool_folder(settings.traces.url), first)
    with contextlib.closing(open_source(settings.traces, _GROUP)) as source:
        yield from replay(source, {PARTITION: first}, follow=follow)


def _between(settings: Settings, first: int, last: int) -> Iterator[Delivery]:
    for delivery in _deliveries(settings, first):
        if delivery.offset > last:
            return
        yield delivery


def _last(settings: Settings, count: int) -> list[Delivery]:
    """The last ``count`` items, found by reaching back further until there are enough: a trace may be many records."""
    held = _usage(settings)
    reach = count
    while True:
        first = max(held.oldest, held.end - reach)
        found = deque(_between(settings, first, held.end - 1), maxlen=count)
        if len(found) == count or first == held.oldest:
            return list(found)
        reach *= 4


def _tail(settings: Settings, count: int | None, start: int | None, follow: bool) -> Iterator[Delivery]:
    from livedraft.traces.segments import usage
    from livedraft.traces.urls import spool_folder

    if start is not None:
        yield from islice(_deliveries(settings, start, follow=follow), count)
        return
    held = usage(spool_folder(settings.traces.url))
    shown = _last(settings, 10 if count is None else count) if held.end > held.oldest else []
    yield from shown
    if follow:
        yield from _deliveries(settings, shown[-1].offset + 1 if shown else held.end, follow=True)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=progress_output(), transient=True)


def _advancing(bar: Progress, task: TaskID, first: int, deliveries: Iterable[Delivery]) -> Iterator[Delivery]:
    for delivery in deliveries:
        bar.update(task, completed=delivery.offset + 1 - first)
        yield delivery


def _stats_json(found: StreamStats) -> dict[str, Any]:
    """The sums, with the rates that follow from them."""

    def drafting(of: Drafting) -> dict[str, float]:
        return {"rounds": of.rounds, "tokens": of.tokens, "accept_length": of.accept_length}

    sums: dict[str, Any] = msgspec.to_builtins(found)
    return sums | {
        "overall": drafting(found.overall),
        "by_drafter": {name: drafting(of) for name, of in found.by_drafter.items()},
        "by_domain": {name: drafting(of) for name, of in found.by_domain.items()},
        "acceptance": [{"tried": a.tried, "accepted": a.accepted, "rate": a.rate} for a in found.acceptance],
    }


def _print_stats(found: StreamStats) -> None:
    console = output()
    console.print(
        f"{found.traces} traces of {found.requests} requests, {found.prompt_tokens} prompt and "
        f"{found.output_tokens} output tokens, {found.tensor_bytes / 1e6:.1f} MB of tensors; "
        f"accept length {found.overall.accept_length:.2f}",
        style="bold",
    )
    console.print(
        f"{found.dead_letters} dead letters, {found.duplicates} duplicates",
        style="red" if found.dead_letters else "dim",
    )
    for title, rows in (("drafter", found.by_drafter), ("domain", found.by_domain)):
        table = Table(title, "rounds", "tokens", "accept length")
        for name, of in sorted(rows.items(), key=lambda row: (len(row[0]), row[0])):  # versions count up
            table.add_row(printable(name), str(of.rounds), str(of.tokens), f"{of.accept_length:.2f}")
        console.print(table)
    table = Table("depth", "tried", "accepted", "acceptance")
    for depth, acceptance in enumerate(found.acceptance, 1):
        table.add_row(str(depth), str(acceptance.tried), str(acceptance.accepted), f"{acceptance.rate:.3f}")
    console.print(table)
