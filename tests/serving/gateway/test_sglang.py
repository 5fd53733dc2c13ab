"""The gateway in front of SGLang: what it asks, and what clients get of the answers SGLang gave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

from .conftest import Serve
from .fake_sglang import RECORDED, FakeSglang
from .test_disconnect import eventually, post
from .test_proxy import Proxied, error_of, proxying

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def open_stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def sglang(open_stack: ExitStack) -> Callable[..., FakeSglang]:
    return lambda *args, **fields: open_stack.enter_context(FakeSglang(*args, **fields))


@pytest.fixture
def proxy(open_stack: ExitStack) -> Callable[..., Proxied]:
    return lambda *urls, **settings: open_stack.enter_context(proxying(*urls, **settings))


@pytest.fixture
def completion() -> dict[str, Any]:
    return {"model": "livedraft-tiny", "prompt": "Once upon", "max_tokens": 4}


Sglang = Callable[..., FakeSglang]
Proxy = Callable[..., Proxied]


def told(served: Proxied) -> Proxied:
    """Once the gateway has heard of a drafter."""
    eventually(lambda: all(replica.drafting is not None for replica in served.proxy.replicas.all))
    return served


def chunks_of(stream: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line.startswith("data: {")]


# What is asked.


def test_labels_and_id_travel_in_the_body(sglang: Sglang, proxy: Proxy, chat: dict[str, Any]) -> None:
    engine = sglang()
    served = proxy(engine.url, environ={"LIVEDRAFT_API_KEYS": "sk-a:acmé,sk-s:shy"}, engine_key="between us")
    lies = {"livedraft": {"tenant": "other", "traced": True}, "mine": 3}
    body = chat | {"custom_params": lies, "metadata": {"domain": "poetry"}, "rid": "mine too", "top_k": 3}
    answer = served.http.post(CHAT, json=body, headers={"authorization": "Bearer sk-a", "x-livedraft-tenant": "other"})
    served.http.post(CHAT, json=body, headers={"authorization": "Bearer sk-s", "x-livedraft-trace": "on"})
    first, second = engine.asked
    assert first["custom_params"] == {"mine": 3, "livedraft": {"tenant": "acmé", "domain": "poetry", "traced": True}}
    assert second["custom_params"]["livedraft"] == {"tenant": "shy", "domain": "poetry", "traced": False}
    assert first["top_k"] == 3
    assert first["rid"] == answer.json()["id"] == "chatcmpl-" + answer.headers["x-request-id"]
    assert engine.headers[0]["authorization"] == "Bearer between us"
    assert not any(name.startswith("x-livedraft") for name in engine.headers[0])


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, {"tenant": "default", "domain": "default", "traced": True}),
        ({"x-livedraft-domain": "code"}, {"tenant": "default", "domain": "code", "traced": True}),
        ({"x-livedraft-trace": "off"}, {"tenant": "default", "domain": "default", "traced": False}),
    ],
)
def test_labels_come_from_headers_too(
    sglang: Sglang, proxy: Proxy, completion: dict[str, Any], headers: dict[str, str], expected: dict[str, Any]
) -> None:
    engine = sglang()
    proxy(engine.url).http.post(COMPLETE, json=completion | {"stream": True}, headers=headers)
    assert engine.asked[0]["custom_params"] == {"livedraft": expected}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"custom_params": [1]}, "custom_params"),
        ({"metadata": {"domain": "no spaces"}}, "metadata.domain"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_a_field_that_the_gateway_reads_must_be_right(
    sglang: Sglang, proxy: Proxy, chat: dict[str, Any], body: dict[str, Any], param: str
) -> None:
    engine = sglang()
    answer = proxy(engine.url).http.post(CHAT, json=chat | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert engine.asked == []


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings"])
def test_routes_that_take_no_labels_are_closed(sglang: Sglang, proxy: Proxy, chat: dict[str, Any], path: str) -> None:
    engine = sglang()
    answer = proxy(engine.url).http.post(path, json=chat)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert engine.asked == []


# What is answered.


def test_the_official_client_reads_it(sglang: Sglang, proxy: Proxy) -> None:
    served = told(proxy(sglang().url))
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["livedraft-tiny"]
        with pytest.raises(openai.NotFoundError, match="'none' does not exist"):
            client.models.retrieve("none")
        ask: dict[str, Any] = {"model": "livedraft-tiny", "messages": [{"role": "user", "content": "hi"}]}
        whole = client.chat.completions.create(**ask)
        assert whole.usage is not None
        assert whole.usage.model_extra is not None
        extension = whole.usage.model_extra["livedraft"]
        assert (extension["accept_length"], extension["verify_rounds"], extension["drafter_version"]) == (1.0, 5, "7")
        stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        streamed = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
        assert text == whole.choices[0].message.content
        last = streamed[-1].usage
        assert last is not None
        assert last.model_extra is not None
        assert last.completion_tokens == whole.usage.completion_tokens
        assert last.model_extra["livedraft"].keys() == extension.keys()


def test_accept_length_leaves_out_the_prefills_token(sglang: Sglang, proxy: Proxy, chat: dict[str, Any]) -> None:
    """SGLang's own counts it: 6 tokens in 5 rounds would be 1.2 for a drafter that never hit."""
    recorded = json.loads(RECORDED["chat"]["body"])
    assert recorded["sglext"]["spec_tokens_details"]["spec_accept_length"] == pytest.approx(1.2)
    usage = proxy(sglang().url).http.post(CHAT, json=chat).json()["usage"]
    assert (usage["livedraft"]["accept_length"], usage["livedraft"]["verify_rounds"]) == (1.0, 5)


