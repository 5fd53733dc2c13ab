"""How a process is told to stop: one event, set by SIGTERM or SIGINT."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; the handlers of before come back afterwards.

    The handlers only write to a pipe: an Event must not be set from a handler, which may have interrupted the very
    code that holds the Event's lock, and would then wait for itself.  Call from the main thread.
    """
    stop = threading.Event()
    reading, writing = os.pipe()

    def listen() -> None:
        if os.read(reading, 1) == b"s":
            stop.set()

    listener = threading.Thread(target=listen, name="stopping", daemon=True)
    listener.start()
    before = {s: signal.signal(s, lambda *_: os.write(writing, b"s")) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)  # ends a listener that still listens
        listener.join()
        os.close(reading)
