"""``livedraft demo``: the whole loop on one machine, watched, compared and written down.

day 0: a drafter that knows nothing -> prose -> shift -> code -> comparison -> table, report.json, report.png
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from livedraft.cli import wiring
from livedraft.cli.compare import Comparison, compare
from livedraft.cli.ports import free_port
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.report import build, draw, show
from livedraft.cli.traffic import Served, Traffic
from livedraft.cli.up import stack
from livedraft.cli.wiring_registry import open_registry
from livedraft.contracts.errors import LivedraftError
from livedraft.contracts.messages import Decision
from livedraft.contracts.settings import Settings
from livedraft.contracts.stopping import stopping
from livedraft.swap.engine_admin import HttpEngineAdmin
from msgspec.structs import replace
from rich.console import Console
from rich.live import Live
from rich.table import Table

#: Seconds for the comparison, and for stopping and the report.
_COMPARE_S, _END_S = 150.0, 15.0
_LEAST_MINUTES = 4.5
#: Share of the learning time before the shift.
_BEFORE = 0.28
#: Prompts per domain kept from the traffic, for the comparison.
KEPT = 28


@dataclass(slots=True)
class Run:
    """What the demo gathers while it goes."""

    started: float = field(default_factory=time.time)
    shifted_at: int = 0
    served: list[Served] = field(default_factory=list)
    #: (Unix seconds, action, version) as they are seen.
    decisions: list[Decision] = field(default_factory=list)


def demo(settings: Settings, minutes: float, out: Path) -> None:
    """Run it all; leaves ``report.json`` and ``report.png`` in ``out``."""
    console = Console()
    ends = time.monotonic() + minutes * 60 - _END_S
    if minutes < _LEAST_MINUTES:
        raise LivedraftError(f"--minutes {minutes:g} leaves no time to learn; {_LEAST_MINUTES:g} is the least")
    out = out.resolve()
    settings, config = _own_settings(settings, out)
    run = Run()
    with stopping() as stop, stack(settings, config, "", console) as running:
        console.print(
            f"MLflow registry: [bold]{settings.registry.url}[/]   endpoint: {wiring.gateway_url(settings)}/v1"
        )
        day_0 = wiring.day_0(settings)
        learning = ends - _COMPARE_S - time.monotonic()  # what the start has left
        _drive(settings, run, "prose", learning * _BEFORE, stop, console)
        run.shifted_at = len(run.served)
        static, _ = wiring.live_drafter(settings, open_registry(settings.registry))
        _drive(settings, run, "code", learning * (1 - _BEFORE), stop, console)
        if stop.is_set():
            console.print("stopped; no report")
            return
        registry = open_registry(settings.registry)
        live, version = wiring.live_drafter(settings, registry)
        run.decisions = registry.decisions()
        # The trainer and the controller stay up: on a laptop they share the machine with serving, so they do here.
        comparison: Comparison = compare(
            settings,
            run.served,
            held_out_prompts("code")[:KEPT],
            day_0,
            static,
            live,
            stop,
            console,
            seconds=ends - time.monotonic(),
        )
        if stop.is_set():
            return
        report = build(run, comparison, version.version, [child.restarts for child in running.children])
        draw(run, comparison, out / "report.png")
        show(report, out, settings.registry.url, console)


def _own_settings(settings: Settings, out: Path) -> tuple[Settings, Path]:
    """The demo's own state and free ports, written down as a settings file that its processes read."""
    import shutil

    from livedraft.cli.settings_file import write_settings

    state = out / "state"
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    settings = replace(
        settings,
        engine=replace(settings.engine, target="bundled", max_running=8),
        gateway=replace(settings.gateway, host="127.0.0.1", port=free_port(), api_keys_file=None),
        traces=replace(settings.traces, url=f"spool://{state}/traces"),
        trainer=replace(settings.trainer, folder=str(state / "trainer")),
        swap=replace(settings.swap, folder=str(state / "swap")),
        registry=replace(
            settings.registry, url=f"http://127.0.0.1:{free_port()}", folder=str(out / "mlflow"), start=True
        ),
    )
    # A fresh registry too: day 0 means that nothing was learned before.
    shutil.rmtree(out / "mlflow", ignore_errors=True)
    return settings, write_settings(settings, state / "settings.toml")


def _drive(settings: Settings, run: Run, domain: str, seconds: float, stop: threading.Event, console: Console) -> None:
    """Send one domain's traffic for a while, showing what happens."""
    prompts = held_out_prompts(domain)[KEPT:]
    admin = HttpEngineAdmin(wiring.gateway_url(settings), settings.gateway.admin_key)
    deadline = time.monotonic() + seconds
    first = len(run.served)
    with (
        Traffic(wiring.gateway_url(settings), domain, prompts, run.served) as traffic,
        Live(console=console, refresh_per_second=2, transient=True) as screen,
    ):
        while (left := deadline - time.monotonic()) > 0 and not stop.wait(0.5):
            if traffic.failure:
                raise LivedraftError(f"a request failed: {traffic.failure}")
            screen.update(_panel(domain, left, run.served[first:], admin.status().drafter))
    recent = run.served[first:][-100:]
    if recent:
        console.print(
            f"{domain}: {len(run.served) - first} requests, accept length of the last 100: "
            f"{_accept(recent, 0.0):.2f} at temperature 0, {_accept(recent, 0.7):.2f} at 0.7"
        )


def _panel(domain: str, left: float, served: list[Served], version: str) -> Table:
    table = Table(title=f"{domain} traffic, {left:.0f} s left", title_justify="left")
    for name in ("requests", "drafter", "accept length T=0", "accept length T=0.7", "tokens/s"):
        table.add_column(name, justify="right")
    recent = served[-60:]
    rate = sum(s.tokens for s in recent) / max(1e-3, recent[-1].ended - recent[0].started) if recent else 0.0
    table.add_row(
        str(len(served)), f"v{version}", f"{_accept(recent, 0.0):.2f}", f"{_accept(recent, 0.7):.2f}", f"{rate:.0f}"
    )
    return table


def _accept(served: list[Served], temperature: float) -> float:
    rounds = sum(s.rounds for s in served if s.temperature == temperature)
    tokens = sum(s.tokens - 1 for s in served if s.temperature == temperature)
    return tokens / rounds if rounds else 1.0