@pytest.mark.parametrize("streamed", [False, True])
def test_several_choices_are_counted_together_under_one_id(
    sglang: Sglang, proxy: Proxy, chat: dict[str, Any], streamed: bool
) -> None:
    served = told(proxy(sglang().url))
    answer = served.http.post(CHAT, json=chat | {"n": 2} | (USAGE if streamed else {}))
    chunks = chunks_of(answer.text) if streamed else [answer.json()]
    extension = chunks[-1]["usage"]["livedraft"]
    assert (extension["accept_length"], extension["verify_rounds"]) == (1.0, 10)
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-" + answer.headers["x-request-id"]}


def test_what_is_not_known_is_absent(sglang: Sglang, proxy: Proxy, chat: dict[str, Any]) -> None:
    one_token = told(proxy(sglang().url)).http.post(CHAT, json=chat | {"max_tokens": 1}).json()["usage"]["livedraft"]
    assert (one_token["accept_length"], one_token["verify_rounds"]) == (None, 0)
    prompts = {"model": "x", "prompt": ["a", "b"]}
    several = told(proxy(sglang().url)).http.post(COMPLETE, json=prompts).json()["usage"]["livedraft"]
    assert several.keys() == {"drafter_version", "drafter_version_as_of"}
    plain = proxy(sglang("plain chat", drafter=None).url).http.post(CHAT, json=chat).json()
    assert "livedraft" not in plain["usage"]
    without_plugin = proxy(sglang(drafter=None).url).http.post(CHAT, json=chat).json()["usage"]["livedraft"]
    assert without_plugin.keys() == {"accept_length", "verify_rounds"}


def test_the_version_is_that_of_the_last_look(sglang: Sglang, proxy: Proxy, chat: dict[str, Any]) -> None:
    engine = sglang(admin_key="secret")
    served = told(proxy(engine.url, admin_key="secret"))
    before = served.http.post(CHAT, json=chat).json()["usage"]["livedraft"]
    engine.drafter = "8"
    replica = served.proxy.replicas.all[0]
    eventually(lambda: replica.drafting is not None and replica.drafting.drafter == "8")
    after = served.http.post(CHAT, json=chat).json()["usage"]["livedraft"]
    assert (before["drafter_version"], after["drafter_version"]) == ("7", "8")
    assert after["drafter_version_as_of"] > before["drafter_version_as_of"] > 1.7e9
    wrong_key = proxy(engine.url, admin_key="guess").http.post(CHAT, json=chat).json()
    assert "drafter_version" not in wrong_key["usage"]["livedraft"]


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", ["chat", "chat stream usage", "completion", "completion stream usage"])
def test_sglangs_own_details_are_there_for_those_who_ask(
    sglang: Sglang, proxy: Proxy, chat: dict[str, Any], completion: dict[str, Any], name: str, wanted: bool
) -> None:
    served = proxy(sglang().url)
    path, body = (CHAT, chat) if name.startswith("chat") else (COMPLETE, completion)
    extra = (USAGE if "stream" in name else {}) | ({"return_spec_tokens_details": True} if wanted else {})
    answer = served.http.post(path, json=body | extra)
    assert ("spec_verify_ct" in answer.text) == wanted
    assert ("sglext" in answer.text) == wanted
    assert '"livedraft":' in answer.text


def test_a_stream_without_usage_passes_as_it_is(sglang: Sglang, proxy: Proxy, chat: dict[str, Any]) -> None:
    engine = sglang()
    answer = proxy(engine.url).http.post(CHAT, json=chat | {"stream": True})
    assert answer.text == RECORDED["chat stream"]["body"].replace("chatcmpl-4", engine.asked[0]["rid"])
    assert "return_spec_tokens_details" not in engine.asked[0]


# Errors.


