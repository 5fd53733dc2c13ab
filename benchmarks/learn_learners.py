"""Who learns in ``livedraft bench learn``, each with the budget of the same traffic.

Two readings of "the same budget", both reported:

    tokens of traffic     what each makes of every token that arrived, on its own terms
    processor time        the same seconds per token of traffic for all that go over tokens again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from livedraft.contracts.settings import Trainer as Settings

#: Forward KL on committed text, a few traces per step as they come: what Aurora's code does (8 requests per step over
#: two devices, each sample once), and the others within one epoch.
_COMMITTED = {
    "objective": "forward_kl",
    "discard": 0.0,
    "rehearse_share": 0.0,
    "fresh_share": 1.0,
    "batch_traces": 4,
}


@dataclass(frozen=True)
class Learner:
    """A row of the tables."""

    name: str
    about: str
    settings: dict[str, Any] = field(default_factory=dict)
    #: Name of the peer whose environment runs it; empty: our code.
    peer: str = ""
    #: Measured in the quick run, too.
    quick: bool = False
    #: The trace sets it is measured on.
    sets: tuple[str, ...] = ("day0", "mixed")
    #: So slow that one start has to do.
    slow: bool = False


OURS = "livedraft"
ONE_PASS = "forward KL, one pass"
EPOCHS = "forward KL, epochs"
PEERS = ("speculators", "specforge")
#: Of those that differ in what they make of a shift.
_ALL_SETS = ("day0", "mixed", "return")


def learners(objectives: Sequence[str], window: int) -> list[Learner]:
    """All of them; ``objectives`` as the trainer's settings name them, ``window`` requests."""
    defaults = Settings()
    found = [
        Learner(OURS, "the trainer as it is configured by default", quick=True, sets=_ALL_SETS),
        Learner(
            ONE_PASS,
            "our code, the peers' objective: committed text, every trace once, 4 per step, no replay",
            _COMMITTED | {"max_uses": 1, "replay_traces": 4096},
            quick=True,
            sets=_ALL_SETS,
        ),
        Learner(
            EPOCHS,
            "the same, each window of traffic over and over until its processor time is used up, then dropped",
            _COMMITTED | {"max_uses": 1000, "replay_traces": 2 * window},
            quick=True,
            sets=_ALL_SETS,
        ),
    ]
    found += [
        Learner(f"{OURS}, {name}", f"the default with the objective {name}", {"objective": name, "discard": 0.0})
        for name in objectives
        if name != defaults.objective
    ]
    rejections = ("no rejections", "without the discard term", 0.0)
    if not defaults.discard:
        rejections = ("rejections", "with the discard term at 0.1", 0.1)
    name, how, weight = rejections
    found += [
        Learner(f"{OURS}, {name}", f"the default {how}", {"discard": weight}, sets=_ALL_SETS),
        Learner(
            f"{OURS}, no replay",
            "the default, every trace once",
            {"max_uses": 1, "rehearse_share": 0.0, "fresh_share": 1.0, "replay_traces": 4096},
        ),
        Learner(f"{OURS}, small steps", "the default with 4 traces per step", {"batch_traces": 4}),
        Learner(
            f"{OURS}, no memory",
            "the default without rehearsal of traces that have left the recent ones",
            {"rehearse_share": 0.0},
            sets=("return",),
        ),
        Learner(
            "speculators, one pass",
            "speculators 0.9.0, its recipe for EAGLE-3, every trace once, 4 per step",
            {"max_uses": 1, "batch_traces": 4},
            peer="speculators",
        ),
        Learner(
            "speculators",
            "speculators 0.9.0, its recipe for EAGLE-3 and its 20 epochs over what has arrived, 16 traces per step",
            {"max_uses": 20, "batch_traces": 16},
            peer="speculators",
            quick=True,
            sets=_ALL_SETS,
        ),
        Learner(
            "specforge, one pass",
            "specforge 0.2.0 with its defaults, every trace once, 1 per step; its loss in Triton's interpreter, so "
            "that its processor time means nothing",
            {"max_uses": 1},
            peer="specforge",
            slow=True,
        ),
        Learner(
            "specforge's loss, our code",
            "forward KL, unroll 7, 0.8 ** k, the head learns too, 1 trace per step, 10 passes: SpecForge's published "
            "loss and schedule of passes with our optimiser",
            _COMMITTED | {"batch_traces": 1, "unroll": 7, "head": "trained", "max_uses": 10},
        ),
    ]
    return found


def environment(peer: str, root: Path) -> Path:
    """Interpreter of a peer's environment below ``root``; it need not exist."""
    return root / peer / "bin" / "python"
