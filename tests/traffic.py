"""Requests from a few clients while something else is looked at."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import httpx
from livedraft.cli.prompts import held_out_prompts


@contextlib.contextmanager
def traffic(
    ask: Callable[[str, int], object], clients: int = 2, prompts: Sequence[str] | None = None
) -> Iterator[None]:
    """Call ``ask(prompt, turn)`` in ``clients`` threads until the block ends; any failed request fails the test.

    ``prompts`` are all prose by default.
    """
    stop, failures = threading.Event(), list[Exception]()
    prompts = prompts or held_out_prompts("prose")

    def run(number: int) -> None:
        while not stop.is_set():
            try:
                ask(prompts[number % len(prompts)], number // clients)
            except (httpx.HTTPError, ValueError) as error:
                failures.append(error)
                return
            number += clients

    threads = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
