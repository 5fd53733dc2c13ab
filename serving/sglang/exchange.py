"""The exchange of drafters on every rank of an engine at the same turn of its loop.

The leading rank's orders ride SGLang's own broadcast of requests, so every rank reads them at the same place of the
same turn, and what they answer is gathered there.  All of them then draw the same conclusion:

    stage     each rank proves the checkpoint and lays it out, on a thread of its own
    ask       all laid out?  then the next batch, or the next turn where none comes, begins with copying it in
    ask       all hold, byte for byte, what they should?  then it is done; else each copies the previous one back

No batch is drained and no cache flushed: keys of the older drafter cost acceptance for a few tokens, never
correctness.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from livedraft.contracts.errors import DrafterRejected, LivedraftError, SwapFailed
from livedraft.contracts.messages import SwapReceipt, SwapRequest
from livedraft.serving.sglang.identity import Drafting
from livedraft.serving.sglang.surface import BROADCAST, REST, ROUND, Feature, Hook

log = logging.getLogger(__name__)

#: OS niceness of the threads that read, lay out and compare: the batches go first.
_NICE = 10
#: Seconds that an idle scheduler rests in the middle of a swap, leaving the core to whoever stages.
_REST_S = 0.001
#: Seconds until a rank that was not ready is asked again.
_ASK_AGAIN_S = 0.02
#: Seconds that whoever asked for a swap waits for the loop; a checkpoint is read from a slow disk in less.
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Order:
    """What rides the broadcast: stage ``request`` or, without one, tell how far you are."""

    request: SwapRequest | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rank's part of a step ended; an empty ``failure`` is success."""

    failure: str = ""
    rejected: bool = False
    stall_s: float = 0.0

    @property
    def error(self) -> LivedraftError:
        """The failure as it was raised there."""
        return DrafterRejected(self.failure) if self.rejected else SwapFailed(self.failure)


class Staged(Protocol):
    """A checkpoint ready to be copied in."""

    @property
    def version(self) -> str:
        """As requested."""

    @property
    def checksum(self) -> str:
        """Of the checkpoint's tensors."""


class Weights(Protocol):
    """One rank's share of the drafter."""

    def stage(self, request: SwapRequest) -> Staged:
        """Prove and lay out, touching nothing.  Raises DrafterRejected or SwapFailed."""

    def settle(self) -> None:
        """Wait for the last batch to leave the device: the copy will not be ordered behind it."""

    def apply(self, staged: Any) -> None:
        """Copy in what ``stage`` returned, on the scheduler's thread."""

    def confirm(self) -> float:
        """Seconds that copying took, once the engine holds what was copied last.  Raises SwapFailed."""

    def restore(self) -> None:
        """Copy the previous one back, on the scheduler's thread."""

    def keep(self) -> None:
        """What was copied in stays; what it replaced is the previous one now."""


#: Hands every rank the values of all, in the order of ranks; a collective.
Gather = Callable[[Outcome | None], Sequence[Outcome | None]]


