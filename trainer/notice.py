"""What all ranks of a trainer know of a delivery that one of them has."""

from __future__ import annotations

from livedraft.contracts.messages import Record, Trace


class Notice(Record, frozen=True, kw_only=True):
    """A trace without its contents, in their place on the ranks that do not hold it."""

    trace_id: str = ""
    request_id: str = ""
    domain: str = ""
    drafters: tuple[str, ...] = ()
    #: Tokens of the prompt, and in all.
    prompt: int = 0
    length: int = 0
    #: Why it teaches nothing; "": it does.
    fault: str = ""


def notice_of(trace: Trace, fault: str = "") -> Notice:
    """What to tell the others of ``trace``."""
    prompt = trace.prompt.shape[0]
    return Notice(
        trace_id=trace.trace_id,
        request_id=trace.request_id,
        domain=trace.domain,
        drafters=trace.drafters,
        prompt=prompt,
        length=prompt + trace.output.shape[0],
        fault=fault,
    )
