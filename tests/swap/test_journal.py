from __future__ import annotations

import tempfile
import threading
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.messages import Decision, SwapRequest
from livedraft.swap.journal import Exchange, Journal
from msgspec.structs import replace

REJECT = Decision(action="reject", reason="worse", candidate="2", live="1", at=1.0)
PROMOTE = Decision(
    action="promote",
    reason="better",
    candidate="3",
    live="1",
    evidence={"predicted_accept_length": 3.0, "previous_accept_length": 2.0, "tokens_at_swap": 9, "rounds_at_swap": 4},
    at=2.0,
)
KEEP = Decision(action="keep", reason="as predicted", candidate="3", live="1", at=3.0)


def test_decisions_outlive_the_process_in_order(tmp_path: Path) -> None:
    for decision in (REJECT, PROMOTE, KEEP):
        Journal(tmp_path).append(decision)
    assert Journal(tmp_path).decisions() == [REJECT, PROMOTE, KEEP]


def test_one_process_sees_what_another_wrote(tmp_path: Path) -> None:
    ours, theirs = Journal(tmp_path), Journal(tmp_path)
    ours.append(REJECT)
    assert theirs.decisions() == [REJECT]
    theirs.append(PROMOTE)
    assert ours.decisions() == [REJECT, PROMOTE]


def test_a_decision_is_written_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(PROMOTE)
    journal.append(replace(PROMOTE, evidence=PROMOTE.evidence | {"stall_s": 0.1}))
    assert journal.decisions() == [PROMOTE]


@given(cut=st.integers(1, 60))
def test_a_torn_line_is_a_decision_never_made(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder))
        journal.append(REJECT)
        journal.append(KEEP)
        path = Path(folder) / "decisions.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        assert Journal(Path(folder)).decisions() == [REJECT]
        journal = Journal(Path(folder))
        journal.append(PROMOTE)
        assert Journal(Path(folder)).decisions() == [REJECT, PROMOTE]


def test_delivery_is_remembered(tmp_path: Path) -> None:
    for decision in (REJECT, PROMOTE, KEEP):
        Journal(tmp_path).append(decision)
    Journal(tmp_path).mark_delivered()
    assert Journal(tmp_path).undelivered() == [PROMOTE, KEEP]


def test_an_exchange_is_remembered_until_it_ends(tmp_path: Path) -> None:
    exchange = Exchange(request=SwapRequest(path="/x", version="3", checksum="c"), decision=PROMOTE)
    Journal(tmp_path).begin(exchange)
    assert Journal(tmp_path).exchange == exchange
    Journal(tmp_path).end()
    assert Journal(tmp_path).exchange is None
    Journal(tmp_path).end()


def test_a_promotion_is_watched_until_it_is_kept_or_rolled_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.watch is None
    journal.append(PROMOTE)
    journal.append(REJECT)
    watch = journal.watch
    assert watch is not None
    assert (watch.candidate, watch.live, watch.predicted, watch.previous) == ("3", "1", 3.0, 2.0)
    assert (watch.tokens, watch.rounds, watch.started_at) == (9, 4, 2.0)
    journal.append(KEEP)
    assert journal.watch is None


def test_a_promotion_by_hand_is_not_watched(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(PROMOTE)
    journal.append(Decision(action="promote", reason="by hand", candidate="1", live="3", at=4.0))
    assert journal.watch is None


def test_the_predecessor_is_who_was_replaced_last(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(PROMOTE)
    journal.append(replace(PROMOTE, live="7", at=9.0))
    assert journal.predecessor("3") == "7"
    assert journal.predecessor("1") is None
    assert journal.judged("3")
    assert not journal.judged("7")


def test_only_one_acts_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with Journal(tmp_path).alone():
            inside.set()
            leave.wait(10)
            order.append("first")

    def second() -> None:
        with Journal(tmp_path).alone():
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert order == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]
