"""A relay's end of the line, in the test: what a server under test sends arrives here."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

import zmq
from livedraft.contracts.messages import Trace
from livedraft.traces.codec import decode
from livedraft.traces.validation import validate


class Relay:
    """Collects traces by request, each held against what a consumer may rely on.

    >>> relay = Relay()
    >>> with serving(folder, ..., environment={"LIVEDRAFT_TRACES__URL": relay.url}): ...
    >>> relay.take(["a", "b"])
    """

    def __init__(self, url: str = "") -> None:
        """Where another was, at ``url``."""
        self._context = zmq.Context()
        socket = self._context.socket(zmq.PULL)
        if url:
            socket.bind(url.removeprefix("relay+"))
        self.url = url or f"relay+tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._traces: dict[str, Trace] = {}
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(socket,), daemon=True)
        self._thread.start()

    def take(self, requests: Collection[str], *, timeout: float = 60.0) -> list[Trace]:
        """Traces of ``requests``, in their order, as soon as all are there."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while missing := [request for request in requests if request not in self._traces]:
                if self._problem is not None:
                    raise self._problem
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError(f"no trace of {missing} within {timeout:.0f} s")
                self._changed.wait(left)
            return [self._traces[request] for request in requests]

    def has(self, request: str) -> bool:
        """Whether a trace of ``request`` has come."""
        with self._changed:
            return request in self._traces

    def close(self) -> None:
        """Be gone."""
        self._closing.set()
        self._thread.join()
        self._context.term()

    def _run(self, socket: zmq.Socket[bytes]) -> None:
        while not self._closing.is_set():
            if not socket.poll(100):
                continue
            try:
                trace = decode(socket.recv())
                validate(trace)
            except Exception as error:
                self._problem = error
                raise
            with self._changed:
                assert trace.request_id not in self._traces, "sent twice"
                self._traces[trace.request_id] = trace
                self._changed.notify_all()
        socket.close(linger=0)