@pytest.mark.parametrize(
    ("says", "status", "kind", "code", "param", "message"),
    [
        ("bad value", 400, "invalid_request_error", None, None, "temperature must be"),
        ("bad type", 400, "invalid_request_error", None, "max_tokens", "max_tokens: Input should be a valid integer"),
        ("too long", 400, "invalid_request_error", "context_length_exceeded", None, "Requested token count"),
        ("prompt too long", 400, "invalid_request_error", "context_length_exceeded", None, "The input (4015 tokens)"),
        ("no route", 404, "invalid_request_error", None, None, "Not Found"),
        ("model unknown", 404, "invalid_request_error", "model_not_found", "model", "The model 'none'"),
        ("full", 503, "overloaded_error", "overloaded", None, "The request queue is full."),
        ("full stream", 503, "overloaded_error", "overloaded", None, "The request queue is full."),
        ("no key", 502, "server_error", "engine_unavailable", None, "the engine does not accept the gateway's key"),
        ("chat aborted", 503, "overloaded_error", "overloaded", None, "the engine ended the request"),
    ],
)
def test_errors_come_in_openais_shape(
    sglang: Sglang,
    proxy: Proxy,
    chat: dict[str, Any],
    says: str,
    status: int,
    kind: str,
    code: str | None,
    param: str | None,
    message: str,
) -> None:
    answer = proxy(sglang(says).url).http.post(CHAT, json=chat | {"stream": "stream" in says})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"], error["param"]) == (status, kind, code, param)
    assert error["message"].startswith(message)
    assert "/" not in error["message"]  # no path of the server
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)


def test_an_abort_in_mid_stream_ends_it_with_an_error(sglang: Sglang, proxy: Proxy, chat: dict[str, Any]) -> None:
    answer = proxy(sglang("chat stream aborted").url).http.post(CHAT, json=chat | USAGE)
    assert error_of(answer.text)["code"] == "overloaded"
    assert len(chunks_of(answer.text)) > 2
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("says", ["full", "full stream", "chat aborted"])
def test_a_full_engine_is_passed_over(sglang: Sglang, proxy: Proxy, chat: dict[str, Any], says: str) -> None:
    full, free = sglang(says), sglang()
    served = proxy(full.url, free.url)
    body = chat | {"stream": "stream" in says}
    assert [served.http.post(CHAT, json=body).status_code for _ in range(4)] == [200] * 4
    assert full.asked


# Health, and several engines.


def test_health_is_asked_where_it_costs_nothing(sglang: Sglang, proxy: Proxy) -> None:
    engine, old = sglang(), sglang(knows_ready=False)
    served = proxy(engine.url, old.url)
    eventually(lambda: all(replica.ready for replica in served.proxy.replicas.all))
    assert set(engine.probes) == {"/ready"}
    assert old.probes[:2] == ["/ready", "/health"]
    assert "/ready" not in old.probes[1:]
    engine.ready = old.ready = False
    eventually(lambda: served.http.get("/readyz").status_code == 503)


def test_engines_of_both_makes_stand_behind_one_gateway(
    start: Serve, sglang: Sglang, proxy: Proxy, chat: dict[str, Any]
) -> None:
    ours, theirs = start(), sglang()
    served = proxy(ours.url, theirs.url)
    eventually(lambda: all(replica.ready for replica in served.proxy.replicas.all))
    ids = [served.http.post(CHAT, json=chat).json()["id"] for _ in range(4)]
    assert len(ours.engine.submitted) == len(theirs.asked) == 2
    assert all(answer_id.startswith("chatcmpl-") for answer_id in ids)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_closes_the_connection(
    sglang: Sglang, proxy: Proxy, chat: dict[str, Any], streamed: bool
) -> None:
    engine = sglang(step_s=0.1)
    served = proxy(engine.url)
    client = post(served, chat | {"stream": streamed})  # type: ignore[arg-type]  # has a url
    eventually(lambda: len(engine.asked) == 1)
    client.close()
    eventually(lambda: served.proxy.traffic.in_flight == 0 and served.busiest() == 0)
    if streamed:
        eventually(lambda: engine.left == 1)


def test_running_streams_are_answered_before_it_ends(sglang: Sglang, chat: dict[str, Any]) -> None:
    engine = sglang(step_s=0.1)
    with ThreadPoolExecutor(1) as pool, proxying(engine.url) as served:
        streamed = pool.submit(httpx.post, served.url + CHAT, json=chat | {"stream": True}, timeout=20)
        eventually(lambda: len(engine.asked) == 1)
        served.server.should_exit = True
        eventually(lambda: served.http.get("/readyz").status_code == 503)
    assert streamed.result().text.endswith("data: [DONE]\n\n")
