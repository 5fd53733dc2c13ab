"""The ranks of a trainer: processes that learn as one, each with a share of the stream (torchrun starts them).

All ranks hold the same state but for two things: a trace lies on the one that read it, and under FSDP2 each has a
part of the weights.  What they decide, they decide from the same numbers; what only a clock or a signal tells is
``lead`` or ``any``.  Every method is called by all ranks, in the same order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from livedraft.contracts.errors import LivedraftError
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


class Ranks:
    """A world of one: nothing to agree on, nothing to share."""

    rank = 0
    count = 1

    def gather(self, mine: T) -> list[T]:
        """Everybody's, by rank."""
        return [mine]

    def deal(self, hands: Sequence[T] | None) -> T:
        """This rank's of the ``hands`` that rank 0 has for all; the others have none to give."""
        assert hands is not None, "rank 0 deals"
        return hands[0]

    def lead(self, ask: Callable[[], T]) -> T:
        """What ``ask`` returns or raises on rank 0, which alone is asked; nobody goes on before."""
        return ask()

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        return mine

    def sum(self, mine: Tensor) -> Tensor:
        """Over ranks, the same to the last bit on all of them."""
        return mine

    def holder(self, trace_id: str) -> int:
        """The rank for a trace that may lie on any."""
        return zlib.crc32(trace_id.encode("utf-8", "surrogatepass")) % self.count

    def leave(self) -> None:
        """End a process that has nothing left to do, where to go on to its end by itself would be a risk."""

    def parallel(self, lecture: nn.Module) -> nn.Module:
        """``lecture``, whose first output is a part of the loss, so that its gradients become those of the sum.

        May put other parameters in the place of the module's: call it before anything holds on to those.
        """
        return lecture

    def backward(self, part: Tensor) -> None:
        """Gradients of the sum over ranks, from the first output of what ``parallel`` returned."""
        torch.autograd.backward(part)

    def whole(self, tensor: Tensor) -> Tensor:
        """A weight, or what has the layout of one, complete."""
        return tensor

    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """What this rank keeps of ``whole``: the inverse of ``whole`` for the layout of ``like``."""
        return whole


class TorchRanks(Ranks):
    """The ranks of torch's default process group; weights are kept by all ("ddp") or in parts ("fsdp2")."""

    def __init__(self, kind: str) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._kind = kind

    def gather(self, mine: T) -> list[T]:
        """As ``Ranks.gather``."""
        found: list[T | None] = [None] * self.count
        dist.all_gather_object(found, mine)
        return cast("list[T]", found)

    def deal(self, hands: Sequence[T] | None) -> T:
        """As ``Ranks.deal``."""
        mine: list[T | None] = [None]
        dist.scatter_object_list(mine, None if hands is None else list(hands), src=0)
        return cast("T", mine[0])

    def lead(self, ask: Callable[[], T]) -> T:
        """As ``Ranks.lead``."""
        answer: list[_Answer[T] | None] = [_Answer(ask) if self.rank == 0 else None]
        dist.broadcast_object_list(answer, src=0)
        assert answer[0] is not None, "rank 0 has asked"
        return answer[0].get()

    def any(self, mine: bool) -> bool:
        """As ``Ranks.any``."""
        return bool(self.sum(torch.tensor(float(mine))))

    def sum(self, mine: Tensor) -> Tensor:
        """As ``Ranks.sum``."""
        total = mine.clone()
        dist.all_reduce(total)
        return total

    def leave(self) -> None:
        """As ``Ranks.leave``: under torch 2.13 a rank that was done has been seen to abort on its way out.

        It said "terminate called without an active exception".
        """
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def parallel(self, lecture: nn.Module) -> nn.Module:
        """As ``Ranks.parallel``."""
        part = _Part(lecture)
        device = next(part.parameters()).device
        if self._kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            return DistributedDataParallel(part, forward_sync_buffers=False)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # One group, as a drafter is one layer: its parameters are gathered once a step.
        fully_shard(part, mesh=init_device_mesh(device.type, (self.count,)))
        return part

    def backward(self, part: Tensor) -> None:
        """As ``Ranks.backward``."""
        torch.autograd.backward(part * self.count)  # what they make of the ranks' gradients is the mean

    def whole(self, tensor: Tensor) -> Tensor:
        """As ``Ranks.whole``."""
        if self._kind == "ddp":
            return tensor
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """As ``Ranks.share``."""
        if self._kind == "ddp":
            return whole
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor):
            return whole
        # All have all of it, so nothing is sent.
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def joined(kind: str) -> Iterator[Ranks]:
    """The ranks among which torchrun started this process; a world of one without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, count = next(iter(rendezvous("env://")))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store through restarts, and addresses of the dead would be taken for those of the living.
        # (On several machines the count of restarts is not the same on all: the runbook says what to set there.)
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # What is not on a GPU, as all that is agreed on, goes over gloo.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        yield TorchRanks(kind)
    finally:
        dist.destroy_process_group()


class _Answer(Generic[T]):
    """A value or an error, to be sent."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._value: T | None = None
        self._error: Exception | None = None
        try:
            self._value = ask()
        except (LivedraftError, OSError) as error:
            self._error = error

    def get(self) -> T:
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


class _Part(nn.Module):
    """Every parameter takes part on every rank, if only with a gradient of 0: the reduction waits for all of them."""

    def __init__(self, lecture: nn.Module) -> None:
        super().__init__()
        self.lecture = lecture

    def forward(self, *given: Any) -> tuple[Any, ...]:
        part, *rest = self.lecture(*given)
        learned = [p.sum() for p in self.parameters() if p.requires_grad]
        return part + 0 * torch.stack(learned).sum(), *rest
