"""Rates by kind of parameter, and what a restart takes over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from livedraft.contracts.settings import Trainer
from livedraft.trainer.model import Drafter
from livedraft.trainer.optimizer import Muon, Optimizer, orthogonalised
from livedraft.trainer.target import Target, fresh_config

SETTINGS = Trainer(learning_rate=1e-3, matrix_learning_rate=1e-2, warmup_steps=4)


def give_gradients(drafter: Drafter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in drafter.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_fc_moves_less_where_features_are_large(drafter: Drafter) -> None:
    before = {name: p.detach().clone() for name, p in drafter.named_parameters()}
    give_gradients(drafter, 0)
    assert Optimizer(drafter, SETTINGS).step(10, feature_rms=50.0)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in drafter.named_parameters()}
    # Adam's first step is its rate.
    assert moved["lm_head.weight"] == pytest.approx(1e-3, rel=0.01)
    assert moved["fc.weight"] == pytest.approx(1e-3 / 50, rel=0.01)
    assert moved["midlayer.self_attn.q_proj.weight"] > 0


def test_the_rate_warms_up(drafter: Drafter) -> None:
    optimizer, before = Optimizer(drafter, SETTINGS), drafter.lm_head.weight.detach().clone()
    give_gradients(drafter, 0)
    optimizer.step(0, 1.0)
    assert float((drafter.lm_head.weight.detach() - before).abs().max()) == pytest.approx(1e-3 / 4, rel=0.01)


def test_a_gradient_that_is_not_finite_moves_nothing(drafter: Drafter) -> None:
    give_gradients(drafter, 0)
    assert drafter.fc.weight.grad is not None
    drafter.fc.weight.grad[0, 0] = float("nan")
    before = [p.detach().clone() for p in drafter.parameters()]
    assert not Optimizer(drafter, SETTINGS).step(10, 1.0)
    assert all(torch.equal(p, b) for p, b in zip(drafter.parameters(), before, strict=True))


def test_a_restored_optimizer_goes_on_as_the_first(target: Target) -> None:
    first, second = (Drafter.fresh(target, fresh_config(target)) for _ in range(2))
    one = Optimizer(first, SETTINGS)
    for step in range(3):
        give_gradients(first, step)
        one.step(step, 10.0)
    second.load_state_dict(first.state_dict())
    other = Optimizer(second, SETTINGS)
    other.restore({name: t.clone() for name, t in one.state().items()})
    for optimizer, drafter in ((one, first), (other, second)):
        give_gradients(drafter, 3)
        optimizer.step(3, 10.0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_orthogonalising_keeps_the_directions_and_evens_out_their_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalised(matrix)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    sizes = u.T @ out @ v.T
    assert torch.allclose(sizes, torch.diag(sizes.diagonal()), atol=1e-4)
    strong = s > 0.1 * s.max()  # the iteration lifts small singular values only so far
    assert bool(((sizes.diagonal() > 0.6) & (sizes.diagonal() < 1.3))[strong].all())


def test_in_bfloat16_it_is_torchs_muon() -> None:
    ours, theirs = (torch.nn.Parameter(torch.full((24, 8), 0.5)) for _ in range(2))
    muon = Muon([ours], torch.bfloat16)
    muon.rate = 0.02
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    their_step: Callable[[], object] = reference.step
    for seed in range(4):
        gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        their_step()
    assert torch.equal(ours, theirs)
