"""All ranks take a drafter at the same turn, or none does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import SwapRequest
from livedraft.serving.sglang.exchange import Exchange, Order
from livedraft.serving.sglang.identity import Drafting
from livedraft.serving.sglang.surface import REST

from .ranks import FakeWeights, Ranks

B = SwapRequest(path="/b", version="b", checksum="sum of b")


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("busy", [True, False])
def test_all_ranks_exchange_at_the_same_batch(size: int, busy: bool) -> None:
    ranks = Ranks(*(FakeWeights(stage_s=0.05 * rank) for rank in range(size)), busy=busy)
    with ranks.turning() as exchange:
        receipt = exchange.swap(B)
    assert (receipt.version, receipt.checksum, receipt.previous) == ("b", "sum of b", "a")
    assert receipt.stall_s == 0.5
    assert receipt.applied_at > 0
    assert [weights.held for weights in ranks.weights] == ["b"] * size
    assert [weights.previous for weights in ranks.weights] == ["a"] * size
    assert all(batches == ranks.batches[0] for batches in ranks.batches), "batch by batch the ranks drafted alike"
    assert all(stamped == copied for stamped, copied in ranks.batches[0]), "each batch is stamped with what drafts it"
    assert all(weights.settled == (not busy) for weights in ranks.weights), "only where no batch orders the copy"
    if busy:
        assert {stamped for stamped, _ in ranks.batches[0]} == {"a", "b"}


def test_an_idle_scheduler_rests_except_in_the_middle_of_a_swap() -> None:
    ranks, rests = Ranks(FakeWeights(), busy=False), list[bool]()
    (rest,) = [hook.around for hook in ranks.exchanges[0].hooks if hook.target == REST]
    rest(lambda sleeper: rests.append(True), None)
    assert rests == [True]
    ranks.exchanges[0]._orders.append(Order())
    rest(lambda sleeper: rests.append(True), None)
    assert rests == [True]


def test_requests_pass_beside_the_orders() -> None:
    ranks = Ranks(FakeWeights(), FakeWeights())
    ranks.incoming = [("request", 1)]
    with ranks.turning() as exchange:
        exchange.swap(B)
    assert set(ranks.requests[1]) == {("request", 1)}
    assert ranks.requests[0] == ranks.requests[1]


@pytest.mark.parametrize("failing", [0, 1])
def test_one_rank_that_rejects_keeps_all_as_they_were(failing: int) -> None:
    weights = [FakeWeights(), FakeWeights()]
    weights[failing].faults["reject"] = "tensor fc.weight: NaN or infinity"
    ranks = Ranks(*weights)
    with ranks.turning() as exchange:
        with pytest.raises(DrafterRejected, match=r"fc\.weight: NaN"):
            exchange.swap(B)
        weights[failing].faults.clear()
        assert exchange.swap(B).version == "b", "and the next one is taken"
    assert ("a", "b") not in ranks.batches[0]


@pytest.mark.parametrize("step", ["apply", "confirm"])
@pytest.mark.parametrize("failing", [0, 1])
def test_one_rank_that_fails_brings_all_back(step: str, failing: int) -> None:
    weights = [FakeWeights(), FakeWeights()]
    weights[failing].faults[step] = SwapFailed("parameter fc.weight does not hold what was copied into it")
    ranks = Ranks(*weights)
    with ranks.turning() as exchange:
        with pytest.raises(SwapFailed, match=r"fc\.weight does not hold"):
            exchange.swap(B)
        assert [one.version for one in ranks.draftings] == ["a", "a"]
        assert [one.copied for one in weights] == ["a", "a"]
        weights[failing].faults.clear()
        assert exchange.swap(B).previous == "a"
    assert ranks.batches[0] == ranks.batches[1]


def test_a_rank_that_has_nothing_to_swap_is_a_failed_swap_for_all() -> None:
    ranks = Ranks(FakeWeights(), FakeWeights())
    ranks.exchanges[1]._weights = None
    ranks.exchanges[1].feature.switch_off("parameter model.fc.weight is of type torch.int8")
    with ranks.turning() as exchange, pytest.raises(SwapFailed, match=r"torch\.int8"):
        exchange.swap(B)
    assert {stamped for stamped, _ in ranks.batches[0]} == {"a"}


def test_an_exception_that_nobody_foresaw_is_a_failed_swap() -> None:
    ranks = Ranks(FakeWeights(stage=ZeroDivisionError("so much for that")))
    with ranks.turning() as exchange, pytest.raises(SwapFailed, match="ZeroDivisionError: so much for that"):
        exchange.swap(B)


def test_a_drafter_that_cannot_be_put_back_ends_swapping_not_serving() -> None:
    faults: dict[str, Any] = {"confirm": SwapFailed("wrong bytes"), "restore": RuntimeError("device lost")}
    ranks = Ranks(FakeWeights(**faults))
    with ranks.turning() as exchange:
        with pytest.raises(SwapFailed, match="wrong bytes"):
            exchange.swap(B)
        with pytest.raises(SwapFailed, match=r"does not swap: .*could not be put back"):
            exchange.swap(B)
        before = len(ranks.batches[0])
        while len(ranks.batches[0]) < before + 3:
            pass


def test_two_processes_agree_over_gloo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.serving.sglang.rank_process"]
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root / ".typing"), str(root)])
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            env=os.environ | {"PYTHONPATH": path},
            cwd=root,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        outputs = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert outputs[0]["answers"] == ["b", "DrafterRejected: no good", "d"]
    assert [output["held"] for output in outputs] == ["d", "d"]
    assert outputs[0]["batches"] == outputs[1]["batches"], "batch by batch the ranks drafted alike"
    assert [stamped for stamped, copied in outputs[0]["batches"] if stamped != copied] == []


def test_one_swap_at_a_time() -> None:
    with Ranks(FakeWeights(stage_s=0.3)).turning() as exchange:
        first = threading.Thread(target=exchange.swap, args=(B,))
        first.start()
        while exchange._answer is None:
            pass
        with pytest.raises(SwapFailed, match="under way"):
            exchange.swap(B)
        first.join()


def test_no_swap_before_the_engine_is_there_nor_where_a_hook_is_missing() -> None:
    exchange = Exchange(Drafting())
    with pytest.raises(SwapFailed, match="starting"):
        exchange.swap(B)
    exchange.transport.switch_off("SGLang 9.9 has no recv_requests any more")
    with pytest.raises(SwapFailed, match=r"SGLang 9\.9"):
        exchange.swap(B)
