"""What ``engine.url`` may say."""

from __future__ import annotations

import pytest
from livedraft.contracts.engines import EngineAddress, parse
from livedraft.contracts.errors import SettingsError


def test_the_embedded_engine_has_no_address() -> None:
    assert parse("local:") == ()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://e:8000", EngineAddress(base="http://e:8000", admin="http://e:8000")),
        ("https://[::1]:8000/", EngineAddress(base="https://[::1]:8000", admin="https://[::1]:8000")),
        (
            "sglang+http://e:30000",
            EngineAddress(base="http://e:30000", admin="http://e:30001", kind="sglang"),
        ),
        (
            "sglang+https://[fe80::1]:30000?admin=9",
            EngineAddress(base="https://[fe80::1]:30000", admin="http://[fe80::1]:9", kind="sglang"),
        ),
        (
            "sglang+https://e:30000?plugin=no",
            EngineAddress(base="https://e:30000", admin="https://e:30000", kind="sglang", plugin=False),
        ),
    ],
)
def test_an_engine_is_reached_and_administered(url: str, expected: EngineAddress) -> None:
    assert parse(url) == (expected,)


def test_several_of_either_make() -> None:
    found = parse("sglang+http://a:30000, sglang+http://b:30000?admin=1 ,http://c:8000")
    assert [(address.base, address.admin) for address in found] == [
        ("http://a:30000", "http://a:30001"),
        ("http://b:30000", "http://b:1"),
        ("http://c:8000", "http://c:8000"),
    ]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "e:8000",
        "http://e:8000/v1",
        "http://e:8000?admin=9",
        "sglang://e:30000",
        "sglang+http://e",
        "sglang+http://e:30000?admin=99999",
        "sglang+http://e:65535",
        "sglang+http://e:30000?port=3",
        "sglang+http://e:30000?plugin=yes",
        "sglang+http://e:30000?plugin=no&admin=9",
        "http://e:8000?plugin=no",
        "sglang+http://e:30000?plugin=no,sglang+http://e:30000",
        "http://a:1,,http://b:1",
        "http://user:secret@e:8000",
        "http://e:8000,http://e:8000",
        "sglang+http://e:30000,sglang+http://e:30001?admin=30001",
    ],
)
def test_anything_else_is_an_error_that_says_what_was_expected(url: str) -> None:
    with pytest.raises(SettingsError, match=r"engine\.url"):
        parse(url)