class Exchange:
    """Thread-safe ``swap`` on the leading rank; the rest runs on the scheduler's thread, by its hooks.

    Its hooks are set before the scheduler exists; then it has to ``join`` the other ranks and ``connect`` weights.
    """

    def __init__(self, drafting: Drafting) -> None:
        self.feature = Feature("swap")
        #: Of the hooks, which catch their own exceptions: a rank that failed must still take the orders out of the
        #: requests and still answer, or the others would wait for it.
        self.transport = Feature("the hooks of swap")
        self.hooks = [
            Hook(BROADCAST, self._around_broadcast, ("recv_reqs",), self.transport),
            Hook(ROUND, self._around_round, ("batch",), self.transport),
            Hook(REST, self._around_rest, (), self.transport, needed=False),
        ]
        self._drafting = drafting
        self._weights: Weights | None = None
        self._gather: Gather = lambda outcome: [outcome]
        self._orders = deque[Order]()
        self._asked = threading.Lock()
        self._answer: Future[SwapReceipt] | None = None
        self._step: Literal["stage", "confirm", "restore"] | None = None
        self._work: Future[Any] | None = None
        #: To be copied in (None: the previous one) by the next batch; of an earlier turn when ``_waited``.
        self._armed: tuple[Staged | None] | None = None
        self._waited = False
        self._staged: Staged | None = None
        self._previous = ""
        self._applied_at = 0.0
        self._failure: LivedraftError | None = None

    def join(self, gather: Gather) -> None:
        """Agree with the ranks that ``gather`` reaches; also where nothing can be swapped, since they wait for all."""
        self._gather = gather

    def connect(self, weights: Weights) -> None:
        """Swap these."""
        self._weights = weights

    # ---- the leading rank's other threads

    def swap(self, request: SwapRequest) -> SwapReceipt:
        """As ``ports.Engine.swap``."""
        for feature in (self.transport, self.feature):
            if feature.reason is not None:
                raise SwapFailed(f"this engine does not swap: {feature.reason}")
        if self._weights is None:
            raise SwapFailed("this engine is starting")
        with self._asked:
            if self._answer is not None and not self._answer.done():
                raise SwapFailed("another swap is under way")
            answer = self._answer = Future[SwapReceipt]()
            self._orders.append(Order(request))
        try:
            return answer.result(_PATIENCE_S)
        except TimeoutError as error:
            raise SwapFailed("the scheduler has not answered; its status tells what it holds") from error

    # ---- the scheduler's thread

    def _around_broadcast(
        self, original: Callable[..., Any], receiver: Any, recv_reqs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._orders and recv_reqs is not None:
            recv_reqs = [*recv_reqs, self._orders.popleft()]
        received = original(receiver, recv_reqs, *args, **kwargs)
        orders = [one for one in received or () if isinstance(one, Order)]
        if orders:
            received = [one for one in received if not isinstance(one, Order)]
        elif self._armed is None:
            return received
        try:
            self._turn(orders)
        except Exception as error:  # SGLang must get its requests without our orders whatever happened here
            self._give_up(error)
        return received

    def _around_round(self, original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._armed is not None:
            try:
                self._write()
            except Exception as error:
                self._give_up(error)
        return original(worker, batch, *args, **kwargs)

    def _around_rest(self, original: Callable[..., Any], sleeper: Any, *args: Any, **kwargs: Any) -> Any:
        """No rest in the middle of a swap, each step of which is a turn of the loop."""
        if not self._orders and self._step is None:
            return original(sleeper, *args, **kwargs)
        time.sleep(_REST_S)
        return None

    def _turn(self, orders: Sequence[Order]) -> None:
        if self._armed is not None and self._waited:  # a whole turn without a batch: nothing new runs
            self._served.settle()
            self._write()
        self._waited = self._armed is not None
        for order in orders:
            if order.request is not None:
                self._begin("stage", partial(self._stage, order.request))
            else:
                self._conclude()

    @property
    def _served(self) -> Weights:
        assert self._weights is not None, "a rank without weights fails at staging"
        return self._weights

    def _stage(self, request: SwapRequest) -> Staged:
        return self._served.stage(request)

    def _begin(self, step: Literal["stage", "confirm", "restore"], work: Callable[[], Any]) -> None:
        """Do ``work`` on a thread; the leading rank asks everybody once its own is done."""
        self._step, self._work = step, Future()
        threading.Thread(target=self._do, args=(work, self._work), name=f"swap-{step}", daemon=True).start()

    def _do(self, work: Callable[[], Any], future: Future[Any]) -> None:
        if sys.platform == "linux":  # elsewhere it is the whole process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        self._ask()

    def _ask(self) -> None:
        if self._answer is not None:  # only the leading rank has one
            self._orders.append(Order())

    def _conclude(self) -> None:
        """Hear every rank's outcome of this step, and take the next."""
        if self._step is None:
            return
        outcomes = self._gather(self._outcome())
        known = [outcome for outcome in outcomes if outcome is not None]
        if len(known) < len(outcomes):
            if self._answer is not None:
                again = threading.Timer(_ASK_AGAIN_S, self._ask)
                again.daemon = True
                again.start()
            return
        failed = next((outcome for outcome in known if outcome.failure), None)
        error = failed.error if failed else None
        if self._step == "stage" and error is None:
            assert self._work is not None
            self._armed = (self._work.result(),)
        elif self._step == "stage":
            self._finish(error)
        elif self._step == "confirm" and error is None:
            self._served.keep()
            self._finish(None, max(outcome.stall_s for outcome in known))
        elif self._step == "confirm":
            self._failure, self._armed = error, (None,)
        elif self._step == "restore":
            if error is not None:
                self.feature.switch_off(f"after a failed swap the previous drafter could not be put back: {error}")
            self._finish(self._failure or error)

    def _outcome(self) -> Outcome | None:
        """This rank's; None while it works on it."""
        if self.feature.reason is not None:
            return Outcome(failure=self.feature.reason)
        if self._armed is not None or self._work is None or not self._work.done():
            return None
        error = self._work.exception()
        if error is None:
            return Outcome(stall_s=self._work.result() if self._step == "confirm" else 0.0)
        if not isinstance(error, LivedraftError):
            log.error("a swap failed", exc_info=error)
        known = str(error) if isinstance(error, LivedraftError) else f"{type(error).__name__}: {error}"
        return Outcome(failure=known, rejected=isinstance(error, DrafterRejected))

    def _write(self) -> None:
        """Copy what is armed in: nothing of an older batch reads the weights after this, and no newer one before."""
        assert self._armed is not None
        (staged,), self._armed = self._armed, None
        try:
            if staged is None:
                self._served.restore()
                self._drafting.version = self._previous
            else:
                self._previous, self._drafting.version = self._drafting.version, staged.version
                self._served.apply(staged)
        except Exception as error:
            self._begin("restore" if staged is None else "confirm", partial(_raise, error))
            return
        self._staged, self._applied_at = staged, time.time()
        self._begin("restore" if staged is None else "confirm", self._served.confirm)

    def _finish(self, error: LivedraftError | None, stall_s: float = 0.0) -> None:
        """Answer whoever asked, on the leading rank."""
        self._step = self._work = self._failure = None
        if self._answer is None or self._answer.done():
            return
        if error is not None:
            self._answer.set_exception(error)
            return
        assert self._staged is not None
        self._answer.set_result(
            SwapReceipt(
                version=self._staged.version,
                checksum=self._staged.checksum,
                previous=self._previous,
                applied_at=self._applied_at,
                stall_s=stall_s,
            )
        )

    def _give_up(self, error: Exception) -> None:
        self.feature.failed(error)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(SwapFailed(f"{type(error).__name__}: {error}"))


def _raise(error: Exception) -> None:
    raise error
