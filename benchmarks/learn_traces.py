"""The traffic that ``livedraft bench learn`` replays: recorded once from the local engine, the same for every learner.

    held-out   both domains, never learned from; without proposals, since only the committed text is scored
    weak       mixed, recorded with a drafter that knows nothing; ``weak_drafter`` is trained on it
    day0       mixed, recorded with a drafter that knows nothing: what serving sees on its first day
    mixed      mixed, recorded with the weak drafter
    return     prose, then code, then prose again, recorded with the weak drafter; its beginnings are the ordered
               domains and the abrupt shift

Every request that learners see was served with the drafter on in every round, so rejected proposals are as real as
accepted ones.  One weak drafter for all instead of the learner's own of that moment: learners could not share the
traces otherwise.  Half of the requests are greedy, half drawn at temperature 0.7.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from livedraft.benchmarks.learn_files import learner_of, read, write_candidate
from livedraft.benchmarks.load import answers, console, fresh_drafter
from livedraft.cli.prompts import held_out_prompts
from livedraft.contracts.errors import LivedraftError
from livedraft.contracts.messages import Delivery, Generation, Sampling, Trace
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.contracts.settings import Trainer as TrainerSettings
from livedraft.serving.local.engine import LocalEngine
from livedraft.traces.codec import encode
from livedraft.traces.memory import MemoryStream
from msgspec.structs import replace
from rich.progress import track

DOMAINS = ("prose", "code")
TEMPERATURES = (0.0, 0.7)
#: Output tokens of a request at most.
TOKENS = 64
#: Optimiser steps that make the weak drafter.
_WEAK_STEPS = 30
#: Part of every cache's name: to be raised when recording changes.
_FORMAT = 1


@dataclass(frozen=True)
class Sizes:
    """Requests in each set; of ``held_out`` in each domain, of ``phases`` prose, code, prose."""

    held_out: int
    weak: int
    day0: int
    mixed: int
    phases: tuple[int, int, int]

    @property
    def needed(self) -> int:
        """Prompts of one domain that all sets together take at most."""
        return self.held_out + (self.weak + self.day0 + self.mixed) // 2 + sum(self.phases)


@dataclass(frozen=True)
class Ask:
    """A request to record."""

    domain: str
    prompt: str
    temperature: float
    seed: int


@dataclass(frozen=True)
class Plan:
    """A set to record: its requests, in the order in which learners get them."""

    asks: tuple[Ask, ...]
    #: "none", "fresh" or "weak".
    drafter: str


def plan(sizes: Sizes, seed: int, prompts: Mapping[str, Sequence[str]]) -> dict[str, Plan]:
    """All sets, no prompt in two of them.  A function of its arguments alone.

    Raises LivedraftError when a domain has too few prompts.
    """
    rng = random.Random(seed)
    left = {}
    for domain in DOMAINS:
        known = sorted(set(prompts[domain]))
        if len(known) < sizes.needed:
            raise LivedraftError(f"{domain} has {len(known)} different prompts, these sizes need {sizes.needed}")
        left[domain] = rng.sample(known, len(known))

    def asks(domains: Sequence[str]) -> tuple[Ask, ...]:
        seen = dict.fromkeys(DOMAINS, 0)
        made = []
        for domain in domains:
            # Alternating within each domain, so that neither temperature belongs to one.
            temperature = TEMPERATURES[seen[domain] % len(TEMPERATURES)]
            seen[domain] += 1
            made.append(Ask(domain, left[domain].pop(), temperature, rng.randrange(2**31)))
        return tuple(made)

    def mixed(count: int) -> list[str]:
        return [DOMAINS[i % len(DOMAINS)] for i in range(count)]

    first, second, back = sizes.phases
    return {
        "held-out": Plan(asks(mixed(2 * sizes.held_out)), "none"),
        "weak": Plan(asks(mixed(sizes.weak)), "fresh"),
        "day0": Plan(asks(mixed(sizes.day0)), "fresh"),
        "mixed": Plan(asks(mixed(sizes.mixed)), "weak"),
        "return": Plan(asks(["prose"] * first + ["code"] * second + ["prose"] * back), "weak"),
    }


@dataclass(frozen=True)
class TraceSets:
    """Where the recorded sets lie."""

    folder: Path

    def path(self, name: str) -> Path:
        """The file of one set."""
        return self.folder / f"{name}.traces"

    def read(self, name: str) -> list[Trace]:
        """The traces of one set, in the order of its plan."""
        return read(self.path(name))

    @property
    def weak_drafter(self) -> Path:
        """Checkpoint of the drafter that ``mixed`` and ``return`` were recorded with."""
        return self.folder / "weak"


def record(sizes: Sizes, seed: int, target: str, out: Path, threads: int = 1) -> TraceSets:
    """Record what ``out`` does not hold yet."""
    prompts = {domain: held_out_prompts(domain) for domain in DOMAINS}
    plans = plan(sizes, seed, prompts)
    engine = EngineSettings(target=target, threads=threads, adaptive_depth=False)
    # The revision is part of what the traces are: another target's must not be taken for this one's.
    # Of the engine's settings only those that shape traces: a new one elsewhere must not cost a recording.
    shape = [engine.draft_depth, engine.capture_topk, engine.draft_vocab, engine.draft_intermediate]
    identity = msgspec.json.encode([_FORMAT, target, seed, asdict(sizes), shape, _revision(engine)])
    sets = TraceSets(out / hashlib.sha256(identity).hexdigest()[:12])
    sets.folder.mkdir(parents=True, exist_ok=True)
    fresh = sets.folder / "fresh"
    if not fresh.exists():
        fresh_drafter(engine, fresh)
    drafters = {"none": None, "fresh": fresh, "weak": sets.weak_drafter}
    for name, planned in plans.items():
        if planned.drafter == "weak" and not sets.weak_drafter.exists():
            _write_weak(fresh, sets, target)
        if planned.asks and not sets.path(name).exists():
            traces = _record(planned, drafters[planned.drafter], engine, name)
            half = sets.path(name).with_suffix(".half")
            half.write_bytes(msgspec.msgpack.encode([encode(trace) for trace in traces]))
            half.replace(sets.path(name))
    return sets


def _record(planned: Plan, drafter: Path | None, settings: EngineSettings, name: str) -> list[Trace]:
    if drafter is None:
        settings = replace(settings, draft_depth=0)
    stream = MemoryStream()
    local = LocalEngine(settings, drafter=drafter, drafter_version=planned.drafter, sink=stream, buffer_bytes=1 << 30)
    requests = [
        Generation(
            request_id=f"{name}-{number}",
            prompt=tuple(local.render([{"role": "user", "content": ask.prompt}])),
            sampling=Sampling(temperature=ask.temperature, seed=ask.seed),
            max_tokens=TOKENS,
            domain=ask.domain,
        )
        for number, ask in enumerate(planned.asks)
    ]
    for _ in track(answers(local, requests), f"record {name}", total=len(requests), console=console):
        pass
    local.close()
    traces = {
        item.item.request_id: item.item
        for item in stream.source("learn").poll(limit=len(requests))
        if isinstance(item.item, Trace)
    }
    if len(traces) != len(requests):
        raise LivedraftError(f"recording {name}: {len(traces)} of {len(requests)} traces came")
    return [traces[request.request_id] for request in requests]


def _write_weak(fresh: Path, sets: TraceSets, target: str) -> None:
    """Train the weak drafter: few steps, over the whole set at once."""
    traces = sets.read("weak")
    learner = learner_of(fresh, traces[0], TrainerSettings(replay_traces=2 * len(traces), max_uses=_WEAK_STEPS), target)
    for number, trace in enumerate(traces):
        learner.admit(Delivery(partition="0", offset=number, item=trace))
    for _ in track(range(_WEAK_STEPS), "train the weak drafter", console=console):
        learner.step()
    write_candidate(learner, sets.weak_drafter)


def _revision(engine: EngineSettings) -> str:
    from livedraft.serving.local import place

    return place.revision(place.find(engine.target))
