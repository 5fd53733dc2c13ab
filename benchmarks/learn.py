"""How fast a drafter learns from traffic: our trainer, its variants and the peers' trainers on the same traces.

Every learner runs in a process of its own with the same threads (``learn_run``, ``peers/run_*.py``), writes a
checkpoint per window of traffic, and all checkpoints are scored by the same code (``learn_score``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from livedraft.benchmarks import learn_report
from livedraft.benchmarks.learn_learners import Learner, environment, learners
from livedraft.benchmarks.learn_run import Job, Mark
from livedraft.benchmarks.learn_score import ScoreJob, Scores
from livedraft.benchmarks.learn_traces import Sizes, TraceSets, record
from livedraft.benchmarks.load import answers, console, greedy, interleave
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance, write
from livedraft.contracts import settings as known_settings
from livedraft.contracts.errors import LivedraftError
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.contracts.stopping import stopping
from livedraft.serving.local import place as targets
from livedraft.serving.local.engine import LocalEngine
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_QUICK = Sizes(held_out=16, weak=96, day0=128, mixed=0, phases=(100, 150, 50))
_FULL = Sizes(held_out=32, weak=96, day0=144, mixed=96, phases=(100, 150, 50))
#: Requests of a window; the shift's worst stretch is looked for over two of its windows.
_WINDOW = 16
_SHIFT_WINDOW = 25
_PEER_SCRIPTS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Options:
    """The command line."""

    quick: bool
    target: str
    threads: int
    jobs: int
    seeds: int
    seconds_per_ktoken: float
    out: Path
    peers: Path
    only: tuple[str, ...]
    sets: tuple[str, ...]
    resume: bool
    report: bool


@dataclass(frozen=True)
class Scenario:
    """A trace set, what learners begin with, and for the shift the windows in which its phases end."""

    name: str
    start: str
    window: int
    #: Windows after which phases end.
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """One learner on one set with one seed."""

    scenario: Scenario
    learner: Learner
    seed: int
    folder: Path
    windows: int

    def marks(self) -> list[Mark]:
        """What it has come to so far."""
        path = self.folder / "marks.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        with contextlib.suppress(msgspec.DecodeError):  # a last line that is being written
            return [msgspec.json.decode(line, type=Mark) for line in lines]
        return []

    @property
    def finished(self) -> bool:
        """Whether it was run to its end, and scored."""
        return (self.folder / "scores.json").exists()

    def scores(self) -> Scores:
        """How its checkpoints did."""
        return msgspec.json.decode((self.folder / "scores.json").read_bytes(), type=Scores)


def learn(place: Path | None, options: Options) -> None:
    """See ``livedraft bench learn --help``."""
    out = options.out.resolve()
    sizes = _QUICK if options.quick else _FULL
    sets = record(sizes, 0, options.target, out / "traces", options.threads)
    scenarios = _scenarios(sizes, options.sets)
    chosen, missing = _learners(options)
    costs = _costs(sets, options)
    if not (options.resume or options.report):
        shutil.rmtree(out / "runs", ignore_errors=True)
    runs = [
        Run(scenario, learner, seed, out / "runs" / scenario.name / _slug(learner.name) / str(seed),
            _windows(sets, scenario))
        # Start by start: what is cut short is a report of fewer starts.
        for seed in range(options.seeds)
        for scenario in scenarios
        for learner in chosen[scenario.window]
        if _takes_part(learner, scenario) and seed < _starts(learner, scenario, options)
    ]  # fmt: skip
    if options.report:
        runs = [run for run in runs if run.finished]
        if not runs:
            raise LivedraftError(f"--report: no run was finished below {out / 'runs'}")
    else:
        _finish(runs, sets, scenarios, options)
    report = learn_report.build(runs, sets, costs, sizes)
    report["learners"] = [
        {"name": each.name, "about": each.about, "settings": each.settings} for each in chosen[_WINDOW]
    ]
    report["not_measured"] = missing
    report["budget"] = {"cpu_seconds_per_1000_tokens": options.seconds_per_ktoken, "threads": options.threads}
    report["provenance"] = provenance()
    learn_report.draw(report, out)
    learn_report.show(report, console)
    console.print(f"plots: {out / 'day0.png'}, {out / 'shift.png'}")
    write(report, place or out / "report.json")


def _finish(runs: Sequence[Run], sets: TraceSets, scenarios: Sequence[Scenario], options: Options) -> None:
    if any(run.learner.peer for run in runs):
        _convert(sets, scenarios, options.target)
    with stopping() as stop:
        _run_all(runs, sets, options, stop.is_set)
        if stop.is_set():
            raise LivedraftError("stopped; what was finished is kept: go on with --resume, or see it with --report")


def _scenarios(sizes: Sizes, names: Sequence[str]) -> list[Scenario]:
    ends = np.cumsum(sizes.phases) // _SHIFT_WINDOW
    found = [Scenario("day0", "fresh", _WINDOW)]
    if sizes.mixed:
        found.append(Scenario("mixed", "weak", _WINDOW))
    found.append(Scenario("return", "fresh", _SHIFT_WINDOW, tuple(int(end) for end in ends)))
    known = [scenario.name for scenario in found]
    if unknown := set(names) - set(known):
        raise LivedraftError(f"--set {', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    return [scenario for scenario in found if not names or scenario.name in names]


def objective_names() -> tuple[str, ...]:
    """The objectives that the trainer's settings can name."""
    names: tuple[str, ...] = getattr(known_settings, "DIVERGENCES", ("forward_kl",))
    return names + tuple(getattr(known_settings, "ON_COMMITTED_TEXT", ()))


