"""The loop closes on SGLang: traffic -> rounds -> relay -> stream -> trainer -> registry -> gate -> swap, and again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from livedraft.cli.prompts import held_out_prompts
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected
from livedraft.contracts.messages import SwapRequest

from tests.traffic import traffic

from .loop import Loop, looping

PROSE = held_out_prompts("prose")
#: Never in the traffic.
UNSEEN, SEEN = PROSE[:6], PROSE[6:]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory, fresh_drafter: Path) -> Iterator[Loop]:
    with looping(tmp_path_factory.mktemp("loop"), fresh_drafter) as running:
        yield running


@pytest.mark.timeout(900)
def test_what_was_served_is_learned_and_serves_and_every_answer_stays_what_it_was(loop: Loop) -> None:
    first = loop.drafter
    before, day0 = loop.ask_all(UNSEEN)

    def swapped(version: str) -> bool:
        return loop.drafter != version

    answers = list[dict[str, Any]]()
    with traffic(lambda p, _: answers.append(loop.ask(p) | {"prompt": p}), clients=4, prompts=SEEN):
        loop.eventually(lambda: swapped(first), 400)
        second = loop.drafter
        # Neither the way of the traces nor the learner is on the tokens' way, and both come back.
        loop.kill("relay")
        loop.kill("trainer")
        served = len(answers)
        loop.eventually(lambda: len(answers) > served + 12, 120)
        loop.start("relay", "trainer")
        loop.eventually(lambda: swapped(second), 400)
    after, learned = loop.ask_all(UNSEEN)
    assert after == before
    assert learned > 1.1 * day0
    assert [d["action"] for d in loop.decisions()].count("promote") >= 2
    # By the words of the answers themselves, the drafter changed while they were served.
    assert len({answer["usage"]["livedraft"].get("drafter_version") for answer in answers}) >= 2
    # The same prompt, again and again, under whatever drafter: one answer.
    texts = dict[str, set[str]]()
    for answer in answers:
        texts.setdefault(answer["prompt"], set()).add(answer["choices"][0]["text"])
    assert [prompt for prompt, given in texts.items() if len(given) > 1] == []


def test_a_candidate_that_is_not_whole_never_reaches_sglang(loop: Loop, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(loop.settings.engine.drafter, folder)
    config, manifest = checkpoint.verify(folder)
    arrays = {name: np.array(array) for name, array in checkpoint.load(folder).items()}
    arrays["norm.weight"][0] = np.nan
    shutil.rmtree(folder)
    bad = checkpoint.write(folder, config, arrays, manifest)
    request = SwapRequest(path=str(folder), version="bad", checksum=checkpoint.checksum(bad.tensors))
    with loop.uncontrolled():
        held = loop.engine.admin.status()
        with pytest.raises(DrafterRejected, match=r"norm\.weight"):
            loop.engine.admin.swap(request)
        now = loop.engine.admin.status()
    assert (now.drafter, now.drafter_checksum) == (held.drafter, held.drafter_checksum)
    assert loop.ask(UNSEEN[0])["choices"]
