"""The loop closes on one machine: real processes, real registry, real traffic, real kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from livedraft.cli.ports import free_port
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.settings_file import write_settings
from livedraft.contracts.settings import Engine, Gateway, Registry, Settings, Swap, Traces, Trainer, load
from livedraft.swap.mlflow_registry import MlflowRegistry

from tests.traffic import traffic


@dataclass
class Stack:
    """A running ``livedraft up``."""

    settings: Settings
    config: Path
    process: subprocess.Popen[bytes]
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.gateway.port}"

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/admin/status", timeout=10) as answer:
            return dict(json.load(answer))

    def child(self, name: str) -> int:
        """Process id of one of its children, found as an operator would."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().split(b"\0")
                if b"livedraft.cli.main" in line and name.encode() in line and str(self.config).encode() in line:
                    return int(entry.name)
        raise AssertionError(f"no process {name}")


def ask(url: str, prompt: str, temperature: float = 0.0) -> dict[str, Any]:
    body = {
        "model": "livedraft-tiny",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 48,
        "temperature": temperature,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    answer.raise_for_status()
    return dict(answer.json())


def driven(stack: Stack) -> contextlib.AbstractContextManager[None]:
    """Traffic at both temperatures in turn, answers kept."""

    def one(prompt: str, turn: int) -> None:
        answer = ask(stack.url, prompt, 0.7 * (turn % 2))
        stack.answers.append(answer | {"prompt": prompt, "at": time.monotonic()})

    return traffic(one)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("loop")
    settings = Settings(
        # Fixed depth: what is learned shows in the accept length at once, not only when it pays.
        engine=Engine(max_running=4, draft_intermediate=256, adaptive_depth=False),
        gateway=Gateway(port=free_port()),
        traces=Traces(url=f"spool://{folder}/traces"),
        trainer=Trainer(folder=str(folder / "trainer"), publish_every_s=5, checkpoint_every_s=5),
        swap=Swap(folder=str(folder / "swap"), watch_rounds=60, watch_requests=4, watch_timeout_s=10, poll_s=0.5),
        registry=Registry(url=f"http://127.0.0.1:{free_port()}", folder=str(folder / "mlflow")),
    )
    config = write_settings(settings, folder / "livedraft.toml")
    assert load(config, {}) == settings
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "livedraft.cli.main", "up", "--config", str(config)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    running = Stack(settings, config, process)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{running.url}/readyz", timeout=5).close()
            break
        assert process.poll() is None, (folder / "up.log").read_text()
        time.sleep(0.3)
    yield running
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    for name in ("serve", "train", "control"):
        with pytest.raises(AssertionError, match="no process"):
            running.child(name)


def wait_for_swaps(stack: Stack, count: int, timeout: float) -> list[str]:
    """Versions that the engine has drafted with, until there are ``count`` beyond the first."""
    seen: list[str] = []
    deadline = time.monotonic() + timeout
    while len(seen) <= count:
        version = stack.status()["drafter"]
        if version not in seen:
            seen.append(version)
        assert time.monotonic() < deadline, f"only {seen} in {timeout} s"
        time.sleep(0.5)
    return seen


def accept_length(answers: list[dict[str, Any]]) -> float:
    usages = [a["usage"] for a in answers]
    rounds = sum(u["livedraft"]["verify_rounds"] for u in usages)
    return float(sum(u["completion_tokens"] - 1 for u in usages) / rounds)


@pytest.mark.timeout(600)
def test_a_drafter_that_knows_nothing_learns_and_is_swapped_in_while_answers_stay_the_targets(stack: Stack) -> None:
    first = {p: ask(stack.url, p)["choices"][0]["message"]["content"] for p in held_out_prompts("prose")[:8]}
    with driven(stack):
        wait_for_swaps(stack, 2, 240)
        # The trainer dies; nobody who is served notices, and it comes back.
        os.kill(before := stack.child("train"), signal.SIGKILL)
        answered = len(stack.answers)
        time.sleep(6)
        assert len(stack.answers) > answered
        assert stack.child("train") != before
        deadline = time.monotonic() + 240
        while accept_length(stack.answers[-20:]) < accept_length(stack.answers[:20]) + 0.2:
            assert time.monotonic() < deadline, accept_length(stack.answers[-20:])
            time.sleep(1)
    again = {p: ask(stack.url, p)["choices"][0]["message"]["content"] for p in first}
    assert again == first
    assert accept_length(stack.answers[:20]) < 1.2


def test_the_registry_tells_the_whole_story(stack: Stack) -> None:
    registry = MlflowRegistry(stack.settings.registry.url, stack.settings.registry.model)
    live, previous = registry.resolve("live"), registry.resolve("previous")
    assert live is not None
    assert previous is not None
    assert live.checksum == stack.status()["drafter_checksum"]
    parents = {v.version: v.parent for v in registry.versions()}
    walked = [live.version]
    while (parent := parents[walked[-1]]) is not None:
        walked.append(parent)
    assert len(walked) > 2
    promoted = [d for d in registry.decisions() if d.action == "promote"]
    assert promoted
    assert all(d.evidence["lower"] > 1 for d in promoted)


def test_serving_does_not_need_the_controller_or_the_registry(stack: Stack) -> None:
    os.kill(stack.child("control"), signal.SIGKILL)
    assert ask(stack.url, "And it came to pass")["choices"]


def test_the_spool_feeds_a_trainer_that_reads_all_of_it_once(stack: Stack) -> None:
    progress = json.loads((Path(stack.settings.trainer.folder) / "progress.json").read_bytes())
    assert progress["counts"]["admitted"] > 0
    assert set(progress["counts"]) <= {"admitted", "held out"}
