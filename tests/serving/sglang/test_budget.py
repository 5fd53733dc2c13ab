from __future__ import annotations

import gc

from livedraft.serving.sglang.budget import Budget


class Owner:
    pass


def test_claims_end_with_their_release_or_their_owner() -> None:
    budget, first, second = Budget(100), Owner(), Owner()
    budget.claim(first, 30)
    budget.claim(second, 40)
    budget.claim(first, 20)
    assert budget.held == 90
    assert budget.crowded()
    assert budget.fits(10)
    assert not budget.fits(11)
    budget.release(first)
    budget.release(first)
    budget.release(Owner())
    assert budget.held == 40
    budget.claim(first, 5)
    del first, second
    gc.collect()
    assert budget.held == 0
    assert not budget.crowded()
    assert not budget.crowded(50)
    assert budget.crowded(51)
