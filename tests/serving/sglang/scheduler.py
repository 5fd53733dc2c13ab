"""A scheduler made by hand, as far as capture sees one.  After token t its target says t + 1 and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from livedraft.serving.sglang.capture import Capture
from livedraft.serving.sglang.surface import guarded

VOCABULARY, HIDDEN = 64, 4


class Finish:
    """As SGLang's finish reasons."""

    def __init__(self, kind: str, status_code: int | None = None) -> None:
        self._told = {"type": kind, "status_code": status_code}

    def to_json(self) -> dict[str, Any]:
        return self._told


class Req:
    """As SGLang's requests."""

    def __init__(self, rid: str, prompt: Sequence[int], *, limit: int = 100, **told: Any) -> None:
        self.rid = rid
        self.origin_input_ids = [*prompt]
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(
            temperature=1.0,
            top_p=1.0,
            top_k=1,
            sampling_seed=None,
            max_new_tokens=limit,
            custom_params={"livedraft": told} if told else None,
        )
        self.extend_batch_idx = 1
        self.retracted_stain = self.is_retracted = False
        self.to_finish = self.multimodal_inputs = self.input_embeds = self.lora_id = None
        self.finished_reason: Finish | None = None
        self.finished_len: int | None = None
        #: How its next round ends it.
        self.ends: Finish | None = None

    def finished(self) -> bool:
        return self.finished_reason is not None

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids[: self.finished_len]

    @property
    def tokens(self) -> list[int]:
        return self.origin_input_ids + self.output_ids


class Scheduler:
    """Runs batches through the hooks of a capture, as SGLang would call them."""

    def __init__(self, capture: Capture, *, steps: int = 2) -> None:
        self._hooks = {hook.target.rpartition(".")[2]: hook for hook in capture.hooks}
        self.steps = steps
        body = SimpleNamespace(layers_to_capture=[1, 2, 3])
        self.worker = SimpleNamespace(
            server_args=SimpleNamespace(
                speculative_num_steps=steps, pp_size=1, disaggregation_mode="null", speculative_algorithm="EAGLE3"
            ),
            target_worker=SimpleNamespace(
                model_config=SimpleNamespace(vocab_size=VOCABULARY, hidden_size=HIDDEN),
                model_runner=SimpleNamespace(model=SimpleNamespace(model=body)),
            ),
        )

    def prefill(self, *reqs: Req, cached: int = 0, upto: int | None = None) -> None:
        """Compute positions from ``cached`` on; the last chunk (no ``upto``) commits a token."""
        batch = self._batch(reqs, extends=True)
        batch.prefix_lens = [cached] * len(reqs)
        batch.extend_lens = [len(req.tokens[cached:upto]) for req in reqs]
        ids = [req.tokens[cached:upto] for req in reqs]

        def forward(worker: Any, batch: Any) -> Any:
            self._forward([row[-1] for row in ids], [t for row in ids for t in row])
            drawn = torch.tensor([(row[-1] + 1) % VOCABULARY for row in ids])
            return SimpleNamespace(next_token_ids=drawn)

        result = self._call("_forward_prefill_batch", forward, self.worker, batch)

        def commit(processor: Any, batch: Any, result: Any) -> None:
            for req, token in zip(reqs, result.next_token_ids.tolist(), strict=True):
                if upto is None:
                    self._commit(req, [token])

        self._call("process_batch_result_prefill", commit, None, batch, result)

    def verify(self, *reqs: Req, accept: int = 1, miss: bool = False) -> Any:
        """A round in which ``accept`` drafts are right; ``miss``: its hook is not called.  Commits at once."""
        return self.commit(self.launch(*reqs, accept=accept, miss=miss))

    def launch(self, *reqs: Req, accept: int = 1, miss: bool = False) -> tuple[Any, Any]:
        """The forward pass of a round, which overlapping scheduling commits later."""
        n = self.steps + 1
        batch = self._batch(reqs, extends=False)
        tokens = torch.tensor(
            [
                [req.tokens[-1], *(req.tokens[-1] + 1 + i if i < accept else 0 for i in range(self.steps))]
                for req in reqs
            ]
        )
        batch.spec_info = SimpleNamespace(
            draft_token_num=n,
            topk=1,
            spec_steps=self.steps,
            draft_token=tokens.flatten(),
            draft_probs=torch.full((len(reqs), self.steps), -0.25),
        )

        def forward(worker: Any, batch: Any) -> Any:
            output = self._output(tokens.flatten().tolist(), tokens.flatten().tolist())
            bonus = tokens[:, accept] + 1
            return SimpleNamespace(
                logits_output=output,
                accept_lens=torch.full((len(reqs),), accept + 1),
                next_draft_input=SimpleNamespace(bonus_tokens=bonus),
                tokens=[[*row[1 : accept + 1], b] for row, b in zip(tokens.tolist(), bonus.tolist(), strict=True)],
            )

        result = forward(self.worker, batch) if miss else self._call("verify", forward, self.worker, batch)
        return batch, result

    def commit(self, launched: tuple[Any, Any]) -> Any:
        batch, result = launched

        def commit(processor: Any, batch: Any, result: Any) -> None:
            for req, tokens in zip(batch.reqs, result.tokens, strict=True):
                if not (req.finished() or req.is_retracted):
                    self._commit(req, tokens)

        return self._call("process_batch_result_decode", commit, None, batch, result)

    def abort(self, req: Req) -> None:
        """Tell a client that its request, which nobody computes now, is over."""
        self._call("send_abort_output", lambda *_: None, None, SimpleNamespace(finished_reason=None), req)

    def _commit(self, req: Req, tokens: list[int]) -> None:
        req.output_ids += tokens
        req.finished_reason = req.ends
        if len(req.output_ids) >= req.sampling_params.max_new_tokens:
            req.finished_reason = Finish("length")
            req.finished_len = req.sampling_params.max_new_tokens

    def _batch(self, reqs: Sequence[Req], *, extends: bool) -> Any:
        return SimpleNamespace(
            reqs=[*reqs],
            sampling_info=SimpleNamespace(is_all_greedy=True, temperatures=None),
            forward_mode=SimpleNamespace(is_extend=lambda: extends),
        )

    def _forward(self, ends: list[int], tokens: list[int]) -> None:
        output = SimpleNamespace(logits_output=self._output(ends, tokens))
        self._call("forward", lambda *_: output, None, None)

    def _output(self, ends: list[int], tokens: list[int]) -> Any:
        following = torch.tensor(ends) + 1
        return SimpleNamespace(
            next_token_logits=10.0 * torch.nn.functional.one_hot(following % VOCABULARY, VOCABULARY),
            hidden_states=torch.tensor(tokens).float()[:, None].repeat(1, 3 * HIDDEN),
        )

    def _call(self, name: str, original: Any, *args: Any) -> Any:
        return guarded(self._hooks[name], original, *args)
