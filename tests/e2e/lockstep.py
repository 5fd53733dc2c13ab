"""What trainers learn from and how, where tests compare the weights that they come to."""

from __future__ import annotations

from pathlib import Path

from livedraft.cli import wiring
from livedraft.contracts import checkpoint
from livedraft.contracts.messages import Trace
from livedraft.contracts.settings import Settings, Trainer
from livedraft.serving.local import place
from livedraft.trainer.target import read_target
from msgspec.structs import replace

from tests.traces.conftest import build_trace

#: Half a step for each trace, as small as steps get.
LOCKSTEP = Trainer(
    steps_per_trace=0.5, batch_traces=2, replay_traces=16, unroll=2, window=16, nice=0, precision="float32"
)


class TraceMaker:
    """Traces that the first drafter of ``settings`` can learn from; it is written below ``root``."""

    def __init__(self, settings: Settings, root: Path) -> None:
        self._manifest = checkpoint.verify(wiring.day_0(settings, root))[1]
        self._target = read_target(place.find("bundled"))

    def __call__(self, number: int) -> Trace:
        """One to learn from, of a request of its own."""
        width = 3 * self._target.config["hidden_size"]
        trace = build_trace(number, rounds=3, width=width, request_id=f"r{number}")
        return replace(
            trace,
            target=self._manifest.target,
            target_revision=self._manifest.target_revision,
            tokenizer_hash=self._manifest.tokenizer_hash,
            features=replace(trace.features, layers=self._target.feature_layers),
        )
