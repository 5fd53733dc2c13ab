"""What the benchmark takes and refuses before it starts anything."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from .bench import arguments, delays
from .overhead import Cost, overhead
from .pace import Step, added
from .pairs import interval


def test_on_a_cpu_it_measures_everything_on_the_bundled_target() -> None:
    asked = arguments([])
    assert (asked.device, asked.target, asked.drafter) == ("cpu", "bundled", None)
    assert asked.parts == ("capture", "swap", "loop")


def test_parts_are_run_in_their_order() -> None:
    assert arguments(["--parts", "swap,capture"]).parts == ("capture", "swap")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "swap,stall"], "--parts: unknown 'stall', expected capture, swap, loop"),
        (["--target", "Qwen/Qwen3-8B"], "--target and --drafter go together"),
        (["--drafter", "folder"], "--target and --drafter go together"),
        (["--target", "Qwen/Qwen3-8B", "--drafter", "folder"], "--parts loop: runs with --device cpu and the bundled"),
        (["--device", "cuda", "--parts", "loop"], "--parts loop: runs with --device cpu"),
        (["--target", "x", "--drafter", "nowhere", "--parts", "swap"], "--drafter nowhere: "),
        (["--swaps", "1"], "--swaps and --repeats: expected 2 or more"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("more", [[], ["--target", "Qwen/Qwen3-8B", "--drafter", "folder"]])
def test_without_a_gpu_it_says_so(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(["--device", "cuda", *more])
    assert ended.value.code == 2
    assert "--device cuda: no CUDA device is there for torch" in capsys.readouterr().err


def test_the_interval_of_a_median_is_that_of_the_sign_test() -> None:
    assert interval([*range(20)]) == (5, 14)  # as in its tables: the 6th smallest and the 6th largest
    assert interval([3, 1, 2]) == (1, 3)
    rng = random.Random(1)
    drawn = [interval([rng.expovariate(1) for _ in range(30)]) for _ in range(400)]
    assert 0.93 < statistics.mean(low <= 0.6931 <= high for low, high in drawn) <= 1


def test_overhead_is_that_within_pairs_whatever_drifts() -> None:
    untraced = {n: Cost(clock=0.01 * (n + 1), unimpeded=0.01, thread=0.01, process=0.02) for n in range(9)}
    traced = {
        n: Cost(c.clock / 0.96, c.unimpeded / 0.98, c.thread * 1.02, c.process * 1.05) for n, c in untraced.items()
    }
    assert overhead(untraced, traced, "clock", lost=True)["median"] == pytest.approx(0.04)
    assert overhead(untraced, traced, "unimpeded", lost=True)["median"] == pytest.approx(0.02)
    assert overhead(untraced, traced, "thread")["median"] == pytest.approx(0.02)
    assert overhead({3: untraced[3]}, traced, "process") == {"median": 0.05, "interval_95": [0.05, 0.05], "pairs": 1}


def paced(lasts: dict[int, float], *, steps: int = 200) -> list[Step]:
    """Steps of 10 ms but for those in ``lasts``; each tenth is a prefill, of 30 ms; all wait for a processor, too."""
    made, at = list[Step](), 0.0
    for number in range(steps):
        prefills = number % 10 == 9
        took = lasts.get(number, 0.03 if prefills else 0.01)
        waited = number % 7 / 100
        made.append(Step(at, at + took + waited, 8, not prefills, waited))
        at += took + waited
    return made


def test_what_a_swap_adds_is_told_from_what_is_there_without_one() -> None:
    steps = paced({48: 0.012, 50: 0.013, 112: 0.05, 120: 0.014, 172: 0.011})
    moments = [(steps[n].start + 0.001, steps[n].end + 0.02) for n in (50, 120, 172)]
    found = delays(steps, moments)
    assert found["max_added_delay_ms"] == pytest.approx(4)
    assert found["max_added_delay_without_swap_ms"] == pytest.approx(2)
    assert found["added_by_swap_ms"] == {"median": 1.0, "interval_95": [1.0, 4.0], "pairs": 3}
    assert found["step_ms"] == pytest.approx(10)


def test_a_step_of_a_shape_seldom_seen_has_no_normal_length() -> None:
    steps = [*paced({}), Step(9.0, 9.5, 3, True)]
    assert len(added(steps)) == 180
