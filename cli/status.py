"""``livedraft status``: what every part of the system is doing, each asked on its own."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer
from livedraft.cli.console import ConfigOption, JsonOption, clock_time, output, print_json, printable, settings_from
from livedraft.contracts.errors import LivedraftError, NotFound, Overloaded
from livedraft.contracts.messages import Decision, Record
from livedraft.contracts.settings import Settings
from rich.live import Live
from rich.table import Table
from rich.text import Text

#: Seconds a neighbour gets to answer.
_TIMEOUT_S = 2.0
#: Drafter versions and decisions shown, the latest ones.
_SHOWN = 5


class Answer(NamedTuple):
    """What one part says: for programs, and for people."""

    facts: dict[str, Any]
    lines: list[str]


class Part(NamedTuple):
    """One part, with its answer or why there is none."""

    name: str
    answer: Answer | None
    error: str = ""


class TrainerProgress(Record, frozen=True, kw_only=True):
    """What we show of the trainer's ``progress.json``, read without importing torch."""

    steps: int
    tokens: int
    tokens_per_s: float
    lag: int | None
    at: float
    loss: float | None = None
    accept_length: float | None = None
    published: str | None = None
    mode: str = "steady"
    reason: str = ""
    drifts: int = 0
    excluded: float = 0.0


