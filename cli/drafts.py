"""``livedraft drafts``: the versions of the drafter, and swaps by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from livedraft.cli import new_drafts, vocabulary
from livedraft.cli.console import (
    ConfigOption,
    JsonOption,
    clock_time,
    output,
    print_json,
    printable,
    progress_output,
    settings_from,
)
from livedraft.contracts.errors import NotFound
from livedraft.contracts.messages import Decision, DrafterVersion
from livedraft.contracts.ports import Registry
from livedraft.contracts.settings import Settings
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from livedraft.swap.swapper import Swapper

app = typer.Typer(
    no_args_is_help=True,
    help="The drafter and its versions: make or import the first, look at them, swap between them by hand.",
)
app.command("init")(new_drafts.init)
app.command("import")(new_drafts.import_published)
app.command("refresh-vocabulary")(vocabulary.refresh)

#: Where a version's accept length was written down, by the gate that predicted it and the watch that saw it.
_PREDICTED = ("promote/predicted_accept_length", "reject/predicted_accept_length")
_OBSERVED = ("keep/observed_accept_length", "rollback/observed_accept_length")

CountOption = Annotated[int, typer.Option("--lines", "-n", min=0, help="The newest so many; 0 for all.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION|ALIAS", help="As 7, live, previous or candidate.")]


@app.command("list")
def list_versions(config: ConfigOption = None, count: CountOption = 20, as_json: JsonOption = False) -> None:
    """List versions, newest first, and those that have an alias.

    Predicted is the accept length that the gate computed, observed the one that the watch saw after the swap.

    Example: livedraft drafts list -n 5
    """
    registry = _registry(settings_from(config))
    with progress_output().status("asking the registry"):
        versions = registry.versions()
    shown = [v for number, v in enumerate(versions) if not count or number < count or v.aliases]
    if as_json:
        print_json(shown)
        return
    table = Table("version", "aliases", "parent", "created", "tokens trained", "predicted", "observed")
    for version in shown:
        table.add_row(
            printable(version.version),
            Text(", ".join(version.aliases), "bold green"),
            version.parent or "-",
            clock_time(version.created_at),
            version.tags.get("tokens_trained", "-"),
            _measured(version.metrics, _PREDICTED),
            _measured(version.metrics, _OBSERVED),
        )
    output().print(table)
    output().print(f"{len(shown)} of {len(versions)} versions", style="dim")


@app.command()
def show(version: VersionArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show one version: where it comes from, what was measured, what was decided about it and why.

    Example: livedraft drafts show live
    """
    registry = _registry(settings_from(config))
    with progress_output().status("asking the registry"):
        found = find(registry, version)
        ancestors = lineage(found, registry.versions())
        decisions = [d for d in registry.decisions() if found.version in (d.candidate, d.live)]
    if as_json:
        print_json({"version": found, "lineage": ancestors, "decisions": decisions})
        return
    console = output()
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("version", found.version),
        ("aliases", ", ".join(found.aliases) or "-"),
        ("checksum", found.checksum),
        ("created", clock_time(found.created_at)),
        ("lineage", " < ".join(ancestors)),
        *sorted(found.tags.items()),
        *((name, f"{value:.6g}") for name, value in sorted(found.metrics.items())),
    ):
        facts.add_row(Text(printable(name), "bold"), printable(value))
    console.print(facts)
    console.print(decision_table(decisions) if decisions else "no decisions about it yet")


@app.command()
def decisions(config: ConfigOption = None, count: CountOption = 20, as_json: JsonOption = False) -> None:
    """List promotions, rejections, keeps and rollbacks with the evidence they rest on, oldest first.

    Example: livedraft drafts decisions -n 0 --json
    """
    registry = _registry(settings_from(config))
    with progress_output().status("asking the registry"):
        found = registry.decisions()[-count:]
    if as_json:
        print_json(found)
    else:
        output().print(decision_table(found) if found else "no decisions yet")


@app.command()
def promote(version: VersionArgument, config: ConfigOption = None, yes: YesOption = False) -> None:
    """Swap serving to a version, past the gate and without a watch.

    The engine must confirm it before any alias moves; running requests go on.

    Example: livedraft drafts promote candidate --yes
    """
    from livedraft.swap import by_hand

    settings = settings_from(config)
    registry = _registry(settings)
    wanted = find(registry, version).version
    _ask(yes, f"Swap serving from {_live(registry)} to version {wanted}, past the gate?")
    with progress_output().status("waiting for the controller's turn to end, then swapping"):
        decision = by_hand.promote(_swapper(settings, registry), wanted)
    _print_swap(decision, now=decision.candidate, before=decision.live)


@app.command()
def rollback(config: ConfigOption = None, yes: YesOption = False) -> None:
    """Swap serving back to the version that was live before.

    Example: livedraft drafts rollback --yes
    """
    from livedraft.swap import by_hand

    settings = settings_from(config)
    registry = _registry(settings)
    _ask(yes, f"Swap serving from {_live(registry)} back to the previous version?")
    with progress_output().status("waiting for the controller's turn to end, then swapping"):
        decision = by_hand.rollback(_swapper(settings, registry))
    _print_swap(decision, now=decision.live, before=decision.candidate)


def find(registry: Registry, name: str) -> DrafterVersion:
    """The version with a number or an alias.  Raises NotFound."""
    pointed = None if name.isdecimal() else registry.resolve(name)
    try:
        return registry.get(pointed.version if pointed else name)
    except NotFound as error:
        raise NotFound(f"no version and no alias {name!r}; `livedraft drafts list` shows those there are") from error


def lineage(version: DrafterVersion, versions: Iterable[DrafterVersion]) -> list[str]:
    """A version and its ancestors, itself first, as far as the registry knows them."""
    parents = {v.version: v.parent for v in versions}
    chain = [version.version]
    while (parent := parents.get(chain[-1])) and parent not in chain:  # somebody may have tagged a circle
        chain.append(parent)
    return chain


def decision_table(decisions: Iterable[Decision]) -> Table:
    """Decisions with their evidence."""
    table = Table("at", "action", "candidate", "live", "reason and evidence")
    for decision in decisions:
        evidence = "  ".join(f"{name}={value:.4g}" for name, value in decision.evidence.items())
        table.add_row(
            clock_time(decision.at),
            decision.action,
            decision.candidate or "-",
            decision.live or "-",
            Text.assemble(printable(decision.reason), "\n" if evidence else "", (evidence, "dim")),
        )
    return table


def _registry(settings: Settings) -> Registry:
    from livedraft.cli.wiring_registry import open_registry

    return open_registry(settings.registry)


def _swapper(settings: Settings, registry: Registry) -> Swapper:
    from livedraft.cli.wiring import swapper

    return swapper(settings, registry)


def _live(registry: Registry) -> str:
    live = registry.resolve("live")
    return f"version {live.version}" if live else "an unregistered drafter"


def _ask(yes: bool, question: str) -> None:
    if not yes:
        typer.confirm(question, abort=True)


def _print_swap(decision: Decision, *, now: str | None, before: str | None) -> None:
    held = decision.evidence["stall_s"] * 1000
    output().print(
        f"version {now} is live, {before or 'an unregistered drafter'} was; the engine's loop was held {held:.1f} ms",
        style="green",
    )


def _measured(metrics: Mapping[str, float], names: Iterable[str]) -> str:
    return next((f"{metrics[name]:.2f}" for name in names if name in metrics), "-")
