"""The gateway in front of real SGLang servers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from livedraft.contracts.engines import parse
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.proxy import Proxy, create_proxy
from livedraft.serving.gateway.server import running

from .plugged import Engine
from .server import Server

MODEL = "livedraft-tiny"
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello there"}], "temperature": 0}
UPON: dict[str, Any] = {"model": MODEL, "prompt": "In the beginning", "temperature": 0, "max_tokens": 24}
#: Takes seconds.
LONG = HELLO | {"max_tokens": 900, "ignore_eos": True}


@contextmanager
def gateway(*servers: Server | Engine, environ: dict[str, str] | None = None) -> Iterator[tuple[httpx.Client, Proxy]]:
    settings = Gateway(port=0, health_s=0.2)
    urls = [one.url if isinstance(one, Engine) else f"sglang+{one.url}" for one in servers]
    app = create_proxy(
        settings,
        parse(",".join(urls)),
        environ=environ or {},
        opted_out=["shy"],
    )
    with running(app, settings) as listening, httpx.Client(base_url=listening.url, timeout=600) as http:
        proxy: Proxy = app.state.endpoint
        eventually(lambda: len(proxy.replicas.ready()) == len(servers))
        yield http, proxy


def eventually(holds: Callable[[], bool], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"did not happen within {within_s} s"
        time.sleep(0.05)


def client_of(http: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)


def extension_of(answer: Any) -> dict[str, Any]:
    assert answer.usage.model_extra is not None
    extension: dict[str, Any] = answer.usage.model_extra["livedraft"]
    return extension


def test_the_official_client_gets_what_sglang_says_and_how_it_was_speculated(chain_server: Server) -> None:
    with gateway(chain_server) as (http, _), client_of(http) as client:
        ask = HELLO | {"max_tokens": 24}
        direct = chain_server.post("/v1/chat/completions", ask | {"return_spec_tokens_details": True})
        whole = client.chat.completions.create(**ask)
        streamed = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        text = direct["choices"][0]["message"]["content"]
        assert whole.choices[0].message.content == text
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == text
        rounds = direct["sglext"]["spec_tokens_details"]["spec_verify_ct"]
        expected = {"accept_length": (direct["usage"]["completion_tokens"] - 1) / rounds, "verify_rounds": rounds}
        assert extension_of(whole) == extension_of(streamed[-1]) == expected  # no plugin, no version
        assert whole.id.startswith("chatcmpl-")
        assert {chunk.id for chunk in streamed} == {streamed[0].id}


def test_completions_and_several_choices(chain_server: Server) -> None:
    with gateway(chain_server) as (http, _), client_of(http) as client:
        whole = client.completions.create(**UPON)
        streamed = list(client.completions.create(**UPON, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == whole.choices[0].text
        assert extension_of(whole) == extension_of(streamed[-1])
        twice = client.completions.create(**UPON, n=2)
        one = extension_of(whole)
        assert extension_of(twice) == one | {"verify_rounds": 2 * one["verify_rounds"]}
        several = client.completions.create(**UPON | {"prompt": ["In the beginning", "def main"]})
        assert len(several.choices) == 2
        assert several.usage is not None
        assert "livedraft" not in (several.usage.model_extra or {})


def test_errors_are_openais(chain_server: Server) -> None:
    with gateway(chain_server) as (http, _), client_of(http) as client:
        with pytest.raises(openai.BadRequestError, match="temperature") as bad:
            client.chat.completions.create(**HELLO | {"temperature": -1})
        assert bad.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError, match="top_p") as typed:
            client.chat.completions.create(**HELLO | {"top_p": "much"})
        assert typed.value.param == "top_p"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(**UPON | {"prompt": "a b " * 2000})
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError) as unknown:
            client.models.retrieve("nothing")
        assert unknown.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_labels_and_id_reach_sglangs_sampling_parameters(chain_server: Server, path: str, stream: bool) -> None:
    with gateway(chain_server, environ={"LIVEDRAFT_API_KEYS": "sk-a:acme,sk-s:shy"}) as (http, _):
        for key, traced in (("sk-a", True), ("sk-s", False)):
            body = (HELLO if "chat" in path else UPON) | {
                "max_tokens": 3,
                "stream": stream,
                "custom_params": {"livedraft": {"tenant": "other"}, "mine": 3},
            }
            headers = {"authorization": f"Bearer {key}", "x-livedraft-domain": "poetry"}
            answer = http.post(path, json=body, headers=headers)
            assert answer.status_code == 200
            prefix = "chatcmpl-" if "chat" in path else "cmpl-"
            rid = prefix + answer.headers["x-request-id"]
            tenant = {"sk-a": "acme", "sk-s": "shy"}[key]
            labels = {"livedraft": {"tenant": tenant, "domain": "poetry", "traced": traced}, "mine": 3}
            eventually(lambda rid=rid, labels=labels: _logged(chain_server, rid, labels))  # type: ignore[misc]


def _logged(server: Server, rid: str, labels: dict[str, Any]) -> bool:
    """Whether SGLang logged the request with these labels among its sampling parameters."""
    return any(rid in line and f"'custom_params': {labels!r}" in line for line in server.log.read_text().splitlines())


@pytest.mark.timeout(900)  # decoded in full once, to know how many steps that takes
def test_a_client_that_leaves_frees_its_place(chain_server: Server) -> None:
    def load() -> tuple[int, int]:
        """Requests that are decoded, and steps decoded so far."""
        [found] = chain_server.get("/v1/loads")["loads"]
        return int(found["num_running_reqs"]), int((found["decode_moments"] or [0])[0])

    with gateway(chain_server) as (http, proxy):
        before = load()[1]
        assert http.post("/v1/chat/completions", json=LONG).status_code == 200
        in_full = load()[1] - before
        for stream in (True, False):
            before = load()[1]
            body = json.dumps(LONG | {"stream": stream}).encode()
            with socket.create_connection((http.base_url.host, http.base_url.port or 0), timeout=60) as leaving:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
                leaving.sendall(head.encode() + body)
                eventually(lambda: load()[0] == 1)
            eventually(lambda: proxy.traffic.in_flight == 0)
            eventually(lambda: load()[0] == 0)  # it looks for clients of unstreamed answers every few seconds
            assert load()[1] - before < in_full
        assert http.post("/v1/completions", json=UPON).status_code == 200
