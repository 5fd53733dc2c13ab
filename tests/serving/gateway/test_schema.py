"""Whatever arrives is a request or a BadRequest."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.errors import BadRequest
from livedraft.serving.gateway.schema import UNSUPPORTED, Asked, ChatRequest, CompletionRequest, decode

FIELDS = sorted(
    {*UNSUPPORTED, *ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *Asked.__struct_fields__}
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "domain", "include_usage"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
KINDS: list[type[Asked]] = [ChatRequest, CompletionRequest]


def attempt(body: bytes, kind: type[Asked]) -> Asked | BadRequest:
    try:
        return decode(body, kind, UNSUPPORTED)
    except BadRequest as refusal:
        return refusal


@pytest.mark.parametrize("kind", KINDS)
@given(st.binary(max_size=50))
def test_any_bytes(kind: type[Asked], body: bytes) -> None:
    assert isinstance(attempt(body, kind), BadRequest)


@pytest.mark.parametrize("kind", KINDS)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_any_fields(kind: type[Asked], fields: dict[str, Any]) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "prompt": "hi"} | fields
    outcome = attempt(msgspec.json.encode(body), kind)
    if isinstance(outcome, BadRequest):
        assert outcome.field is not None
        assert outcome.field.split(".")[0].split("[")[0] in fields
    else:
        for name, value in fields.items():
            if name in kind.__struct_fields__ and not isinstance(value, dict | list):
                assert getattr(outcome, name) == value
