"""The local engine without speculation against transformers' ``generate``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from livedraft.benchmarks.load import answers, greedy, interleave
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance, write
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.serving.local.engine import LocalEngine

_TOKENS = 64


def engine(place: Path | None, target: str, threads: int, repeats: int) -> None:
    """See ``livedraft bench engine --help``."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    local = LocalEngine(EngineSettings(target=target, threads=threads, draft_depth=0))
    model = AutoModelForCausalLM.from_pretrained(local.folder, dtype=torch.float32).eval()
    # One length for all, so that transformers pads nothing it would not have to.
    prompts = [local.encode(text)[:16] for text in held_out_prompts() if len(local.encode(text)) >= 16][:8]

    def transformers(batch: int) -> int:
        ids = torch.tensor(prompts[:batch])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=_TOKENS,
            min_new_tokens=_TOKENS,
            pad_token_id=0,
        )
        return int(out.shape[1] - ids.shape[1]) * batch

    def ours(batch: int) -> int:
        requests = [greedy(i, prompt, _TOKENS) for i, prompt in enumerate(prompts[:batch])]
        return sum(last.output_tokens for _, last in answers(local, requests))

    ratios, spread, speeds = {}, {}, {}
    for batch in (1, 8):
        sides: dict[str, Callable[[], int]] = {
            "transformers": partial(transformers, batch),
            "livedraft": partial(ours, batch),
        }
        rates = interleave(sides, repeats)
        pairs = [a / b for a, b in zip(rates["livedraft"], rates["transformers"], strict=True)]
        ratios[str(batch)] = round(statistics.median(pairs), 3)
        spread[str(batch)] = [round(min(pairs), 3), round(max(pairs), 3)]
        speeds[str(batch)] = {name: round(statistics.median(r), 1) for name, r in rates.items()}
    local.close()
    write(
        {
            "ratio_over_transformers": ratios,
            "spread": spread,
            "tokens_per_second": speeds,
            "threads": threads,
            "provenance": provenance(),
        },
        place,
    )