def status(
    config: ConfigOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Ask again and again until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Pause between two looks.")] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Show what serving, trainer, stream, registry and swap controller are doing.

    A part that does not answer is shown as such.  Exits with 0 when serving answers, with 1 otherwise.

    Example: livedraft status --watch
    """
    settings = settings_from(config)
    serving = False
    with contextlib.suppress(KeyboardInterrupt), _screen(as_json) as show:
        while True:
            parts = look(settings)
            serving = parts[0].answer is not None
            show(parts)
            if not watch:
                break
            time.sleep(every)
    if not serving:
        raise typer.Exit(1)


def look(settings: Settings) -> list[Part]:
    """Ask every part; the first one is the gateway."""
    parts = {
        "gateway": _gateway,
        "engine": _engine,
        "trainer": _trainer,
        "traces": _traces,
        "registry": _registry,
        "swap": _swap,
    }
    return [_ask(name, part, settings) for name, part in parts.items()]


def _ask(name: str, part: Callable[[Settings], Answer], settings: Settings) -> Part:
    try:
        return Part(name, part(settings))
    except (LivedraftError, OSError, msgspec.DecodeError) as error:  # rendered; the other parts are asked all the same
        return Part(name, None, str(error))


@contextlib.contextmanager
def _screen(as_json: bool) -> Iterator[Callable[[list[Part]], None]]:
    if as_json:
        yield lambda parts: print_json(
            {p.name: p.answer.facts if p.answer else {"error": p.error} for p in parts}, indent=0
        )
        return
    console = output()
    if not console.is_terminal:
        yield lambda parts: console.print(_table(parts))
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda parts: live.update(_table(parts), refresh=True)


def _table(parts: list[Part]) -> Table:
    table = Table.grid(padding=(0, 2))
    for part in parts:
        lines = part.answer.lines if part.answer else [part.error]
        name = Text(part.name, "bold green" if part.answer else "bold red")
        table.add_row(name, Text("\n".join(map(printable, lines))))
    table.add_row(Text("as of", "dim"), Text(clock_time(time.time()), "dim"))
    return table


def _gateway(settings: Settings) -> Answer:
    from livedraft.cli.wiring import gateway_url

    url = gateway_url(settings)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/readyz", timeout=_TIMEOUT_S):
            return Answer({"url": url, "ready": True}, [f"ready at {url}"])
    except OSError as error:
        raise Overloaded(f"{url} is not ready: {error}") from error


def _engine(settings: Settings) -> Answer:
    from livedraft.cli.wiring import engine_admin

    seen = engine_admin(settings, _TIMEOUT_S).status()
    lengths = {version: tokens / rounds for version, (tokens, rounds) in seen.by_drafter.items() if rounds}
    latest = [f"{length:.2f} with {version or 'none'}" for version, length in lengths.items()][-_SHOWN:]
    return Answer(
        msgspec.to_builtins(seen) | {"accept_length": lengths},
        [
            f"{seen.engine} serves {seen.target} with drafter {seen.drafter or 'none'}",
            f"{seen.running} running, {seen.waiting} waiting; {seen.output_tokens} tokens, {seen.rounds} rounds so far",
            "accept length at full depth: " + (", ".join(latest) or "no rounds yet"),
            f"traces: {seen.traces_offered} offered, {seen.traces_dropped} dropped"
            + ("" if seen.capture else "; capture is off"),
        ],
    )


def _trainer(settings: Settings) -> Answer:
    path = Path(settings.trainer.folder) / "progress.json"
    if not path.exists():
        raise NotFound(f"has not run here: no {path}")
    seen = msgspec.json.decode(path.read_bytes(), type=TrainerProgress)
    learned = "nothing learned yet"
    if seen.loss is not None and seen.accept_length is not None:
        learned = f"loss {seen.loss:.3f}, accept length {seen.accept_length:.2f} in training"
    behind = "an unknown number of" if seen.lag is None else seen.lag
    return Answer(
        msgspec.to_builtins(seen),
        [
            f"{seen.steps} steps, {seen.tokens} tokens, {seen.tokens_per_s:.0f} tokens/s; {learned}",
            f"{behind} records behind; published last: {seen.published or 'none'}",
            f"{seen.mode}: {seen.reason or 'no reason given'}; acceptance fell for good {seen.drifts} times",
            f"{seen.excluded:.1%} of what the target says cannot be proposed",
            f"said so {max(0.0, time.time() - seen.at):.0f} s ago",
        ],
    )


def _traces(settings: Settings) -> Answer:
    from livedraft.traces.segments import usage
    from livedraft.traces.urls import KAFKA, open_source, spool_folder

    url = settings.traces.url
    if url.startswith(KAFKA):
        return _topic(settings)
    folder = spool_folder(url)
    held = usage(folder)
    lags = {}
    for path in sorted(folder.glob("groups/*.json")):
        with contextlib.closing(open_source(settings.traces, path.stem)) as source:
            lags[path.stem] = source.lag()
    return Answer(
        held._asdict() | {"url": url, "lag": lags},
        [
            f"{held.end - held.oldest} records (from {held.oldest} on), {held.bytes / 1e6:.1f} MB in "
            f"{held.segments} segments at {url}",
            "records not committed yet: "
            + (", ".join(f"{group} {lag}" for group, lag in lags.items()) or "no consumers"),
        ],
    )


def _topic(settings: Settings) -> Answer:
    from livedraft.cli.stream_view import view
    from livedraft.traces.urls import open_source

    held = view(settings).held()
    lags = {}
    for group in ("trainer", "controller"):
        with contextlib.closing(open_source(settings.traces, group, settings.kafka)) as source:
            lags[group] = source.lag()  # never polled: it does not join the group
    messages = sum(bounds.end - bounds.oldest for bounds in held.values())
    return Answer(
        {
            "url": settings.traces.url,
            "partitions": {name: bounds._asdict() for name, bounds in held.items()},
            "lag": lags,
        },
        [
            f"{messages} messages in {len(held)} partitions at {settings.traces.url}",
            "messages not committed yet: " + ", ".join(f"{group} {lag}" for group, lag in lags.items()),
        ],
    )


def _registry(settings: Settings) -> Answer:
    from livedraft.cli.wiring_registry import open_registry

    registry = open_registry(settings.registry)
    pointed = {alias: registry.resolve(alias) for alias in ("live", "previous", "candidate")}
    versions = {alias: version.version if version else None for alias, version in pointed.items()}
    return Answer(
        {"url": settings.registry.url, "aliases": versions},
        [", ".join(f"{alias}: {version or 'none'}" for alias, version in versions.items())],
    )


def _swap(settings: Settings) -> Answer:
    """From the controller's own journal, which is there also while the registry is not."""
    from livedraft.swap.journal import Journal

    folder = Path(settings.swap.folder)
    if not folder.is_dir():
        raise NotFound(f"has not run here: no {folder}")
    journal = Journal(folder)
    decisions, watch, begun = journal.decisions()[-_SHOWN:], journal.watch, journal.exchange
    lines = [_line(decision) for decision in decisions] or ["no decisions yet"]
    if watch:
        lines.append(f"watching version {watch.candidate}, predicted accept length {watch.predicted:.2f}")
    if begun:
        lines.append(f"swapping to version {begun.request.version}")
    return Answer(msgspec.to_builtins({"decisions": decisions, "watch": watch, "exchange": begun}), lines)


def _line(decision: Decision) -> str:
    return f"{clock_time(decision.at)} {decision.action} {decision.candidate or decision.live or ''}: {decision.reason}"
