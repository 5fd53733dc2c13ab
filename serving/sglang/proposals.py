"""The drafter's log-probabilities of what it proposes, which SGLang does not keep.

A tree's likeliest children come with their probabilities; along a chain SGLang takes the best token and puts 1 for
its probability, which nothing reads.  Here that placeholder becomes the probability, and with it every proposal's
log-probability leaves the drafter in ``draft_probs``, which is empty but for rejection sampling and goes where the
proposal goes: through filtering, relaying to the next step and the replay of captured graphs (what is computed
inside ``draft_forward`` becomes part of them).

On a CPU, where the next step waits for what is computed here, the logits of a chain are left for the verify round
that follows, to be looked at by somebody else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from livedraft.serving.sglang.surface import Feature, Hook
from torch import Tensor

_WORKER = "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker"
_DRAFT = f"{_WORKER}.draft_forward"
_EXTEND = f"{_WORKER}._draft_extend_for_decode"
_EXTEND_GRAPH = "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner.EAGLEDraftExtendCudaGraphRunner.execute"
_CHILDREN = "sglang.srt.speculative.spec_utils.select_top_k_tokens"
_FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"


@dataclass(frozen=True, slots=True)
class Chain:
    """What the proposals of B chains were chosen from."""

    first: Tensor  # [B, 1] probability of the first
    logits: Sequence[Tensor]  # [B, V] of each later one

    @property
    def size(self) -> int:
        """Bytes of the logits."""
        return sum(step.nbytes for step in self.logits)

    def picked(self, pick: Callable[[Tensor], Tensor]) -> Chain:
        """Of some requests."""
        return Chain(pick(self.first), [pick(step) for step in self.logits])

    def logprobs(self) -> Tensor:
        """[B, n - 1] of the proposals."""
        return torch.cat([self.first.log(), *map(best_logprob, self.logits)], 1)


def chained(chains: Sequence[Chain]) -> Chain | None:
    """All requests of ``chains``, which are equally long; None where there are none."""
    if not chains:
        return None
    return Chain(
        torch.cat([chain.first for chain in chains]),
        [torch.cat(steps) for steps in zip(*(chain.logits for chain in chains), strict=True)],
    )


class Tap:
    """Shows the outputs of the passes inside a block to whoever asked; any model's, so ask around one's own calls."""

    def __init__(self, feature: Feature) -> None:
        self._show: Callable[[Any], None] | None = None
        self.hooks = [
            Hook(_FORWARD, self._around_forward, ("forward_batch",), feature),
            Hook(_EXTEND_GRAPH, self._around_replay, ("forward_batch", "select_index"), feature),
        ]

    @contextlib.contextmanager
    def shown(self, show: Callable[[Any], None]) -> Iterator[None]:
        """``show`` gets SGLang's ``LogitsProcessorOutput`` of each pass in this block."""
        self._show = show
        try:
            yield
        finally:
            self._show = None

    def _around_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if self._show is not None:
            self._show(output.logits_output)
        return output

    def _around_replay(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if self._show is not None:
            self._show(output)
        return output


class Proposals:
    """Hooks that make the drafter tell; ``wanted`` says whether anybody would look.

    ``later`` says of probabilities whether those that follow them are left to be computed by who looks.
    """

    def __init__(
        self,
        feature: Feature,
        tap: Tap,
        wanted: Callable[[], bool],
        later: Callable[[Tensor], bool] = lambda first: first.device.type == "cpu",
    ) -> None:
        self._tap = tap
        self._wanted = wanted
        self._later = later
        self._chain: Chain | None = None
        self._children: list[Tensor] | None = None
        self.hooks = [
            Hook(_DRAFT, self._around_draft, ("forward_batch",), feature),
            Hook(_EXTEND, self._around_extend, ("batch", "batch_result"), feature),
            Hook(_CHILDREN, self._around_children, ("topk_p",), feature),
        ]

    def take(self) -> Chain | None:
        """What the round that is verified now was chosen from, if that was left."""
        chain, self._chain = self._chain, None
        return chain

    def _around_draft(self, original: Callable[..., Any], worker: Any, forward_batch: Any) -> Any:
        """A captured graph keeps what it does here for good, wanted at the time or not."""
        self._chain = None
        if not (self._wanted() or _capturing()):
            return original(worker, forward_batch)
        if worker.topk == 1 and self._later(first := forward_batch.spec_info.topk_p):
            logits = list[Tensor]()
            with self._tap.shown(lambda output: logits.append(output.next_token_logits)):
                drafted = original(worker, forward_batch)
            if drafted[2] is not None and drafted[3] is None:
                self._chain = Chain(first, logits)
            return drafted
        if worker.topk == 1:
            steps = [first.log()]
            with self._tap.shown(lambda output: steps.append(best_logprob(output.next_token_logits))):
                parents, chosen, tokens, probabilities = original(worker, forward_batch)
        else:
            self._children = steps = []
            try:
                parents, chosen, tokens, probabilities = original(worker, forward_batch)
            finally:
                self._children = None
        if tokens is None or probabilities is not None:
            return parents, chosen, tokens, probabilities
        if worker.topk == 1:
            return parents, chosen, tokens, torch.cat(steps, 1)
        # Step i > 0 expands topk nodes of each request by topk children.
        children = torch.cat([p.view(len(tokens), -1) for p in steps], 1)
        return parents, chosen, tokens, children.gather(1, chosen).log()

    def _around_children(self, original: Callable[..., Any], i: int, topk_p: Any, *args: Any, **kwargs: Any) -> Any:
        if self._children is not None:
            self._children.append(topk_p)
        return original(i, topk_p, *args, **kwargs)

    def _around_extend(
        self, original: Callable[..., Any], worker: Any, batch: Any, batch_result: Any, **kwargs: Any
    ) -> Any:
        """The first proposal of the next round is chosen here, after the drafter has read what was committed."""
        if worker.topk != 1 or not self._wanted():
            return original(worker, batch, batch_result, **kwargs)
        outputs: list[Any] = []
        with self._tap.shown(outputs.append):
            result = original(worker, batch, batch_result, **kwargs)
        drafted = batch_result.next_draft_input
        if outputs and drafted.draft_probs is None:
            # By now its rows are those that the proposals were chosen from.
            drafted.topk_p = outputs[-1].next_token_logits.float().softmax(-1).amax(-1, keepdim=True)
        return result


def proposed(verify_input: Any, tokens: Tensor) -> Tensor | None:
    """[B, n - 1] log-probabilities of ``tokens`` [B, n], the root first; None where a round proposes nothing."""
    given: Tensor | None = verify_input.draft_probs
    if given is not None and given.dim() == 3:  # rejection sampling: whole distributions, [B, n - 1, V]
        return given.gather(2, tokens[:, 1:, None].long())[..., 0].log()
    return given


def best_logprob(logits: Tensor) -> Tensor:
    """[B, V] -> [B, 1] log-probability of each row's likeliest token."""
    return logits.float().log_softmax(-1).amax(-1, keepdim=True)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
