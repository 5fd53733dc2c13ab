"""Live traffic for the demo: a few clients of the HTTP endpoint, each with one request at a time."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

TEMPERATURES = (0.0, 0.7)
CLIENTS = 4
#: Requests a second of all clients at most.  A service runs below what it could take; here the rest is the trainer's.
RATE = 4.0
TOKENS = 96


@dataclass(frozen=True, slots=True)
class Served:
    """One answered request."""

    prompt: str
    text: str
    domain: str
    temperature: float
    tokens: int
    rounds: int
    version: str
    #: Unix seconds.
    started: float
    ended: float
    #: Unix seconds at which each chunk arrived.
    arrivals: tuple[float, ...]


class Traffic:
    """Sends prompts in turn, temperatures alternating, until closed; answers are appended to ``served``."""

    def __init__(self, url: str, domain: str, prompts: Sequence[str], served: list[Served]) -> None:
        self._url, self._domain, self._served = url, domain, served
        self._work = enumerate(itertools.cycle(prompts))
        self._lock = threading.Lock()
        #: When the next request may go (``time.monotonic``).
        self._next = 0.0
        self._stop = threading.Event()
        self.failure = ""
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60, headers={"X-Livedraft-Domain": self._domain}) as client:
            model = client.get("/v1/models").json()["data"][0]["id"]
            while not self._stop.is_set():
                with self._lock:
                    number, prompt = next(self._work)
                    at = max(self._next, time.monotonic())
                    self._next = at + 1 / RATE
                if self._stop.wait(at - time.monotonic()):
                    return
                try:
                    self._served.append(self._ask(client, model, prompt, TEMPERATURES[number % 2]))
                except (httpx.HTTPError, LookupError, ValueError) as error:
                    self.failure = f"{type(error).__name__}: {error}"
                    return

    def _ask(self, client: httpx.Client, model: str, prompt: str, temperature: float) -> Served:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": TOKENS,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        started, text = time.time(), ""
        arrivals: list[float] = []
        usage: dict[str, Any] = {}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"HTTP {response.status_code}: {response.read().decode(errors='replace')}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                arrivals.append(time.time())
                event = json.loads(line[6:])
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                usage = event.get("usage") or usage
        extra = usage["livedraft"]
        return Served(
            prompt=prompt,
            text=text,
            domain=self._domain,
            temperature=temperature,
            tokens=usage["completion_tokens"],
            rounds=extra["verify_rounds"],
            version=extra["drafter_version"],
            started=started,
            ended=time.time(),
            arrivals=tuple(arrivals),
        )
