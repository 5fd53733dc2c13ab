"""A real SGLang server over the bundled target, on the CPU, or for a benchmark on a GPU.

    with serving(folder, Speculation(drafter)) as server:
        server.generate("In the beginning", max_new_tokens=16)

SGLang and its environment are those of the interpreter that runs this; ``shim`` stands in for kernels it lacks.
Verification on a CPU takes the target's best token at every temperature, so that nothing sampled can be tested here.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from livedraft.cli.ports import free_port

TARGET = Path(__file__).parents[2] / "models" / "tiny"
SHIM = Path(__file__).parent / "shim"
#: SGLang looks for the signal every 5 seconds, and waits for its schedulers.
_STOP_S = 60.0
#: What is left of it gives semaphores back first.
_ORPHANED_S = 0.5
_LAST_LINES = 40
Device = Literal["cpu", "cuda"]
#: Seconds until it answers: on a CPU about 20 alone, beside other work several times that; on a GPU a large model is
#: read, kernels are compiled and graphs captured.
START_S: dict[Device, float] = {"cpu": 240.0, "cuda": 1800.0}
#: On processors without AMX only backends named for each phase stay what they are: `torch_native`, which SGLang
#: sets instead, cannot speculate.
_SPECULATING_ON_CPU = (
    "--prefill-attention-backend=intel_amx",
    "--decode-attention-backend=intel_amx",
    "--speculative-draft-attention-backend=intel_amx",
)
#: SGLang's own choices on a GPU, captured graphs among them.
_OPTIONS: dict[Device, tuple[str, ...]] = {
    "cpu": ("--dtype=float32", "--mem-fraction-static=0.2", "--attention-backend=torch_native"),
    "cuda": (),
}
_ENVIRONMENT: dict[Device, dict[str, str]] = {
    "cpu": {
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # it would compile what a drafting step picks
        "OMP_NUM_THREADS": "1",  # these models are too small to share out, and servers that share cores wait in turns
        "PYTHONPATH": os.pathsep.join([str(SHIM), *filter(None, [os.environ.get("PYTHONPATH")])]),
    },
    "cuda": {},
}


@dataclass(frozen=True)
class Speculation:
    """EAGLE-3 with a drafter: a chain, or with ``topk`` above 1 a tree of which ``nodes`` are verified."""

    drafter: Path
    steps: int = 3
    topk: int = 1
    #: The last committed token included; a chain verifies all it drafts.
    nodes: int = 8

    @property
    def arguments(self) -> list[str]:
        """As options of ``sglang.launch_server``."""
        nodes = self.steps + 1 if self.topk == 1 else self.nodes
        return [
            "--speculative-algorithm=EAGLE3",
            f"--speculative-draft-model-path={self.drafter}",
            f"--speculative-num-steps={self.steps}",
            f"--speculative-eagle-topk={self.topk}",
            f"--speculative-num-draft-tokens={nodes}",
        ]


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def post(self, path: str, body: Mapping[str, Any], *, timeout: float = 120) -> Any:
        """The JSON answer to ``body``.  Raises HTTPError."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def kill(self) -> None:
        """SIGKILL to the first process, with which the others end, and to those that do not; safe to call twice."""
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + _ORPHANED_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)
                time.sleep(0.02)
            os.killpg(self.process.pid, signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM, at which the server ends its processes; its status.  Raises RuntimeError where it goes on."""
        self.process.terminate()
        try:
            return self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise _failure(self, f"went on for {_STOP_S:.0f} s after SIGTERM") from None

    def get(self, path: str, *, timeout: float = 30) -> Any:
        """The JSON answer.  Raises HTTPError."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            return json.load(answer)

    def generate(
        self, prompt: str | Sequence[int], *, max_new_tokens: int = 48, temperature: float = 0.0, **fields: Any
    ) -> dict[str, Any]:
        """The answer of ``/generate``: ``text``, ``output_ids``, ``meta_info``; ``fields`` are the request's."""
        sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        text = {"text": prompt} if isinstance(prompt, str) else {"input_ids": [*prompt]}
        return dict(self.post("/generate", {**text, "sampling_params": sampling, **fields}))

    def generate_together(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[dict[str, Any]]:
        """One answer per prompt, all asked for at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, **options), prompts))

    def stream(self, prompt: str, *, max_new_tokens: int = 48) -> tuple[list[int], list[float]]:
        """A greedy answer, and when (``time.perf_counter``) each piece of it came.  Raises OSError, AssertionError."""
        url = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=120)
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        body = json.dumps({"text": prompt, "sampling_params": sampling, "stream": True})
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        output: list[int] = []
        times: list[float] = []
        for line in response:
            if line.startswith(b"data: {"):
                piece = json.loads(line.removeprefix(b"data: "))
                assert "error" not in piece, piece
                times.append(time.perf_counter())
                output = piece["output_ids"]
        connection.close()
        return output, times


@contextlib.contextmanager
def serving(
    folder: Path,
    speculation: Speculation | None = None,
    *,
    target: Path = TARGET,
    device: Device = "cpu",
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    plugins: Sequence[str] = (),
) -> Iterator[Server]:
    """A server with its log in ``folder`` until the block ends; ``plugins`` are the entry points that it loads.

    Prefixes are cached and 8 requests run at once, unless ``arguments`` say otherwise.  It ends by SIGKILL: SGLang
    takes seconds to notice a SIGTERM.  Raises RuntimeError with the end of the log when it does not start.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "sglang.launch_server"),
        *(f"--model-path={target}", f"--device={device}", *_OPTIONS[device]),
        *("--host=127.0.0.1", f"--port={port}", f"--nccl-port={free_port()}"),
        *("--max-total-tokens=8192", "--max-running-requests=8", "--grammar-backend=none"),
        "--skip-server-warmup",  # on a busy machine it gives up, and the server with it; /health generates a token, too
        "--sleep-on-idle",  # else each idle server takes a core from the others
        *(speculation.arguments if speculation else ()),
        *(_SPECULATING_ON_CPU if speculation and device == "cpu" else ()),
        *arguments,
    ]
    ours = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Empty would be all that are installed.
        "SGLANG_PLUGINS": ",".join(plugins) or "none",
        **_ENVIRONMENT[device],
    }
    log = folder / f"sglang-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **ours, **(environment or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _await_health(server, START_S[device])
        yield server
    finally:
        server.kill()


def _failure(server: Server, what: str) -> RuntimeError:
    end = server.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return RuntimeError("\n".join([f"SGLang {what}; {server.log}:", *end]))


def _await_health(server: Server, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if (status := server.process.poll()) is not None:
            raise _failure(server, f"ended with status {status}")
        with contextlib.suppress(OSError):  # HTTPError is one: 503 while it starts
            urllib.request.urlopen(f"{server.url}/health", timeout=10).close()
            return
        time.sleep(0.25)
    raise _failure(server, f"did not answer within {within_s:.0f} s")
