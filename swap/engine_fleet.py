"""Several engines behind one gateway, swapped as one, one after the other.

Between two turns of the controller all that answer draft with the same checkpoint.  The truth is what most of them
draft with: one that was away, or started again with another drafter, is given what the others have.  Where engines
start again with a drafter of their own, the truth is what was intended (see ``intended``), also for one alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import EngineStatus, SwapReceipt, SwapRequest
from livedraft.contracts.ports import EngineAdmin
from msgspec.structs import replace

log = logging.getLogger(__name__)


class EngineFleet:
    """``ports.EngineAdmin`` over several.  ``folder_of`` tells where a version's checkpoint lies, if it is there.

    Without ``folder_of`` nobody is brought into line: a mere look changes nothing.

    One that did not answer when last asked is left out; only when none does is that a failure.  A swap that no more
    than half of them took has failed, and those that took it are brought back.

    ``intended`` tells what they are to draft with, where that is not theirs to say.  What all of them reject they
    cannot have: then again they are the truth.
    """

    def __init__(
        self,
        engines: Sequence[EngineAdmin],
        folder_of: Callable[[str], Path] | None = None,
        intended: Callable[[], SwapRequest | None] = lambda: None,
    ) -> None:
        self._engines = engines
        self._folder_of = folder_of
        self._intended = intended
        #: Of the last swap that was taken, or the last time all agreed: it decides where engines are split in halves.
        self._agreed = ""
        #: Who answered last.
        self._there: Sequence[EngineAdmin] = engines

    def status(self) -> EngineStatus:
        """As ``ports.EngineAdmin``, counters summed over the engines that agree; brings the others into line."""
        answers, failures = self._ask(range(len(self._engines)))
        if not answers:
            raise failures[0]
        if len({(s.target, s.target_revision, s.tokenizer_hash) for s in answers.values()}) > 1:
            raise SwapFailed("engine.url names engines of different targets; a drafter belongs to one")
        if (wanted := self._intended()) is not None:
            answers = self._bring(answers, wanted)
        self._there = [self._engines[number] for number in answers]
        votes = Counter(status.drafter_checksum for status in answers.values())
        checksum = wanted.checksum if wanted else ""
        if checksum not in votes:
            # Of equals, max takes the first: the engine that is named first.
            checksum = max(votes, key=lambda found: (votes[found], found == self._agreed))
        if len(votes) == 1:
            self._agreed = checksum
        agreeing = {n: status for n, status in answers.items() if status.drafter_checksum == checksum}
        whole = _summed(list(agreeing.values()))
        if wanted is None and self._folder_of is not None:
            self._align(answers.keys() - agreeing.keys(), whole, self._folder_of(whole.drafter))
        return whole

    def _ask(self, numbers: Iterable[int]) -> tuple[dict[int, EngineStatus], list[SwapFailed]]:
        answers, failures = {}, list[SwapFailed]()
        for number in numbers:
            try:
                answers[number] = self._engines[number].status()
            except SwapFailed as error:
                failures.append(error)
        return answers, failures

    def _bring(self, answers: dict[int, EngineStatus], wanted: SwapRequest) -> dict[int, EngineStatus]:
        """Give ``wanted`` to those without it, one after the other; what all say afterwards.

        Raises SwapFailed when none has it and not all of them reject it: the next look may find it taken.
        """
        behind = [
            number
            for number, status in answers.items()
            if (status.drafter_checksum, status.drafter) != (wanted.checksum, wanted.version)
        ]
        failures = list[SwapFailed]()
        for number in behind:
            had = answers[number].drafter
            try:
                self._engines[number].swap(wanted)
                log.info("brought an engine from %s to version %s", had or "none", wanted.version)
            except (DrafterRejected, SwapFailed) as error:
                log.warning("an engine drafts with %s and not with version %s: %s", had, wanted.version, error)
                failures += [error] if isinstance(error, SwapFailed) else []
        again, unanswered = self._ask(behind)
        now = {number: status for number, status in answers.items() if number not in behind} | again
        if not now:
            raise unanswered[0]
        if failures and not any(status.drafter_checksum == wanted.checksum for status in now.values()):
            raise failures[0]
        return now

    def swap(self, request: SwapRequest) -> SwapReceipt:
        """As ``ports.EngineAdmin``; the stall is the longest."""
        receipts, failures = list[SwapReceipt](), list[DrafterRejected | SwapFailed]()
        for engine in self._there:
            try:
                receipts.append(engine.swap(request))
            except (DrafterRejected, SwapFailed) as error:
                failures.append(error)
        if len(receipts) <= len(failures):
            raise failures[0]
        for failure in failures:
            log.warning("one engine has not taken version %s yet: %s", request.version, failure)
        self._agreed = receipts[0].checksum
        return replace(receipts[0], stall_s=max(receipt.stall_s for receipt in receipts))

    def _align(self, others: Iterable[int], whole: EngineStatus, folder: Path) -> None:
        for number in others:
            if not folder.is_dir():  # it comes with the next candidate
                log.warning("an engine drafts with another version than %s, which is not at hand", whole.drafter)
                continue
            request = SwapRequest(path=str(folder), version=whole.drafter, checksum=whole.drafter_checksum)
            try:
                self._engines[number].swap(request)
                log.info("brought an engine to version %s", whole.drafter)
            except (DrafterRejected, SwapFailed) as error:
                log.warning("an engine drafts with another version than %s: %s", whole.drafter, error)


def _summed(statuses: Sequence[EngineStatus]) -> EngineStatus:
    """One status of engines that agree; what is not counted is the first one's."""
    strata: dict[str, dict[str, tuple[int, int]]] = {}
    for version in {version for status in statuses for version in status.by_stratum}:
        strata[version] = _added(status.by_stratum.get(version, {}) for status in statuses)
    return replace(
        statuses[0],
        running=sum(status.running for status in statuses),
        waiting=sum(status.waiting for status in statuses),
        output_tokens=sum(status.output_tokens for status in statuses),
        rounds=sum(status.rounds for status in statuses),
        by_drafter=_added(status.by_drafter for status in statuses),
        by_stratum=strata,
        requests_by_drafter=dict(sum((Counter(status.requests_by_drafter) for status in statuses), Counter[str]())),
        traces_offered=sum(status.traces_offered for status in statuses),
        traces_dropped=sum(status.traces_dropped for status in statuses),
        capture=all(status.capture for status in statuses),
        disabled={part: why for status in statuses for part, why in status.disabled.items()},
    )


def _added(counters: Iterable[Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    total: dict[str, tuple[int, int]] = {}
    for counter in counters:
        for name, (tokens, rounds) in counter.items():
            before = total.get(name, (0, 0))
            total[name] = before[0] + tokens, before[1] + rounds
    return total
