"""What recording every verify round costs: the same requests with and without, in turn."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from livedraft.benchmarks.load import answers, fresh_drafter, greedy, interleave
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance, write
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.contracts.settings import Traces
from livedraft.serving.local.engine import LocalEngine
from livedraft.traces.urls import open_sink

_TOKENS = 64


def capture(place: Path | None, target: str, threads: int, repeats: int) -> None:
    """See ``livedraft bench capture --help``.

    The drafter knows nothing, so that nearly every node is a rejected one: the most to record per token.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = EngineSettings(target=target, threads=threads, adaptive_depth=False)
        drafter = fresh_drafter(settings, Path(folder) / "drafter")
        sink = open_sink(Traces(url=f"spool://{folder}/traces"))
        local = LocalEngine(settings, drafter=drafter, sink=sink, admit=lambda request: request.traced)
        prompts = [local.render([{"role": "user", "content": text}]) for text in held_out_prompts()[:8]]

        def run(traced: bool) -> int:
            requests = [greedy(i, prompt, _TOKENS, traced=traced) for i, prompt in enumerate(prompts)]
            return sum(last.output_tokens for _, last in answers(local, requests))

        rates = interleave({"without": lambda: run(False), "with": lambda: run(True)}, repeats)
        local.close()
        sink.close()
        counters = sink.counters()
    pairs = [1 - a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
    medians = {name: statistics.median(r) for name, r in rates.items()}
    write(
        {
            "overhead": round(statistics.median(pairs), 4),
            "interquartile": [round(q, 4) for q in statistics.quantiles(pairs, n=4)[::2]],
            "overhead_of_medians": round(1 - medians["with"] / medians["without"], 4),
            "tokens_per_second": {name: round(rate, 1) for name, rate in medians.items()},
            "repeats": repeats,
            "traces": {"written": counters.written, "dropped": sum(counters.dropped.values())},
            "provenance": provenance(),
        },
        place,
    )
