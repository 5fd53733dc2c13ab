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
from livedraft.contracts.messages import DeadLetter, Delivery, Trace
from livedraft.contracts.settings import Settings
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from livedraft.traces.stats import Drafting, StreamStats

app = typer.Typer(
    no_args_is_help=True,
    help="Look into the trace stream, and send parts of it again.\n\n"
    "The stream is the setting traces.url; LIVEDRAFT_TRACES__URL=spool:///elsewhere or kafka://host:9092 reads "
    "another one.",
)

FromOption = Annotated[int | None, typer.Option("--from", min=0, metavar="OFFSET", help="First offset.")]
PartitionOption = Annotated[
    int | None, typer.Option("--partition", min=0, help="Of a topic: the one that offsets are of; else all.")
]
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
    partition: PartitionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show traces, one a line.

    Tokens are prompt+output; AL is the accept length: committed tokens per verify round.  The output is spelled where
    the target's tokenizer is at hand.

    Example: livedraft traces tail -n 5 --follow
    """
    from livedraft.cli.trace_line import HEADER, Spelling, describe

    settings = settings_from(config)
    stretch = _tail_stretch(settings, partition, start, follow)
    spelling = Spelling(settings.engine.target)
    console = output()
    if not as_json:
        console.print(HEADER, style="bold", no_wrap=True, overflow="ellipsis")
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to end --follow
        for delivery in _tail(settings, stretch, count, start, follow):
            line = describe(delivery, spelling)
            if as_json:
                print_json(line, indent=0)
            else:
                style = "red" if isinstance(delivery.item, DeadLetter) else None
                console.print(str(line), style=style, no_wrap=True, overflow="ellipsis")


@app.command()
def stats(
    config: ConfigOption = None,
    start: FromOption = None,
    last: ToOption = None,
    partition: PartitionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add the stream up: accept length by drafter and domain, acceptance by depth, damage.

    Example: livedraft traces stats --from 1000
    """
    from livedraft.traces.stats import summarize

    settings = settings_from(config)
    stretch = _stretch(settings, partition, start, last)
    with _bar() as bar:
        task = bar.add_task("reading", total=sum(end - first for first, end in stretch.values()))
        found = summarize(_advancing(bar, task, stretch, _between(settings, stretch)))
    if as_json:
        print_json(_stats_json(found))
    else:
        _print_stats(found)


@app.command()
def replay(
    into: Annotated[
        str, typer.Option(metavar="URL", help="The stream to append to: spool:///folder or kafka://host:port.")
    ],
    config: ConfigOption = None,
    start: FromOption = None,
    last: ToOption = None,
    partition: PartitionOption = None,
) -> None:
    """Publish a range of the stream again, into another one, its messages unchanged.

    They get new offsets there.  Ctrl-C stops between two traces and says where to go on.

    Example: livedraft traces replay --from 1000 --to 1999 --into spool:///tmp/again
    """
    from livedraft.cli.republish import TopicTarget, open_target, whole_traces
    from livedraft.cli.stream_view import view
    from livedraft.contracts.stopping import stopping

    settings = settings_from(config)
    if _same_stream(settings.traces.url, into):
        raise BadRequest(f"{into} is the stream that is read", field="--into")
    stretch = _stretch(settings, partition, start, last)
    copied, stopped_at = dict.fromkeys(stretch, 0), ""
    with stopping() as stop, contextlib.closing(open_target(settings, into)) as target, _bar() as bar:
        task = bar.add_task("replaying", total=sum(end - first for first, end in stretch.values()))
        for name, (first, end) in stretch.items():
            for offset, messages in whole_traces(view(settings).messages(name, first)):
                if offset >= end:
                    break
                if offset < first:
                    continue
                if stop.is_set():
                    stopped_at = f"--from {offset + 1 - len(messages)}" + _of_partition(name)
                    break
                target.append(messages)
                copied[name] += len(messages)
                bar.update(task, advance=len(messages))
            if stopped_at:
                break
    total = sum(copied.values())
    missing = sum(end - first for first, end in stretch.values()) - total if not stopped_at else 0
    refused = target.refused if isinstance(target, TopicTarget) else 0
    output().print(
        f"{total} records into {into}"
        + (f"; {missing} could not be read" if missing > 0 else "")
        + (f"; {refused} traces were not taken" if refused else "")
    )
    if stopped_at:
        output().print(f"stopped; go on with {stopped_at}")
        raise typer.Exit(130)


