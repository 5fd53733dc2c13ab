"""``livedraft``: the command line.  Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from livedraft.cli import bench, drafts, status, traces
from livedraft.cli.console import ConfigOption, LivedraftGroup, settings_from

app = typer.Typer(
    cls=LivedraftGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Online continual learning of the drafter behind speculative decoding.\n\n"
    "Start with `livedraft demo` (ten minutes, nothing needed) or `livedraft up` (serve, learn and swap until Ctrl-C).",
)
app.add_typer(drafts.app, name="drafts")
app.add_typer(traces.app, name="traces")
app.add_typer(bench.app, name="bench")
app.command()(status.status)


@app.command()
def up(
    config: ConfigOption = None,
    target: Annotated[str, typer.Option(help="Folder or Hugging Face id of a Llama or Qwen model.")] = "",
) -> None:
    """Serve, learn and swap on this machine until Ctrl-C.

    Starts four processes: the HTTP endpoint with the embedded engine, the trainer, the swap controller and the
    MLflow registry.  One that dies is started again; serving needs none of the others.

    Example: livedraft up --config configs/laptop.toml
    """
    from livedraft.cli import up as supervisor

    supervisor.up(settings_from(config, target=target), config, target)


@app.command()
def demo(
    config: ConfigOption = None,
    minutes: Annotated[float, typer.Option(help="Time for the whole run; learning gets what comparing leaves.")] = 9.5,
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.png and the run's state.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Watch a drafter that knows nothing learn from live traffic, be swapped in, and make serving faster.

    Starts everything `livedraft up` starts on free ports, sends held-out prose prompts, then shifts to Python
    source, and ends with a comparison of no speculation, the drafter frozen at the shift, and the live one.
    """
    from livedraft.cli import demo as run

    run.demo(settings_from(config), minutes, out)


@app.command(hidden=True)
def serve(drafter: Path, version: str, config: ConfigOption = None, target: str = "") -> None:
    """The serving process of `livedraft up`: endpoint and embedded engine."""
    from livedraft.cli import wiring

    _start("serve")
    wiring.serve(settings_from(config, target=target), drafter, version)


@app.command(hidden=True)
def train(config: ConfigOption = None, target: str = "") -> None:
    """The learning process of `livedraft up`."""
    from livedraft.cli import wiring

    _start("train")
    wiring.train(settings_from(config, target=target))


@app.command(hidden=True)
def control(config: ConfigOption = None, target: str = "") -> None:
    """The swap controller of `livedraft up`."""
    from livedraft.cli import wiring
    from livedraft.contracts.stopping import stopping

    _start("control")
    with stopping() as stop:
        wiring.control(settings_from(config, target=target), stop)


def _start(name: str) -> None:
    from livedraft.cli import wiring

    wiring.leave_with_parent()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name} %(levelname)s %(message)s")


def main() -> None:
    """Entry point of the ``livedraft`` command."""
    app()


if __name__ == "__main__":
    main()