def _learners(options: Options) -> tuple[dict[int, list[Learner]], dict[str, str]]:
    """Those to run by window length, and why others are not."""
    by_window: dict[int, list[Learner]] = {}
    missing = dict(learn_report.NOT_ON_A_CPU)
    for window in (_WINDOW, _SHIFT_WINDOW):
        found = learners(objective_names(), window)
        if options.only:
            unknown = set(options.only) - {each.name for each in found}
            if unknown:
                names = ", ".join(repr(each.name) for each in found)
                raise LivedraftError(f"--only {', '.join(sorted(unknown))}: expected some of {names}")
            found = [each for each in found if each.name in options.only]
        elif options.quick:
            found = [each for each in found if each.quick]
        by_window[window] = []
        for each in found:
            if each.peer and not environment(each.peer, options.peers).exists():
                missing[each.name] = f"no environment; make it with: benchmarks/peers/setup {each.peer} {options.peers}"
            else:
                by_window[window].append(each)
    return by_window, missing


def _takes_part(learner: Learner, scenario: Scenario) -> bool:
    # A peer's drafter has switches that ours lacks, so it cannot go on from our checkpoint.
    return scenario.name in learner.sets and not (learner.peer and scenario.start != "fresh")


def _starts(learner: Learner, scenario: Scenario, options: Options) -> int:
    """Starts with which a learner is measured; a quick run has time for them on the first day alone."""
    hurried = options.quick and not options.sets and scenario.name != "day0"
    return 1 if learner.slow or scenario.name == "mixed" or hurried else options.seeds


