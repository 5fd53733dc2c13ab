"""``livedraft``: the command line.  Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from livedraft.cli import bench, drafts, status, traces
from livedraft.cli.console import ConfigOption, LivedraftGroup, settings_from

TargetOption = Annotated[str, typer.Option(help="Folder or Hugging Face id of a Llama or Qwen model.")]

_PROCESSES = "Processes of a deployment"

app = typer.Typer(
    cls=LivedraftGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Online continual learning of the drafter behind speculative decoding.\n\n"
    "Start with `livedraft demo` (ten minutes, nothing needed) or `livedraft up` (serve, learn and swap until "
    "Ctrl-C).\n\nIn production each process runs by itself; compose.yaml starts them all.",
)
app.add_typer(drafts.app, name="drafts")
app.add_typer(traces.app, name="traces")
app.add_typer(bench.app, name="bench")
app.command()(status.status)


@app.command()
def up(config: ConfigOption = None, target: TargetOption = "") -> None:
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


@app.command(rich_help_panel=_PROCESSES)
def engine(config: ConfigOption = None, target: TargetOption = "") -> None:
    """Serve the OpenAI endpoint with the embedded engine, on gateway.host and gateway.port, until SIGTERM.

    Starts with the drafter that the registry calls live, or with a fresh one that it registers.  While the registry
    does not answer it starts with the drafter that served last, or waits.  Afterwards it needs neither registry nor
    trainer.  Swaps come over /admin, which asks for gateway.admin_key unless they come from this machine.

    On SIGTERM requests that run get gateway.drain_s seconds.

    Example: LIVEDRAFT_TRACES__URL=relay+tcp://relay:5555 livedraft engine -c configs/compose.toml
    """
    from livedraft.cli import engine as process

    _log("engine")
    process.run(settings_from(config, target=target))


@app.command(rich_help_panel=_PROCESSES)
def gateway(config: ConfigOption = None) -> None:
    """Stand in front of the engines of engine.url, on gateway.host and gateway.port, until SIGTERM.

    Checks keys, tenants and limits, then passes /v1 on to the ready engine with the fewest requests in flight.  One
    that fails before a byte of its answer has gone out is replaced by another, once.  A client that leaves cancels
    its request.  Engines learn the tenant if they have the same gateway.engine_key.  SGLang stands behind it, too, with
    that as its --api-key: engine.url = "sglang+http://host:30000".

    On SIGTERM /readyz says 503 and requests that run get gateway.drain_s seconds.

    Example: LIVEDRAFT_ENGINE__URL=http://engine-1:8000,http://engine-2:8000 livedraft gateway
    """
    from livedraft.cli import wiring
    from livedraft.contracts.stopping import stopping

    _log("gateway")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request and health check
    with stopping() as stop:
        wiring.gateway(settings_from(config), stop)


@app.command(rich_help_panel=_PROCESSES)
def relay(
    config: ConfigOption = None,
    listen: Annotated[str, typer.Option(metavar="tcp://HOST:PORT", help="Overrides relay.listen.")] = "",
) -> None:
    """Take traces from engines, redact and encode them, and publish them to traces.url, until SIGTERM.

    Engines send to it with traces.url = "relay+tcp://HOST:PORT".  They never wait for it: they drop, and count, what
    they cannot send, and so does the relay with what it cannot publish.  Traces come in the clear and from whoever
    reaches the port, so keep it on a private network.  /metrics and /healthz answer on metrics.port, where that is
    set.

    Example: LIVEDRAFT_TRACES__URL=kafka://kafka:9092 livedraft relay --listen tcp://0.0.0.0:5555
    """
    from livedraft.cli import wiring
    from livedraft.contracts.stopping import stopping
    from msgspec.structs import replace

    _log("relay")
    settings = settings_from(config)
    if listen:
        settings = replace(settings, relay=replace(settings.relay, listen=listen))
    with stopping() as stop:
        wiring.relay(settings, stop)


@app.command(rich_help_panel=_PROCESSES)
def trainer(config: ConfigOption = None, target: TargetOption = "") -> None:
    """Learn from the trace stream and publish candidates to the registry, until SIGTERM.

    Goes on from its checkpoint in trainer.folder, else from the live drafter.  To start it needs the registry, and
    waits for it; once started, it learns on without.  /metrics and /healthz answer on metrics.port, where that is
    set.

    On SIGTERM it ends its step, checkpoints and offers what it has learned.

    Under torchrun several processes learn as one, each with a share of the stream (trainer.parallel: ddp or fsdp2):
    torchrun --standalone --nproc-per-node 2 --no-python livedraft trainer

    Example: LIVEDRAFT_METRICS__PORT=9464 livedraft trainer -c configs/compose.toml
    """
    from livedraft.cli import wiring
    from livedraft.contracts.stopping import stopping

    _log("trainer")
    with stopping() as stop:
        wiring.train(settings_from(config, target=target), stop)


@app.command(rich_help_panel=_PROCESSES)
def controller(config: ConfigOption = None, target: TargetOption = "") -> None:
    """Judge candidates, swap proven ones into the engine, watch, keep or roll back, until SIGTERM.

    The engines are those of engine.url, swapped as one, one after the other; they must be able to read swap.folder
    under the same path.  SGLang that was restarted, and so begins with its first drafter, is given the live one.
    Killed at any point and started again, it finds out what they draft with and goes on.  Run one.  /metrics and
    /healthz answer on metrics.port, where that is set.

    Example: LIVEDRAFT_ENGINE__URL=http://engine:8000 livedraft controller -c configs/compose.toml
    """
    from livedraft.cli import wiring
    from livedraft.contracts.stopping import stopping

    _log("controller")
    with stopping() as stop:
        wiring.control(settings_from(config, target=target), stop)


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
    from livedraft.contracts.stopping import stopping

    _start("train")
    with stopping() as stop:
        wiring.train(settings_from(config, target=target), stop)


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
    _log(name)


def _log(name: str) -> None:
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name} %(levelname)s %(message)s")


def main() -> None:
    """Entry point of the ``livedraft`` command.

    At SIGTERM a command ends as at Ctrl-C, and so ends what it has started; those that run until told to stop have
    handlers of their own.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    app()


if __name__ == "__main__":
    main()
