"""How the drafter's weights move: Muon for its layer's matrices, AdamW for gains, ``fc`` and the head if it learns.

Muon (Jordan 2024; Liu et al. 2025, arXiv 2502.16982) steps along the orthogonalised momentum, scaled here to the size
of an AdamW step.  ``fc`` reads raw hidden states, whose size differs between targets by orders of magnitude, and
Adam's step does not shrink with its input's size: so its rate is divided by the features' root mean square, which is
what a drafter with normalised features would do.

The orthogonalisation is written here because ``torch.optim.Muon`` always runs it in bfloat16: on a processor without
bfloat16 products that alone took two thirds of a training step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from livedraft.contracts.settings import Trainer as Settings
from livedraft.trainer.model import Drafter
from livedraft.trainer.ranks import Ranks
from torch import Tensor

#: Quintic Newton-Schulz coefficients, and iterations (Jordan 2024): singular values end between about 0.7 and 1.2.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[m, n] -> nearly the orthogonal factor U V^T of its singular value decomposition, computed in ``dtype``."""
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon:
    """Nesterov momentum, orthogonalised, for matrices.

    A matrix that ranks keep in parts is orthogonalised whole, by each of them, and each moves its part.
    """

    def __init__(
        self, matrices: list[Tensor], dtype: torch.dtype, *, momentum: float = 0.95, ranks: Ranks | None = None
    ) -> None:
        self.rate = 0.0
        self._ranks = ranks or Ranks()
        self.state: dict[Tensor, dict[str, Tensor]] = {m: {"momentum_buffer": torch.zeros_like(m)} for m in matrices}
        self._dtype = dtype
        self._momentum = momentum

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix [m, n] by rate x 0.2 sqrt(max(m, n)): root mean square 0.2, as AdamW's steps have."""
        for matrix, state in self.state.items():
            if matrix.grad is not None:
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - self._momentum)
                ahead = self._ranks.whole(matrix.grad.lerp(mean, self._momentum))
                ahead = self._ranks.share(orthogonalised(ahead, self._dtype), matrix)
                matrix.add_(ahead, alpha=-self.rate * 0.2 * max(matrix.shape) ** 0.5)


class Optimizer:
    """One step at a time for what requires a gradient; ``state`` and ``restore`` speak in parameter names."""

    def __init__(self, drafter: Drafter, settings: Settings, ranks: Ranks | None = None) -> None:
        self._ranks = ranks = ranks or Ranks()
        self._parameters = {name: p for name, p in drafter.named_parameters() if p.requires_grad}
        self._settings = settings
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self._parameters.items():
            if parameter is not drafter.fc.weight:
                (matrices if name.startswith("midlayer") and parameter.dim() == 2 else others).append(parameter)
        self._muon = Muon(matrices, torch.bfloat16 if drafter.low_precision else torch.float32, ranks=ranks)
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
        norm = self._ranks.whole(torch.nn.utils.clip_grad_norm_(self._parameters.values(), settings.clip))
        if not norm.isfinite():
            return False
        warm = min(1.0, (number + 1) / max(settings.warmup_steps, 1))
        self._muon.rate = warm * settings.matrix_learning_rate
        others, fc = self._adam.param_groups
        others["lr"] = warm * settings.learning_rate
        fc["lr"] = warm * settings.learning_rate / feature_rms
        self._muon.step()
        adam: Callable[[], object] = self._adam.step
        adam()
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
            share = self._ranks.share(value, parameter) if value.shape == parameter.shape else value
            self._of(parameter).state[parameter][moment] = share

    def _of(self, parameter: Tensor) -> Muon | torch.optim.Optimizer:
        return self._muon if parameter in self._muon.state else self._adam