def _windows(sets: TraceSets, scenario: Scenario) -> int:
    return -(-len(sets.read(scenario.name)) // scenario.window)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.replace("'", "")).strip("-")


def _convert(sets: TraceSets, scenarios: Sequence[Scenario], target: str) -> None:
    from livedraft.benchmarks.learn_peers import convert

    for scenario in scenarios:
        path = _converted(sets, scenario.name)
        if scenario.start == "fresh" and not path.exists():
            with console.status(f"convert {scenario.name} for the peers"):
                convert(sets.read(scenario.name), targets.find(target), path)


def _converted(sets: TraceSets, name: str) -> Path:
    return sets.path(name).with_suffix(".pt")


def _costs(sets: TraceSets, options: Options) -> dict[str, float]:
    """Seconds of a verify round at batch 1 without drafting and with drafts of full depth, measured in turn."""
    depth = EngineSettings().draft_depth
    engines = {
        "plain": LocalEngine(EngineSettings(target=options.target, threads=options.threads, draft_depth=0)),
        "drafting": LocalEngine(
            EngineSettings(target=options.target, threads=options.threads, adaptive_depth=False),
            drafter=sets.weak_drafter,
        ),
    }
    prompts = [engines["plain"].encode(text) for text in held_out_prompts()[:4]]

    def one(side: str) -> int:
        requests = [greedy(i, prompt, 48) for i, prompt in enumerate(prompts)]
        return sum(last.rounds for _, last in answers(engines[side], requests, at_once=1))

    rates = interleave({side: partial(one, side) for side in engines}, 5)
    for engine in engines.values():
        engine.close()
    plain, drafting = (1 / float(np.median(rates[side])) for side in ("plain", "drafting"))
    return {"depth": depth, "plain_round_s": plain, "drafting_round_s": drafting, "break_even_al": drafting / plain}


def _run_all(runs: Sequence[Run], sets: TraceSets, options: Options, stopped: Any) -> None:
    """Learn, then score, ``options.jobs`` processes at a time, in the order of ``runs``."""
    waiting = [run for run in runs if not (options.resume and run.finished)]
    active: list[tuple[Run, str, subprocess.Popen[bytes]]] = []
    columns = TextColumn("learn"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("learn", total=sum(run.windows + 2 for run in waiting))
        finished = 0
        try:
            while (waiting or active) and not stopped():
                while waiting and len(active) < options.jobs:
                    run = waiting.pop(0)
                    shutil.rmtree(run.folder, ignore_errors=True)
                    run.folder.mkdir(parents=True)
                    active.append((run, "learn", _learn(run, sets, options)))
                time.sleep(0.1)
                for one in [*active]:
                    run, stage, process = one
                    if process.poll() is None:
                        continue
                    if process.returncode:
                        raise LivedraftError(_last_words(run, stage, process.returncode))
                    active.remove(one)
                    if stage == "learn":
                        active.append((run, "score", _score(run, sets, options)))
                    else:
                        finished += run.windows + 2
                progress.update(task, completed=finished + sum(len(run.marks()) for run, *_ in active))
            if not stopped():
                progress.update(task, completed=finished)
        finally:
            for *_, process in active:
                process.terminate()
            for *_, process in active:
                process.wait()


def _learn(run: Run, sets: TraceSets, options: Options) -> subprocess.Popen[bytes]:
    peer = run.learner.peer
    job = msgspec.to_builtins(
        Job(
            target=options.target,
            traces=str(sets.path(run.scenario.name)),
            converted=str(_converted(sets, run.scenario.name)),
            start=str(sets.folder / run.scenario.start),
            settings=run.learner.settings,
            window=run.scenario.window,
            seconds_per_ktoken=options.seconds_per_ktoken,
            seed=run.seed,
            threads=options.threads,
            out=str(run.folder),
        )
    ) | {"verifier": str(targets.find(options.target))}
    command = [sys.executable, "-m", "livedraft.benchmarks.learn_run"]
    if peer:
        command = [str(environment(peer, options.peers)), str(_PEER_SCRIPTS / f"run_{peer}.py")]
    return _start(run, "learn", command, job)


def _score(run: Run, sets: TraceSets, options: Options) -> subprocess.Popen[bytes]:
    ends = run.scenario.ends
    job = ScoreJob(
        target=options.target,
        held_out=str(sets.path("held-out")),
        run=str(run.folder),
        traces=str(sets.path(run.scenario.name)),
        window=run.scenario.window,
        depth=EngineSettings().draft_depth,
        threads=options.threads,
        ahead=(ends[0], ends[-1]) if ends else None,
        frozen=ends[0] if ends else 0,
    )
    command = [sys.executable, "-m", "livedraft.benchmarks.learn_score"]
    return _start(run, "score", command, msgspec.to_builtins(job))


def _start(run: Run, stage: str, command: list[str], job: dict[str, Any]) -> subprocess.Popen[bytes]:
    path = run.folder / f"{stage}.json"
    path.write_bytes(msgspec.json.encode(job))
    own = command[0] == sys.executable
    # A peer's interpreter must not find our packages first.
    surroundings = {name: value for name, value in os.environ.items() if own or name != "PYTHONPATH"}
    with (run.folder / f"{stage}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=surroundings
        )


def _last_words(run: Run, stage: str, status: int) -> str:
    log = run.folder / f"{stage}.log"
    said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    return f"{run.learner.name} on {run.scenario.name}: {stage} ended with {status}: {said[-1]} (all of it: {log})"
