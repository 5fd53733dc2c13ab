"""What a real server answers is what the target says: with and without speculation, whatever lies in its cache.

Greedy only: on a CPU SGLang verifies drafts against the target's best token at every temperature.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from livedraft.cli.prompts import held_out_prompts

from .greedy import Greedy
from .server import TARGET, Server

SPECULATING = ["chain_server", "tree_server"]
LEARNED, UNSEEN, LONG = slice(0, 8), slice(8, 16), slice(16, 48)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Server:
    """The server that the test names."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Server)
    return found


@pytest.fixture(scope="session")
def encode() -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    return lambda text: [int(token) for token in tokenizer(text).input_ids]


@pytest.fixture(scope="session")
def greedy() -> Greedy:
    return Greedy(TARGET)


def accept_length(answers: Sequence[dict[str, Any]]) -> float:
    """Tokens per round over all answers."""
    rounds = sum(a["meta_info"]["spec_verify_ct"] for a in answers)
    return float(sum(a["meta_info"]["completion_tokens"] for a in answers) / rounds)


@pytest.mark.parametrize("server", ["plain_server", *SPECULATING], indirect=True)
@pytest.mark.parametrize("part", [LEARNED, UNSEEN], ids=["learned", "unseen"])
def test_eight_at_once(server: Server, part: slice, encode: Callable[[str], list[int]], greedy: Greedy) -> None:
    """Prose and code together, where the drafter is mostly right and where it is mostly wrong."""
    asked = [encode(prompt) for prompt in held_out_prompts()[part]]
    answers = server.generate_together(asked, max_new_tokens=48)
    assert [a["output_ids"] for a in answers] == [greedy(ids, 48) for ids in asked]


@pytest.mark.parametrize("server", SPECULATING, indirect=True)
def test_drafts_are_accepted_where_the_drafter_has_learned(server: Server) -> None:
    learned, unseen = (server.generate_together(held_out_prompts()[part]) for part in (LEARNED, UNSEEN))
    assert accept_length(learned) > 2.5
    assert 1 <= accept_length(unseen) < accept_length(learned) - 0.5


@pytest.mark.parametrize("server", SPECULATING, indirect=True)
def test_answers_go_on_from_cached_ones(
    server: Server, prompts: list[str], encode: Callable[[str], list[int]], greedy: Greedy
) -> None:
    """What speculation left in the cache, accepted drafts among it, is what the target computes for those tokens."""
    asked = [encode(prompt) for prompt in prompts]
    answers = server.generate_together(asked, max_new_tokens=48)
    longer = [[*ids, *a["output_ids"]] for ids, a in zip(asked, answers, strict=True)]
    went_on = server.generate_together(longer, max_new_tokens=32)
    for ids, first, second in zip(asked, answers, went_on, strict=True):
        assert second["meta_info"]["cached_tokens"] >= len(ids) + 48 - 4
        assert first["output_ids"] + second["output_ids"] == greedy(ids, 80)


@pytest.mark.parametrize("server", SPECULATING, indirect=True)
def test_long_prompts_are_read_in_chunks(server: Server, encode: Callable[[str], list[int]], greedy: Greedy) -> None:
    """Prompts of several chunks beside short ones."""
    unseen = held_out_prompts()[LONG]
    asked = [encode(" ".join(unseen[i : i + 8]))[:300] for i in range(0, 32, 8)] + [encode(p) for p in unseen[:4]]
    assert max(map(len, asked)) > 200
    answers = server.generate_together(asked, max_new_tokens=32)
    assert [a["output_ids"] for a in answers] == [greedy(ids, 32) for ids in asked]
    read_at_once = [int(n) for n in re.findall(r"Prefill batch.*?#new-token: (\d+)", server.log.read_text())]
    assert max(read_at_once) <= 64
