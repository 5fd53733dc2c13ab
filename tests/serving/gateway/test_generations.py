"""What a request becomes for the engine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.errors import BadRequest, PromptTooLong
from livedraft.contracts.messages import Generation, Sampling
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.generations import Labels, generations, labels
from livedraft.serving.gateway.schema import UNSUPPORTED, ChatRequest, CompletionRequest, decode

from .conftest import Serve
from .fake_engine import FakeEngine

ANYONE = Labels("default", "default", True)


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return decode(msgspec.json.encode(body), ChatRequest, UNSUPPORTED)


def completion(**fields: Any) -> CompletionRequest:
    return decode(msgspec.json.encode({"model": "m", "prompt": "hi"} | fields), CompletionRequest, UNSUPPORTED)


def plan(
    asked: ChatRequest | CompletionRequest, *lengths: int, context: int = 100, limit: int = 50
) -> list[Generation]:
    prompts = [[1] * length for length in lengths or (10,)]
    settings = Gateway(max_tokens_limit=limit)
    return generations(asked, prompts, ANYONE, answer_id="a", context_length=context, settings=settings)


def test_openais_defaults() -> None:
    assert plan(chat()) == [Generation(request_id="a-0", prompt=(1,) * 10, sampling=Sampling(), max_tokens=50)]
    assert plan(completion())[0].max_tokens == 16


def test_every_field_arrives() -> None:
    [generation] = plan(
        chat(
            temperature=0, top_p=0.5, top_k=7, seed=3, stop=["x", "y"], max_tokens=5, max_completion_tokens=6,
            logprobs=True, top_logprobs=4, ignore_eos=True,
        )
    )  # fmt: skip
    assert generation == Generation(
        request_id="a-0",
        prompt=(1,) * 10,
        sampling=Sampling(temperature=0.0, top_p=0.5, top_k=7, seed=3),
        max_tokens=6,
        stop=("x", "y"),
        logprobs=4,
        ignore_eos=True,
    )


def test_choices_are_numbered_prompt_by_prompt_and_seeded_alike() -> None:
    planned = plan(completion(n=2, seed=5), 3, 4)
    assert [(g.request_id, len(g.prompt), g.sampling.seed) for g in planned] == [
        ("a-0", 3, 5), ("a-1", 3, 6), ("a-2", 4, 5), ("a-3", 4, 6)
    ]  # fmt: skip


def test_logprobs_of_none_and_of_the_token_alone_differ() -> None:
    asked: list[ChatRequest | CompletionRequest] = [
        chat(),
        chat(logprobs=False),
        chat(logprobs=True),
        completion(),
        completion(logprobs=0),
        completion(logprobs=5),
    ]
    assert [plan(each)[0].logprobs for each in asked] == [None, None, 0, None, 0, 5]


@given(st.integers(), st.integers(1, 8))
def test_any_seed_is_usable_and_the_same_each_time(seed: int, n: int) -> None:
    seeds = [g.sampling.seed for g in plan(chat(seed=seed, n=n))]
    assert seeds == [g.sampling.seed for g in plan(chat(seed=seed, n=n))]
    assert len(set(seeds)) == n
    assert all(s is not None and 0 <= s < 2**63 for s in seeds)


@given(
    st.integers(0, 120),
    st.one_of(st.none(), st.integers(1, 120)),
    st.integers(2, 100),
    st.integers(1, 60),
    st.booleans(),
)
def test_what_is_planned_always_fits(prompt: int, wanted: int | None, context: int, limit: int, chatting: bool) -> None:
    asked: ChatRequest | CompletionRequest = chat(max_tokens=wanted) if chatting else completion(max_tokens=wanted)
    fits = 0 < prompt < context and (wanted is None or (wanted <= limit and prompt + wanted <= context))
    if not fits:
        with pytest.raises(BadRequest):
            plan(asked, prompt, context=context, limit=limit)
        return
    [generation] = plan(asked, prompt, context=context, limit=limit)
    assert generation.max_tokens >= 1
    assert prompt + generation.max_tokens <= context
    assert generation.max_tokens <= limit
    if wanted is not None:
        assert generation.max_tokens == wanted
    elif chatting:
        assert generation.max_tokens == min(limit, context - prompt), "a chat gets what fits"


def test_one_prompt_too_long_refuses_all() -> None:
    with pytest.raises(PromptTooLong, match=r"prompt: 100 tokens, at most 99"):
        plan(completion(), 3, 100)


@pytest.mark.parametrize("value", ["off", "OFF", "0", "false", " off "])
def test_a_request_can_opt_out_of_traces(value: str) -> None:
    assert not labels(chat().metadata, "t", {"x-livedraft-trace": value}, ()).traced


@pytest.mark.parametrize("headers", [{}, {"x-livedraft-trace": "on"}, {"x-livedraft-trace": "1"}])
def test_otherwise_it_is_traced_unless_its_tenant_opted_out(headers: dict[str, str]) -> None:
    assert labels(chat().metadata, "t", headers, {"u"}).traced
    assert not labels(chat().metadata, "t", headers, {"t"}).traced


def test_the_domain_comes_from_the_request_or_else_the_header() -> None:
    header = {"x-livedraft-domain": "code/python"}
    assert labels(chat().metadata, "t", {}, ()).domain == "default"
    assert labels(chat().metadata, "t", header, ()).domain == "code/python"
    assert labels(chat(metadata={"domain": "prose"}).metadata, "t", header, ()).domain == "prose"
    assert labels(chat(metadata={"ticket": "1"}).metadata, "t", header, ()).domain == "code/python"


@pytest.mark.parametrize("domain", ["", "a b", "x" * 65, "a\n"])
def test_a_bad_domain_header_is_named(domain: str) -> None:
    with pytest.raises(BadRequest) as caught:
        labels(chat().metadata, "t", {"x-livedraft-domain": domain}, ())
    assert caught.value.field == "x-livedraft-domain"


def test_messages_reach_the_template_as_plain_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = chat(
        messages=[{"role": "developer", "content": "be brief", "name": "x"}, {"role": "user", "content": parts}]
    )
    engine = FakeEngine()
    assert engine.decode(asked.prompts(engine)[0]) == "<system>be brief<user>one\ntwo"
    engine.close()


def test_labels_reach_the_engine_over_http(start: Serve) -> None:
    served = start()
    headers = {"X-Livedraft-Domain": "prose", "X-Livedraft-Trace": "off"}
    served.http.post("/v1/completions", json={"model": "fake", "prompt": "a"}, headers=headers)
    [generation] = served.engine.submitted
    assert (generation.tenant, generation.domain, generation.traced) == ("default", "prose", False)
