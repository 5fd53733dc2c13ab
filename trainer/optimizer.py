"""How the drafter's weights move: Muon for its layer's matrices, AdamW for head, gains and ``fc``.

Muon (Jordan 2024; Liu et al. 2025, arXiv 2502.16982) steps along the orthogonalised momentum, scaled here to the size
of an AdamW step.  ``fc`` reads raw hidden states, whose size differs between targets by orders of magnitude, and
Adam's step does not shrink with its input's size: so its rate is divided by the features' root mean square, which is
what a drafter with normalised features would do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from livedraft.contracts.settings import Trainer as Settings
from livedraft.trainer.model import Drafter
from torch import Tensor


class Optimizer:
    """One step at a time; ``state`` and ``restore`` speak in parameter names."""

    def __init__(self, drafter: Drafter, settings: Settings) -> None:
        self._parameters = dict(drafter.named_parameters())
        self._settings = settings
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self._parameters.items():
            if parameter is not drafter.fc.weight:
                (matrices if name.startswith("midlayer") and parameter.dim() == 2 else others).append(parameter)
        self._muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self._adam = torch.optim.AdamW(
            [{"params": others}, {"params": [drafter.fc.weight]}],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    def step(self, number: int, feature_rms: float) -> bool:
        """Clip the gradients and move, at the rates of step ``number`` (from 0).

        False, and nothing moved, when a gradient is not finite.
        """
        settings = self._settings
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), settings.clip)
        if not norm.isfinite():
            return False
        warm = min(1.0, (number + 1) / max(settings.warmup_steps, 1))
        self._muon.param_groups[0]["lr"] = warm * settings.matrix_learning_rate
        others, fc = self._adam.param_groups
        others["lr"] = warm * settings.learning_rate
        fc["lr"] = warm * settings.learning_rate / feature_rms
        for optimizer in (self._muon, self._adam):
            move: Callable[[], object] = optimizer.step
            move()
        return True

    def zero_grad(self) -> None:
        """Forget gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments by ``<moment>/<parameter>``."""
        return {
            f"{moment}/{name}": value
            for name, parameter in self._parameters.items()
            for moment, value in self._of(parameter).state.get(parameter, {}).items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Become what ``state`` was taken of."""
        for key, value in tensors.items():
            moment, name = key.split("/", 1)
            parameter = self._parameters[name]
            self._of(parameter).state[parameter][moment] = value

    def _of(self, parameter: Tensor) -> torch.optim.Optimizer:
        by_muon = any(parameter is p for p in self._muon.param_groups[0]["params"])
        return self._muon if by_muon else self._adam
