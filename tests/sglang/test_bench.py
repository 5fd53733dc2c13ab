"""What the benchmark takes and refuses before it starts anything."""

from __future__ import annotations

import pytest
import torch

from .bench import arguments


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
