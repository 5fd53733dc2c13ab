"""From what was asked to what the engine is to generate.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec
from livedraft.contracts.errors import BadRequest, PromptTooLong
from livedraft.contracts.messages import Generation, Sampling
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.schema import Asked, ChatRequest, CompletionRequest, Domain, Metadata, convert

DOMAIN_HEADER = "x-livedraft-domain"
TRACE_HEADER = "x-livedraft-trace"

#: OpenAI's default ``max_tokens`` of a completion.
COMPLETION_TOKENS = 16


class Labels(msgspec.Struct, frozen=True):
    """Where a request came from and whether it may be learned from."""

    tenant: str
    domain: str
    traced: bool


def labels(metadata: Metadata | None, tenant: str, headers: Mapping[str, str], opted_out: Collection[str]) -> Labels:
    """Labels of a request; its own ``metadata.domain`` goes before the header, which a proxy may have set.

    Not traced: requests that say so and those of ``opted_out`` tenants.  Raises BadRequest for an unusable domain.
    """
    domain = metadata.domain if metadata else None
    if domain is None and DOMAIN_HEADER in headers:
        domain = convert(headers[DOMAIN_HEADER], Domain, DOMAIN_HEADER)
    asks_not_to = headers.get(TRACE_HEADER, "on").strip().lower() in {"off", "0", "false"}
    return Labels(tenant, domain or "default", traced=not asks_not_to and tenant not in opted_out)


def generations(
    asked: ChatRequest | CompletionRequest,
    prompts: Sequence[Sequence[int]],
    origin: Labels,
    *,
    answer_id: str,
    context_length: int,
    settings: Gateway,
) -> list[Generation]:
    """One Generation per choice, prompt by prompt, as OpenAI numbers them.

    Choice i of a seeded prompt draws from seed + i.

    Raises BadRequest or PromptTooLong naming field and limit.
    """
    field = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if asked.choices * len(prompts) > settings.max_choices:
        message = f"asks for {asked.choices * len(prompts)} choices, at most {settings.max_choices} are allowed"
        raise BadRequest(message, field="n" if asked.choices > settings.max_choices else field)
    ordered: list[Generation] = []
    for prompt in prompts:
        budget = max_tokens(asked, len(prompt), field, context_length, settings.max_tokens_limit)
        for choice in range(asked.choices):
            ordered.append(
                Generation(
                    request_id=f"{answer_id}-{len(ordered)}",
                    prompt=tuple(prompt),
                    sampling=_sampling(asked, choice),
                    max_tokens=budget,
                    stop=asked.stops,
                    logprobs=asked.alternatives,
                    ignore_eos=bool(asked.ignore_eos),
                    tenant=origin.tenant,
                    domain=origin.domain,
                    traced=origin.traced,
                )
            )
    return ordered


def max_tokens(asked: ChatRequest | CompletionRequest, prompt: int, field: str, context: int, limit: int) -> int:
    """Output tokens a prompt of ``prompt`` tokens may get in a context of ``context``, never more than ``limit``.

    Raises BadRequest or PromptTooLong when it is not what was asked for.
    """
    if prompt == 0:
        raise BadRequest("holds no token", field=field)
    room = context - prompt
    if room < 1:
        raise PromptTooLong(f"{prompt} tokens, at most {context - 1} fit the context of {context}", field=field)
    name, wanted = asked.token_limit
    if wanted is None:
        return min(room, limit, COMPLETION_TOKENS if isinstance(asked, CompletionRequest) else limit)
    if wanted > limit:
        raise BadRequest(f"must be at most {limit}", field=name)
    if wanted > room:
        message = f"{wanted} and a prompt of {prompt} tokens do not fit the context of {context}"
        raise PromptTooLong(message, field=name)
    return wanted


def _sampling(asked: Asked, choice: int) -> Sampling:
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        # Any 64-bit integer is a seed to OpenAI; generators take non-negative ones.
        seed=None if asked.seed is None else (asked.seed + choice) % 2**63,
    )
