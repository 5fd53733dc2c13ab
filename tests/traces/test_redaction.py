from __future__ import annotations

from typing import Any

import pytest
from livedraft.contracts.messages import Trace
from livedraft.traces.arrays import to_numpy
from livedraft.traces.redaction import NoRedaction, PatternRedaction, find_secret


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mail jane.doe+x@mail.example.org please", "email"),
        ("OPENAI_API_KEY=sk-proj-abcdefghij0123456789ABCD", "api key"),
        ("key sk_live_abcdefghij0123456789", "api key"),
        ("ghp_" + "a1" * 18, "api key"),
        ("AKIAIOSFODNN7EXAMPLE", "api key"),
        ("xoxb-1234567890-abc", "api key"),
        ("hf_" + "x" * 34, "api key"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN", "api key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("pay with 4111 1111 1111 1111 now", "card number"),
        ("5500-0000-0000-0004", "card number"),
        ("378282246310005", "card number"),
    ],
)
def test_secrets_are_found(text: str, found: str) -> None:
    assert find_secret(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = a @ b.T",
        "@decorator",
        "4111 1111 1111 1112",  # wrong check digit
        "3.14159265358979323846",
        "the task-based approach of sk-learn",
        "1234567890",
        "def task_completion_handler_for_everything(): ...",
    ],
)
def test_prose_and_code_pass(text: str) -> None:
    assert find_secret(text) is None


def test_a_secret_across_prompt_and_output_is_found(make_trace: Any) -> None:
    trace: Trace = make_trace(1)
    border = trace.prompt.shape[0]

    def decode(tokens: Any) -> str:
        assert len(tokens) == border + to_numpy(trace.output).size
        return "jane@" * border + "example.org"

    assert PatternRedaction(decode).finds(trace) == "email"
    assert PatternRedaction(decode, patterns={}).finds(trace) is None
    assert NoRedaction().finds(trace) is None
