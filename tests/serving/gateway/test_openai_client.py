"""The official client, unchanged: what it is promised and what it reads."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from livedraft.contracts.messages import Generation, Sampling
from openai.types.chat import ChatCompletionMessageParam

from .conftest import Serve, Served
from .fake_engine import FakeEngine, expected

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def says(seed: int = 0, max_tokens: int = 1000) -> str:
    request = Generation(request_id="", prompt=(1,), sampling=Sampling(seed=seed), max_tokens=max_tokens)
    output, shown, _ = expected(request, 60)
    return output[:shown].decode(errors="replace")


@pytest.fixture
def client(shared: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=shared.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HI, max_tokens=9, seed=4)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "fake")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", says(4, 9), None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (8, 9, 17)
    extra = {"accept_length": 8 / 3, "verify_rounds": 3, "drafter_version": "7"}
    assert answer.usage.model_extra == {"livedraft": extra}
    assert answer._request_id
    assert answer.id == "chatcmpl-" + answer._request_id


def test_an_answer_that_ends_by_itself_says_stop(client: openai.OpenAI) -> None:
    [choice] = client.chat.completions.create(model="fake", messages=HI).choices
    assert (choice.message.content, choice.finish_reason) == (says(), "stop")


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    [choice] = client.chat.completions.create(model="fake", messages=HI, stop=["wörst", "zebra"]).choices
    assert (choice.message.content, choice.finish_reason) == ("It was the best of times, it was the ", "stop")
    [one] = client.completions.create(model="fake", prompt="hi", stop="best").choices
    assert (one.text, one.finish_reason) == ("It was the ", "stop")


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="fake", messages=HI, max_tokens=50, stream=True) as stream:
        chunks = list(stream)
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {
        (chunks[0].id, "chat.completion.chunk", "fake")
    }
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert {delta.role for delta in deltas[1:]} == {None}
    assert "".join(delta.content or "" for delta in deltas) == says(0, 50)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 10
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_with_usage_ends_with_it(client: openai.OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        model="fake", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 68
    assert (last.usage.model_extra or {})["livedraft"]["verify_rounds"] == 20
    assert all(chunk.choices and "usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)


def test_choices_draw_from_consecutive_seeds_and_come_in_order(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HI, n=3, seed=10)
    assert [(c.index, c.message.content) for c in answer.choices] == [(i, says(10 + i)) for i in range(3)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 180)


def test_streamed_choices_interleave(client: openai.OpenAI) -> None:
    texts: dict[int, str] = defaultdict(str)
    order = []
    for chunk in client.chat.completions.create(model="fake", messages=HI, n=2, seed=10, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        order.append(choice.index)
    assert texts == {0: says(10), 1: says(11)}
    assert order != sorted(order)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "fake", "messages": HI, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    [choice] = client.chat.completions.create(**ask).choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [(entry.token, entry.bytes, entry.logprob) for entry in choice.logprobs.content] == [
        (letter, [ord(letter)], -0.5) for letter in "It w"
    ]
    assert [(top.token, top.logprob) for top in choice.logprobs.content[0].top_logprobs] == [("I", -0.5), ("H", -1.5)]
    streamed: list[object] = []
    for chunk in client.chat.completions.create(**ask, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == choice.logprobs.content


def test_logprobs_of_half_a_character_have_no_bytes(client: openai.OpenAI) -> None:
    [choice] = client.chat.completions.create(model="fake", messages=HI, max_tokens=40, logprobs=True).choices
    assert choice.logprobs is not None
    half = [entry for entry in choice.logprobs.content or [] if entry.token == "\N{REPLACEMENT CHARACTER}"]
    assert [entry.bytes for entry in half] == [None, None]
    assert half[0].top_logprobs == []


def test_completion_logprobs(client: openai.OpenAI) -> None:
    [choice] = client.completions.create(model="fake", prompt="hi", max_tokens=5, logprobs=2).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list("It wa")
    assert choice.logprobs.token_logprobs == [-0.5] * 5
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0] == {"I": -0.5, "H": -1.5}
    streamed: dict[str, list[Any]] = defaultdict(list)
    for chunk in client.completions.create(model="fake", prompt="hi", max_tokens=5, logprobs=2, stream=True):
        for name, values in chunk.choices[0].logprobs or []:
            streamed[name] += values
    assert streamed == dict(choice.logprobs)


def test_completions_without_alternatives_still_tell_the_sampled_token(client: openai.OpenAI) -> None:
    [choice] = client.completions.create(model="fake", prompt="hi", max_tokens=1, logprobs=0).choices
    assert choice.logprobs is not None
    assert choice.logprobs.top_logprobs == [{"I": -0.5}]


@pytest.mark.parametrize(
    ("prompt", "choices", "tokens"),
    [("hello", 1, 5), (["hello", "you"], 2, 8), ([104, 105], 1, 2), ([[104], [105, 106]], 2, 3)],
)
def test_every_form_of_prompt(client: openai.OpenAI, prompt: Any, choices: int, tokens: int) -> None:
    answer = client.completions.create(model="fake", prompt=prompt)
    assert (answer.id[:5], answer.object) == ("cmpl-", "text_completion")
    assert [choice.index for choice in answer.choices] == list(range(choices))
    assert {(choice.text, choice.finish_reason) for choice in answer.choices} == {(says(0, 16), "length")}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == tokens


def test_a_streamed_completion(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="fake", prompt=["a", "b"], max_tokens=10, stream=True))
    for index in (0, 1):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == says(0, 10)
    assert {chunk.object for chunk in chunks} == {"text_completion"}


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("fake", "model", "livedraft")
    assert client.models.retrieve("fake") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("organisation/other")


def test_errors_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=HI, temperature=3)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert missing.value.code == "model_not_found"


def test_a_failure_in_midstream_reaches_the_client(start: Serve) -> None:
    served = start(FakeEngine(fail_after=2))
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client:
        stream = client.chat.completions.create(model="fake", messages=HI, stream=True)
        seen = [next(stream).choices[0].delta.content for _ in range(3)]
        with pytest.raises(openai.APIError, match="the cache is on fire"):
            next(stream)
    assert seen == ["", "It ", "was"]


def test_the_asynchronous_client_streams_many_at_once(shared: Served) -> None:
    async def talk(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(model="fake", messages=HI, seed=seed, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=shared.url + "/v1", api_key="none") as client:
            return await asyncio.gather(*(talk(client, seed) for seed in range(32)))

    assert asyncio.run(all_of_them()) == [says(seed) for seed in range(32)]
    assert len({request.request_id for request in shared.engine.submitted}) == len(shared.engine.submitted)
