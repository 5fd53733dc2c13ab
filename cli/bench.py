"""``livedraft bench``: ratios measured side by side in one run, as JSON with their provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from livedraft.cli.console import LivedraftGroup

app = typer.Typer(cls=LivedraftGroup, no_args_is_help=True, help="Measure: every speed is a ratio from one run.")

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write one JSON object here; - is standard output.", show_default=False)
]
TargetOption = Annotated[str, typer.Option(help="Folder or Hugging Face id of the target.")]
ThreadsOption = Annotated[int, typer.Option(help="torch threads, the same for every side.")]


@app.command()
def engine(
    json: JsonOption = None, target: TargetOption = "bundled", threads: ThreadsOption = 1, repeats: int = 7
) -> None:
    """The local engine without speculation against transformers' generate, at batch 1 and 8.

    Example: livedraft bench engine --json -
    """
    from livedraft.benchmarks import engine as benchmark

    benchmark.engine(json, target, threads, repeats)


@app.command()
def capture(
    json: JsonOption = None, target: TargetOption = "bundled", threads: ThreadsOption = 1, repeats: int = 30
) -> None:
    """What recording every verify round costs: the same requests with and without, interleaved.

    Example: livedraft bench capture --json -
    """
    from livedraft.benchmarks import capture as benchmark

    benchmark.capture(json, target, threads, repeats)


@app.command()
def swap(
    json: JsonOption = None, target: TargetOption = "bundled", threads: ThreadsOption = 1, swaps: int = 50
) -> None:
    """Hot swaps under load: how many failed, and the longest a token waited for one.

    Example: livedraft bench swap --json -
    """
    from livedraft.benchmarks import swap as benchmark

    benchmark.swap(json, target, threads, swaps)


@app.command()
def kernels(
    json: JsonOption = None, target: TargetOption = "bundled", threads: ThreadsOption = 1, repeats: int = 5
) -> None:
    """The drafter's head under a divergence, chunked against all logits at once: time, and memory at its peak.

    Forward and backward, at the target's vocabulary and at 4096 x 32768 x 1024 (which takes 4 GB and a minute or two).

    Example: livedraft bench kernels --json -
    """
    from livedraft.benchmarks import kernels as benchmark

    benchmark.kernels(json, target, threads, repeats)


@app.command()
def lossless(
    json: JsonOption = None,
    target: TargetOption = "bundled",
    threads: ThreadsOption = 1,
    prompts: Annotated[int, typer.Option(help="Held-out prompts, of both domains in turn.")] = 200,
    tokens: Annotated[int, typer.Option(help="Output tokens of each.")] = 48,
) -> None:
    """Greedy answers against transformers' generate: plain, chain and tree, single and batched, through hot swaps.

    Takes about ten minutes. A difference where the two best logits are closer than 1e-4 counts as a tie.

    Example: livedraft bench lossless --json -
    """
    from livedraft.benchmarks import lossless as benchmark

    benchmark.lossless(json, target, threads, prompts, tokens)


@app.command()
def stream(
    json: JsonOption = None,
    url: Annotated[str, typer.Option(help="kafka://host:port; without it a local test broker is started.")] = "",
    repeats: int = 5,
) -> None:
    """The trace stream on a broker against kafka-python alone, set up alike, on messages of 64 KB and 1 MB.

    Interleaved. Without --url each measurement has a broker of its own.

    Example: livedraft bench stream --url kafka://127.0.0.1:9092 --json -
    """
    from livedraft.benchmarks import stream as benchmark

    benchmark.stream(json, url, repeats)


@app.command()
def chaos(
    json: JsonOption = None,
    seed: int = 0,
    kills: int = 100,
    real_trainer: Annotated[
        bool, typer.Option("--real-trainer", help="Kill `livedraft trainer` itself, once each life has checkpointed.")
    ] = False,
) -> None:
    """Kill producer, broker and trainer at random on a local test broker: traces lost, learned twice, time of offers.

    The trainer is a stand-in that starts at once, unless --real-trainer, which takes about ten seconds a life.

    Example: livedraft bench chaos --seed 1 --kills 100 --json -
    """
    from livedraft.benchmarks import chaos as benchmark

    benchmark.chaos(json, seed, kills, "real" if real_trainer else "small")


@app.command()
def freeze(
    json: JsonOption = None,
    seconds: Annotated[float, typer.Option(help="Of each phase: calm, frozen, calm again.")] = 60.0,
    clients: Annotated[int, typer.Option(help="Requests streamed at once.")] = 2,
) -> None:
    """Stop a local test broker under load: p99 of tokens at a real gateway against calm, memory, and what was spilled.

    Ratios are over the mean of both calm phases; the p99 of each third of a phase shows the noise.

    Example: livedraft bench freeze --seconds 60 --json -
    """
    from livedraft.benchmarks import freeze as benchmark

    benchmark.freeze(json, seconds, clients)


@app.command()
def learn(
    json: JsonOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two sets, the main learners: 10 minutes on 2 cores.")] = False,
    target: TargetOption = "bundled",
    threads: ThreadsOption = 1,
    jobs: Annotated[int, typer.Option(help="Learners at a time; 0 is one per core and thread.", min=0)] = 0,
    seeds: Annotated[int, typer.Option(help="Starts of each learner from nothing.", min=1)] = 3,
    seconds: Annotated[
        float, typer.Option(help="Processor seconds that learners may use per 1000 tokens of traffic.", min=0.1)
    ] = 4.0,
    out: Annotated[Path, typer.Option(help="Recorded traces, runs, plots.")] = Path("runs/bench/learn"),
    peers: Annotated[Path, typer.Option(help="Folder of the peers' environments.")] = Path("runs/bench/peers"),
    only: Annotated[
        list[str] | None, typer.Option(help="Only this learner; may be repeated.", show_default=False)
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Only on this set (day0, mixed, return); may be repeated.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep runs that an earlier start finished.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing: report what earlier starts finished.")] = False,
) -> None:
    """How fast a drafter learns per token of traffic: our trainer, its variants, and the peers' on the same traces.

    Peers need environments of their own, made by: benchmarks/peers/setup speculators

    The full run takes an hour of two cores or more. What is finished stays below --out: --resume goes on from there.

    Example: livedraft bench learn --quick --json -
    """
    import os

    from livedraft.benchmarks import learn as benchmark

    options = benchmark.Options(
        quick=quick,
        target=target,
        threads=threads,
        jobs=jobs or max(1, (os.cpu_count() or 1) // threads),
        seeds=seeds,
        seconds_per_ktoken=seconds,
        out=out,
        peers=peers.resolve(),
        only=tuple(only or ()),
        sets=tuple(sets or ()),
        resume=resume,
        report=report,
    )
    benchmark.learn(json, options)
