"""What an engine's status tells of its traffic."""

from __future__ import annotations

#: Strata counted apart for each drafter: clients choose the domains' names.
_STRATA = 64


class Tally:
    """Counts committed tokens and verify rounds of every request, traced or not.

    Written by the scheduler's thread, read from any: readers get copies.
    """

    def __init__(self) -> None:
        self.output_tokens = 0
        self.rounds = 0
        self._strata: dict[str, dict[str, tuple[int, int]]] = {}

    def prefilled(self) -> None:
        """A prefill committed its token: no round, as in the embedded engine."""
        self.output_tokens += 1

    def verified(self, committed: int) -> None:
        """A verify round committed tokens, its bonus included."""
        self.output_tokens += committed
        self.rounds += 1

    def drafted_fully(self, version: str, domain: str, kind: str, committed: int) -> None:
        """The round was one of full depth: what a replay at that depth predicts."""
        strata = self._strata.setdefault(version, {})
        stratum = f"{domain}/{kind}"
        if stratum not in strata and len(strata) >= _STRATA:
            stratum = f"others/{kind}"
        tokens, rounds = strata.get(stratum, (0, 0))
        strata[stratum] = (tokens + committed, rounds + 1)

    @property
    def by_stratum(self) -> dict[str, dict[str, tuple[int, int]]]:
        """(committed tokens, rounds) by drafter version and "domain/greedy" or "domain/sampled"."""
        return {version: dict(strata) for version, strata in [*self._strata.items()]}

    @property
    def by_drafter(self) -> dict[str, tuple[int, int]]:
        """The same by drafter version."""
        return {version: _total(strata) for version, strata in [*self._strata.items()]}


def _total(strata: dict[str, tuple[int, int]]) -> tuple[int, int]:
    counts = [*strata.values()]
    return sum(tokens for tokens, _ in counts), sum(rounds for _, rounds in counts)
