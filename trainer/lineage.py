"""The first lessons of a lineage: what its new words mean, before the gate sets it beside a drafter that knows its own.

A refreshed vocabulary brings the target's rows for its new words, under a layer that has never led to them.  The
trainer learns for the live drafter's words alone, so nobody would teach these before they are promoted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.messages import Delivery, Manifest, Trace
from livedraft.contracts.settings import Trainer as Settings
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.model import Drafter
from livedraft.trainer.process import prefill_of
from livedraft.trainer.target import read_target
from msgspec.structs import replace


def first_lessons(
    config: DrafterConfig,
    tensors: Mapping[str, np.ndarray],
    about: Manifest,
    traces: Sequence[Trace],
    settings: Settings,
    target_folder: Path,
    steps: int,
    stepped: Callable[[], None],
) -> tuple[dict[str, np.ndarray], Manifest]:
    """The drafter after at most ``steps`` on ``traces`` over and over, and ``about`` with what it has learned.

    Fewer where traces are few: each serves ``settings.max_uses`` times.  ``stepped`` hears of every step.
    """
    torch.set_num_threads(settings.threads)
    target = read_target(target_folder)
    drafter = Drafter(config, target.embedding)
    drafter.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    identity = TargetId(target=about.target, target_revision=about.target_revision, tokenizer_hash=about.tokenizer_hash)
    settings = replace(
        settings,
        batch_traces=min(settings.batch_traces, len(traces)),
        replay_traces=2 * len(traces),
        steps_per_trace=0.0,
        rest_gain=-2.0,
    )
    prefill = prefill_of(target_folder, settings)
    learner = Learner(drafter, identity, settings, layers=target.feature_layers, prefill=prefill)
    for number, trace in enumerate(traces):
        learner.admit(Delivery(partition="0", offset=number, item=trace))
    while learner.steps < steps and learner.can_learn:
        learner.step()
        stepped()
    learned = replace(about, steps=about.steps + learner.steps, tokens_trained=about.tokens_trained + learner.tokens)
    return learner.candidate() if learner.steps else dict(tensors), learned
