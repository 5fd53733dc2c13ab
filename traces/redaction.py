"""What must not reach the wire.  Tokens and features are aligned and features cannot be masked, so a trace with
something private in it is dropped whole, and counted.

Patterns find the common shapes of secrets, not all private data: tenants that cannot risk any should opt out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from livedraft.contracts.messages import Trace
from livedraft.traces.arrays import to_numpy

_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?!\d)")

#: Name -> pattern.  Cards are found apart, by their check digit.
SECRETS: Mapping[str, re.Pattern[str]] = {
    "email": re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}"),
    "api key": re.compile(
        r"\b(?:sk|pk|rk)[-_](?:[a-z]+[-_])*[A-Za-z0-9]{16,}"  # OpenAI, Stripe and their likes
        r"|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{22,}"
        r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
        r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"
        r"|\bhf_[A-Za-z0-9]{30,}"
        r"|\bAIza[\w-]{35}"
        r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"  # JSON web tokens
    ),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


class Redactor(Protocol):
    """Decides, before a trace is written, whether it may be."""

    def finds(self, trace: Trace) -> str | None:
        """Name of what is private in a trace, or None when it may go on the wire."""


class NoRedaction:
    """Lets everything pass."""

    def finds(self, trace: Trace) -> str | None:
        """None."""
        return None


class PatternRedaction:
    """Looks for patterns in the text of prompt and output together, so that none hides across the border.

    ``decode`` turns token ids into text; it runs on the sink's thread.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], patterns: Mapping[str, re.Pattern[str]] = SECRETS
    ) -> None:
        self._decode = decode
        self._patterns = patterns

    def finds(self, trace: Trace) -> str | None:
        """Name of the first pattern that matches, or "card number"."""
        return find_secret(
            self._decode([*to_numpy(trace.prompt).tolist(), *to_numpy(trace.output).tolist()]), self._patterns
        )


def find_secret(text: str, patterns: Mapping[str, re.Pattern[str]] = SECRETS) -> str | None:
    """Name of the first pattern found in ``text``, "card number" for a payment card's, or None."""
    for name, pattern in patterns.items():
        if pattern.search(text):
            return name
    return "card number" if any(_passes_luhn(match.group()) for match in _CARD.finditer(text)) else None


def _passes_luhn(number: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1, annex B)."""
    digits = [int(character) for character in number if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
