"""Whatever is wrong with a request, the answer says so in OpenAI's shape and names the field."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from livedraft.contracts.errors import Overloaded

from .conftest import Serve, Served
from .fake_engine import FakeEngine

Fields = dict[str, Any]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def refused(response: httpx.Response, status: int, param: str | None, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    for word in words:
        assert word in error["message"], error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": None}, "messages", ("array",)),
        ({"messages": []}, "messages", ("length",)),
        ({"messages": ["hi"]}, "messages[0]", ("object",)),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", ("required",)),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role", ("tool",)),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ("required",)),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", ("str",)),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            ("image_url",),
        ),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages", ("last turn",)),
        ({"model": 3}, "model", ("str",)),
        ({"temperature": -0.1}, "temperature", ("0.0",)),
        ({"temperature": 2.1}, "temperature", ("2.0",)),
        ({"temperature": "hot"}, "temperature", ("float", "str")),
        ({"top_p": 0}, "top_p", ("0.0",)),
        ({"top_p": 1.1}, "top_p", ("1.0",)),
        ({"top_k": -2}, "top_k", ("-1",)),
        ({"n": 0}, "n", ("1",)),
        ({"n": 9}, "n", ("at most 8",)),
        ({"n": True}, "n", ("bool",)),
        ({"seed": 1.5}, "seed", ("int",)),
        ({"seed": "x"}, "seed", ("int",)),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", ("4",)),
        ({"stop": ["a", ""]}, "stop[1]", ("length",)),
        ({"stop": ""}, "stop", ("length",)),
        ({"stop": 1}, "stop", ("str",)),
        ({"stream": "yes"}, "stream", ("bool",)),
        ({"stream_options": {"include_usage": True}}, "stream_options", ("stream",)),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", ("bool",)),
        ({"max_tokens": 0}, "max_tokens", ("1",)),
        ({"max_tokens": 1025}, "max_tokens", ("at most 1024",)),
        ({"max_completion_tokens": 1025}, "max_completion_tokens", ("at most 1024",)),
        ({"max_tokens": 1000}, "max_tokens", ("context of 512",)),
        ({"logprobs": 2}, "logprobs", ("bool",)),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ("20",)),
        ({"top_logprobs": 2}, "top_logprobs", ("logprobs",)),
        ({"ignore_eos": 1}, "ignore_eos", ("bool",)),
        ({"metadata": {"domain": "a b"}}, "metadata.domain", ("matching",)),
        ({"metadata": {"domain": "x" * 65}}, "metadata.domain", ("64",)),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", ("not supported",)),
        ({"tool_choice": "required"}, "tool_choice", ("not supported",)),
        ({"functions": [{"name": "f"}]}, "functions", ("not supported",)),
        ({"response_format": {"type": "json_object"}}, "response_format", ("not supported",)),
        ({"logit_bias": {"5": 10}}, "logit_bias", ("not supported",)),
        ({"presence_penalty": 0.5}, "presence_penalty", ("not supported",)),
        ({"frequency_penalty": -1}, "frequency_penalty", ("not supported",)),
    ],
)
def test_a_bad_chat_field_is_named(
    shared: Served, chat: Fields, fields: Fields, param: str, words: tuple[str, ...]
) -> None:
    before = len(shared.engine.submitted)
    refused(shared.http.post(CHAT, json=chat | fields), 400, param, *words)
    assert len(shared.engine.submitted) == before


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", ("null",)),
        ({"prompt": ""}, "prompt", ("no token",)),
        ({"prompt": []}, "prompt", ("length",)),
        ({"prompt": [[]]}, "prompt", ("no token",)),
        ({"prompt": ["a", 5]}, "prompt", ("mixes",)),
        ({"prompt": [5, [5]]}, "prompt", ("mixes",)),
        ({"prompt": [-1]}, "prompt[0]", ("0",)),
        ({"prompt": [[5, "a"]]}, "prompt[0][1]", ("int",)),
        ({"prompt": {"text": "a"}}, "prompt", ("object",)),
        ({"prompt": ["a"] * 9}, "prompt", ("at most 8",)),
        ({"prompt": ["a"] * 3, "n": 3}, "prompt", ("9 choices", "at most 8")),
        ({"logprobs": 6}, "logprobs", ("5",)),
        ({"logprobs": True}, "logprobs", ("bool",)),
        ({"echo": True}, "echo", ("not supported",)),
        ({"suffix": "the end"}, "suffix", ("not supported",)),
        ({"best_of": 2}, "best_of", ("equals n",)),
    ],
)
def test_a_bad_completion_field_is_named(shared: Served, fields: Fields, param: str, words: tuple[str, ...]) -> None:
    refused(shared.http.post(COMPLETIONS, json={"model": "fake", "prompt": "a"} | fields), 400, param, *words)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "n": 1, "user": "u", "store": True, "unheard_of": [1]},
        {"temperature": None, "top_p": None, "seed": None, "stop": None, "stream_options": None, "metadata": None},
        {"temperature": 0, "top_p": 1, "top_k": -1, "max_tokens": None, "seed": -5, "metadata": {"ticket": "4"}},
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "a"}]},
                {"role": "user", "content": ""},
            ]
        },
    ],
)
def test_harmless_fields_are_accepted(shared: Served, chat: Fields, fields: Fields) -> None:
    assert shared.http.post(CHAT, json=chat | fields).status_code == 200


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(shared: Served, chat: Fields, field: str) -> None:
    refused(shared.http.post(CHAT, json={k: v for k, v in chat.items() if k != field}), 400, field, "required")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b'"text"', b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"temperature": NaN}', b'{"n": 1e999}'],
    ids=repr,
)
def test_malformed_json(shared: Served, body: bytes) -> None:
    refused(shared.http.post(CHAT, content=body), 400, None, "JSON")


def test_an_unpaired_surrogate_is_not_text(shared: Served) -> None:
    body = b'{"model": "fake", "prompt": "a \\ud800 b"}'
    refused(shared.http.post(COMPLETIONS, content=body), 400, None, "JSON")


def test_an_unknown_model(shared: Served, chat: Fields) -> None:
    response = shared.http.post(CHAT, json=chat | {"model": "gpt-9"})
    refused(response, 404, None, "gpt-9", "fake")
    assert response.json()["error"]["code"] == "model_not_found"
    refused(shared.http.get("/v1/models/gpt-9"), 404, None, "gpt-9")


@pytest.mark.parametrize("max_tokens", [None, 5])
def test_a_prompt_that_is_too_long_names_the_limit(shared: Served, chat: Fields, max_tokens: int | None) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 600}], "max_tokens": max_tokens}
    response = shared.http.post(CHAT, json=chat | long)
    refused(response, 400, "messages", "606 tokens", "at most 511", "512")
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_the_longest_prompt_that_fits_gets_one_token(shared: Served) -> None:
    response = shared.http.post(COMPLETIONS, json={"model": "fake", "prompt": "x" * 511})
    assert response.json()["usage"]["completion_tokens"] == 1


def test_unknown_paths_and_methods(shared: Served) -> None:
    refused(shared.http.get("/v2/engines"), 404, None, "GET /v2/engines")
    response = shared.http.get(CHAT)
    refused(response, 405, None, "GET")
    assert response.headers["allow"] == "POST"


def test_a_declared_body_past_the_limit(start: Serve) -> None:
    served = start(max_body_bytes=100)
    refused(served.http.post(CHAT, content=b"x" * 101), 413, None, "100 bytes")
    refused(served.http.post(CHAT, content=b"x" * 100), 400, None, "JSON")


def test_a_chunked_body_past_the_limit(start: Serve) -> None:
    served = start(max_body_bytes=100)
    response = served.http.post(CHAT, content=iter([b"x" * 60] * 2))
    assert "content-length" not in response.request.headers
    refused(response, 413, None, "100 bytes")


def test_an_endless_body_is_refused_while_it_comes(start: Serve) -> None:
    address = urlsplit(start(max_body_bytes=1000).url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        client.sendall(b"200\r\n" + b"x" * 0x200 + b"\r\n")
        client.sendall(b"200\r\n" + b"x" * 0x200 + b"\r\n")  # the body never ends
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_full_engine_asks_to_come_back(start: Serve, chat: Fields) -> None:
    served = start(FakeEngine(capacity=2, stalled=True))
    for stream in (False, True):
        response = served.http.post(CHAT, json=chat | {"n": 3, "stream": stream})
        refused(response, 503, None, "no place")
        assert response.headers["retry-after"] == "1"
    assert len(served.engine.cancelled) == 4, "the choices that did fit must not go on"


def test_an_engine_failure_is_a_server_error(start: Serve, chat: Fields) -> None:
    served = start(FakeEngine(fail_after=1))
    response = served.http.post(CHAT, json=chat)
    refused(response, 500, None, "the cache is on fire")
    assert response.json()["error"]["type"] == "server_error"


def test_a_failing_choice_ends_its_siblings(start: Serve, chat: Fields) -> None:
    served = start(FakeEngine(fail_after=1))
    assert served.http.post(CHAT, json=chat | {"n": 2}).status_code == 500
    assert served.engine.status().running == 0


def test_a_failure_in_midstream_is_an_event_and_not_done(start: Serve, chat: Fields) -> None:
    served = start(FakeEngine(fail_after=1))
    response = served.http.post(CHAT, json=chat | {"stream": True})
    assert response.status_code == 200
    events = response.text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["message"] == "the cache is on fire"
    assert "[DONE]" not in response.text


def test_a_bug_is_a_500_that_tells_where_to_look_and_nothing_else(start: Serve, chat: Fields) -> None:
    served = start()
    served.engine.broken = ZeroDivisionError("secret")
    response = served.http.post(CHAT, json=chat)
    refused(response, 500, None, response.headers["x-request-id"])
    assert "secret" not in response.text
    served.engine.broken = Overloaded("later")
    refused(served.http.post(CHAT, json=chat), 503, None, "later")
