"""How many tokens to draft: as many as pay, none when none does.

Goodput of depth k over a batch: sum_b (1 + sum_{i<=k} prod_{j<=i} a_bj) / (verify(k + 1 rows) + draft(k)), with
acceptance and both costs measured as the engine runs (Liu et al. 2024, arXiv 2406.14066, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

#: Weight of the newest observation.
_RATE = 0.05
#: Costs fall fast and rise slowly: an average would take a busy moment of the machine for the price of a depth that is
#: seldom tried, and so never try it again.
_CHEAPER_RATE, _DEARER_RATE = 0.3, 0.03
#: A round in this many drafts to the full, to see what deeper drafts are worth now.  While drafting does not pay at
#: all the pause doubles up to the second number: looking must not make serving slower than never speculating.
_LOOK_EVERY, _LOOK_SELDOM = 24, 96
#: Rounds at the start and after a swap that draft to the full, to learn what the drafter is worth.
_LEARN_ROUNDS = 48
#: After a swap every other round goes on to draft to the full until requests have had so many such rounds together: a
#: watch then has what it asks for also where drafting does not pay yet.  Spread out, because rounds of one request are
#: alike: twice as many requests say more than twice as many rounds of the few that run at the swap.
_WATCHED_ROUNDS = 1000
#: Times that a cost must have been measured to be told.
_OFTEN = 32


class DepthControl:
    """Chooses the draft depth of each round.  Owned by the engine's thread.

    >>> control = DepthControl(limit=4, adaptive=True)
    >>> depth = control.choose(["greedy"])          # then draft, verify and time both
    >>> control.costs(batch=1, depth=depth, draft_s=0.001, verify_s=0.003)
    >>> control.outcome("greedy", proposed=depth, accepted=2)

    ``kind`` is a class of requests whose acceptance is alike ("greedy", "sampled").
    """

    def __init__(self, limit: int, adaptive: bool) -> None:
        self.limit = limit
        self.adaptive = adaptive
        self._learn = _LEARN_ROUNDS
        self._watched = 0
        self._pause = self._until_look = _LOOK_EVERY
        self._acceptance: dict[str, list[float]] = {}
        self._verify: dict[tuple[int, int], float] = {}
        self._draft: dict[tuple[int, int], float] = {}
        self._measured: dict[tuple[int, int], int] = {}

    def swapped(self) -> None:
        """A new drafter is in: look again at what every depth is worth, and show it to whoever watches."""
        self._learn = _LEARN_ROUNDS
        self._watched = _WATCHED_ROUNDS
        self._pause, self._until_look = _LOOK_EVERY, 1

    def choose(self, kinds: Sequence[str]) -> int:
        """Depth for a round of requests of these kinds."""
        if not self.adaptive or self.limit == 0 or not kinds:
            return self.limit
        depth = self._next(kinds)
        if depth == self.limit:
            self._watched -= len(kinds)
        return depth

    def _next(self, kinds: Sequence[str]) -> int:
        if self._learn > 0:
            self._learn -= 1
            return self.limit
        best = max(range(self.limit + 1), key=lambda k: self._goodput(k, kinds))
        self._until_look -= 1
        if self._until_look > 0:
            return best
        if self._watched > 0:
            self._until_look = 2
            return self.limit
        self._pause = min(2 * self._pause, _LOOK_SELDOM) if best == 0 else _LOOK_EVERY
        self._until_look = self._pause
        return self.limit

    def costs(self, batch: int, depth: int, draft_s: float, verify_s: float) -> None:
        """Seconds that drafting ``depth`` tokens and verifying ``depth + 1`` rows took."""
        self._measured[batch, depth] = self._measured.get((batch, depth), 0) + 1
        for table, seconds in ((self._draft, draft_s), (self._verify, verify_s)):
            before = table.get((batch, depth))
            if before is None:
                table[batch, depth] = seconds
                continue
            rate = _CHEAPER_RATE if seconds < before else _DEARER_RATE
            # A pause of the machine is not a cost: one outlier counts as at most a factor.
            table[batch, depth] = before + rate * (min(seconds, 3 * before) - before)

    def measured(self) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds of a target pass by rows per request, and of drafting by depth, at the batch size served most.

        Of batch sizes that both speculated and did not, if there are any; a cost that was measured seldom is not told,
        for it may be that of a busy moment.  Other threads may ask.
        """
        times = dict([*self._measured.items()])
        verify, draft = dict([*self._verify.items()]), dict([*self._draft.items()])
        known: dict[int, dict[int, int]] = {}
        for (batch, depth), count in times.items():
            if count >= _OFTEN:
                known.setdefault(batch, {})[depth] = count
        if not known:
            return {}, {}
        most = max(known, key=lambda b: (0 in known[b] and len(known[b]) > 1, sum(known[b].values())))
        passes = {depth + 1: verify[most, depth] for depth in known[most]}
        return passes, {depth: draft[most, depth] for depth in known[most] if depth}

    def outcome(self, kind: str, proposed: int, accepted: int) -> None:
        """A round of one request: ``accepted`` of ``proposed`` draft tokens stood."""
        rates = self._acceptance.setdefault(kind, [0.5] * max(1, self.limit))
        for level in range(min(proposed, accepted + 1)):
            rates[level] += _RATE * ((1.0 if level < accepted else 0.0) - rates[level])

    def expected(self, kind: str, depth: int) -> float:
        """Expected accept length of a round of this kind, bonus included."""
        rates = self._acceptance.get(kind, [0.5] * max(1, self.limit))
        total, reach = 1.0, 1.0
        for level in range(depth):
            reach *= rates[level]
            total += reach
        return total

    def _goodput(self, depth: int, kinds: Sequence[str]) -> float:
        batch = len(kinds)
        cost = self._cost(self._verify, batch, depth) + (self._cost(self._draft, batch, depth) if depth else 0.0)
        return sum(self.expected(kind, depth) for kind in kinds) / max(cost, 1e-9)

    def _cost(self, table: dict[tuple[int, int], float], batch: int, depth: int) -> float:
        """Measured, else a straight line through the nearest measured depths, else proportional to them."""
        if (batch, depth) in table:
            return table[batch, depth]
        known = sorted((d, s) for (b, d), s in table.items() if b == batch)
        if not known:
            return 1.0 + 0.1 * depth
        below = [x for x in known if x[0] < depth]
        above = [x for x in known if x[0] > depth]
        if below and above:
            (d0, s0), (d1, s1) = below[-1], above[0]
            return s0 + (s1 - s0) * (depth - d0) / (d1 - d0)
        near, seconds = below[-1] if below else above[0]
        return seconds * (depth + 4) / (near + 4)