@app.command()
def decode(
    source: Annotated[str, typer.Argument(metavar="[-]", help="- reads one message from standard input.")] = "",
    config: ConfigOption = None,
    offset: Annotated[int | None, typer.Option(min=0, help="Offset of the trace; else the newest.")] = None,
    partition: PartitionOption = None,
    whole: Annotated[bool, typer.Option("--whole", help="Print tensors in full instead of their shapes.")] = False,
) -> None:
    """Print one trace as JSON.

    Examples: livedraft traces decode --offset 42 --whole;
    kcat -b host:9092 -C -e -D '' -t livedraft.traces -p 0 -o 42 -c 1 | livedraft traces decode -
    """
    from livedraft.cli.stream_view import view
    from livedraft.traces.codec import to_json

    if source == "-":
        print_json({"trace": to_json(_from_standard_input(), whole=whole)})
        return
    if source:
        raise BadRequest(f"{source!r}, expected - or nothing", field="source")
    settings = settings_from(config)
    if offset is None:
        found = next(iter(_last(settings, _stretch(settings, partition, None, None), 1)), None)
    else:
        ((name, (first, _)),) = _stretch(settings, partition, offset, offset).items()
        found = next((d for d in view(settings).read({name: first}) if d.offset >= offset), None)
    if found is None:
        raise NotFound("no whole trace there")
    if isinstance(found.item, DeadLetter):
        raise CorruptRecord(f"offset {found.offset}: {found.item.reason}")
    where: dict[str, Any] = {"offset": found.offset}
    if "/" in found.partition:
        where["partition"] = found.partition
    print_json(where | {"trace": to_json(found.item, whole=whole)})


def _same_stream(one: str, other: str) -> bool:
    from livedraft.traces.urls import SPOOL, spool_folder

    if one.startswith(SPOOL) and other.startswith(SPOOL):
        return spool_folder(one).resolve() == spool_folder(other).resolve()
    return one == other


def _of_partition(name: str) -> str:
    return f" --partition {name.rpartition('/')[2]}" if "/" in name else ""


#: Partition -> first offset, and the one after the last.
_Stretch = dict[str, tuple[int, int]]


def _stretch(settings: Settings, partition: int | None, start: int | None, last: int | None) -> _Stretch:
    """The part of the stream that a command is about.  Raises NotFound where the stream holds none of it."""
    from livedraft.cli.stream_view import holdings

    held = holdings(settings, partition, offsets=start is not None or last is not None)
    found = {
        name: (max(start or 0, oldest), end if last is None else min(last + 1, end))
        for name, (oldest, end) in held.items()
    }
    full = {name: (first, end) for name, (first, end) in found.items() if first < end}
    if not full:
        ((oldest, end),) = held.values()
        raise NotFound(f"no such offsets: the stream holds {oldest} to {end - 1}")
    return full


def _tail_stretch(settings: Settings, partition: int | None, start: int | None, follow: bool) -> _Stretch:
    """As ``_stretch``; while one follows, traces may still come."""
    from livedraft.cli.stream_view import view

    try:
        return _stretch(settings, partition, start, None)
    except NotFound:
        if not follow:
            raise
        held = view(settings).held()
        return {
            name: (end if start is None else start, end)
            for name, (_, end) in held.items()
            if partition is None or name.rpartition("/")[2] == str(partition)
        }


def _between(settings: Settings, stretch: _Stretch) -> Iterator[Delivery]:
    from livedraft.cli.stream_view import view

    for name, (first, end) in stretch.items():
        for delivery in view(settings).read({name: first}):
            if delivery.offset >= end:
                break
            yield delivery


def _last(settings: Settings, stretch: _Stretch, count: int) -> list[Delivery]:
    """The last ``count`` items of each partition, of them the last by the time their requests ended.

    Found by reaching back further until there are enough: a trace may be many records.
    """
    found: list[Delivery] = []
    for name, (oldest, end) in stretch.items():
        reach = count
        while True:
            first = max(oldest, end - reach)
            part = deque(_between(settings, {name: (first, end)}), maxlen=count)
            if len(part) == count or first == oldest:
                break
            reach *= 4
        found += part
    if len(stretch) > 1:
        found.sort(key=lambda d: 0.0 if isinstance(d.item, DeadLetter) else d.item.finished_at)
    return found[-count:] if count else []


def _tail(
    settings: Settings, stretch: _Stretch, count: int | None, start: int | None, follow: bool
) -> Iterator[Delivery]:
    from livedraft.cli.stream_view import view

    if start is not None:
        begin = {name: first for name, (first, _) in stretch.items()}
        yield from islice(view(settings).read(begin, follow=follow), count)
        return
    shown = _last(settings, stretch, 10 if count is None else count)
    yield from shown
    if follow:
        after = {name: end for name, (_, end) in stretch.items()}
        for delivery in shown:
            after[delivery.partition] = delivery.offset + 1
        yield from view(settings).read(after, follow=True)


def _from_standard_input() -> Trace:
    """Raises CorruptRecord for a chunk of a longer trace, too."""
    import sys

    from livedraft.traces.chunks import MAGIC
    from livedraft.traces.codec import decode

    message = sys.stdin.buffer.read()
    if message.startswith(MAGIC):
        raise CorruptRecord("a chunk of a longer trace: decode it by --offset, which finds the others")
    return decode(message)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=progress_output(), transient=True)


def _advancing(bar: Progress, task: TaskID, stretch: _Stretch, deliveries: Iterable[Delivery]) -> Iterator[Delivery]:
    read = dict.fromkeys(stretch, 0)
    for delivery in deliveries:
        read[delivery.partition] = delivery.offset + 1 - stretch[delivery.partition][0]
        bar.update(task, completed=sum(read.values()))
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
