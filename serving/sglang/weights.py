"""The drafter's parameters inside SGLang, exchanged in place.

A checkpoint becomes an ``Image``: host tensors with the shapes and types of the parameters they will be copied into,
filled by the model's own ``load_weights``.  Fused and sharded layouts are SGLang's business, then, and copying an
image cannot fail for its shape: what could go wrong has gone wrong before anything is touched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from torch import Tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Image:
    """What a checkpoint's tensors become in this rank's parameters."""

    version: str
    checksum: str
    parameters: Mapping[str, Tensor]


class LiveWeights:
    """Parameters of the running drafter, those of the target excepted.

    ``image`` and ``difference`` run on any thread and touch nothing; ``write`` belongs to the scheduler's thread,
    between two batches.  Captured graphs read the same memory afterwards.
    """

    def __init__(self, drafter: Any, target: torch.nn.Module) -> None:
        """``drafter`` is a model of SGLang's: a module with ``load_weights``."""
        self._drafter = drafter
        of_target = {parameter.data_ptr() for parameter in target.parameters()}
        self._live: dict[str, Tensor] = {n: p for n, p in drafter.named_parameters() if p.data_ptr() not in of_target}
        self._device = next(iter(self._live.values())).device
        for name, parameter in self._live.items():
            if not parameter.is_floating_point():
                raise SwapFailed(f"parameter {name} is of type {parameter.dtype}: a quantised drafter stays as it is")

    @property
    def names(self) -> frozenset[str]:
        """The parameters that an exchange writes."""
        return frozenset(self._live)

    @torch.no_grad()
    def image(self, version: str, checksum: str, tensors: Mapping[str, Tensor]) -> Image:
        """Lay ``tensors`` of a checkpoint out.  Raises DrafterRejected when they do not fill every parameter."""
        empty = {name: _like(parameter) for name, parameter in self._live.items()}
        loading, load = _Loading(self._drafter, empty), type(self._drafter).load_weights
        for name, tensor in tensors.items():
            try:
                load(loading, [(name, tensor)])
            except Exception as error:  # loaders assert; whatever they raise, it is this tensor they refuse
                raise DrafterRejected(
                    f"tensor {name}: SGLang's loader refuses its shape {tuple(tensor.shape)}"
                    f" ({type(error).__name__}: {error})"
                ) from error
        for name, parameter in empty.items():
            if not torch.isfinite(parameter).all():
                raise DrafterRejected(f"parameter {name}: the checkpoint does not fill it with finite values")
        return Image(version, checksum, {name: parameter.data for name, parameter in empty.items()})

    @torch.no_grad()
    def difference(self, image: Image) -> str | None:
        """Name of the first parameter whose bytes are not those of ``image``; None when it is what the engine holds."""
        with _aside(self._device):
            for name, parameter in self._live.items():
                if not torch.equal(_words(parameter.data.to("cpu")), _words(image.parameters[name])):
                    return name
        return None

    def settle(self) -> None:
        """Wait for everything that the device was given."""
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)

    @torch.no_grad()
    def write(self, image: Image) -> Callable[[], float]:
        """Copy ``image`` in, in the order of the current stream; the call returned waits and says how long it took."""
        started = time.perf_counter()
        copied = _stopwatch(self._device)
        for name, parameter in self._live.items():
            parameter.data.copy_(image.parameters[name], non_blocking=True)
        done = copied()
        held = time.perf_counter() - started
        return lambda: max(held, done())


class _Loading:
    """Stands for the model while its ``load_weights`` runs: the parameters are ours, all else is the model's."""

    def __init__(self, model: Any, parameters: Mapping[str, Tensor]) -> None:
        self._model = model
        self._parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """What is to be filled."""
        yield from self._parameters.items()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _like(parameter: Tensor) -> Tensor:
    """A parameter on the host that loaders take for ``parameter``, full of NaN to show what they leave out."""
    pinned = parameter.device.type != "cpu"  # so that it can be copied while the device works
    data = torch.full(parameter.shape, torch.nan, dtype=parameter.dtype, device="cpu", pin_memory=pinned)
    empty = torch.Tensor._make_subclass(type(parameter), data, False)
    empty.__dict__.update(parameter.__dict__)
    return empty


def _words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_WORDS[tensor.element_size()])


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """A stream of our own, so that reading weights waits for no batch and delays none."""
    if device.type == "cpu":
        yield
        return
    module = torch.get_device_module(device)
    with module.device(device), module.stream(module.Stream()):
        yield


def _stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Started now; its call stops it, and the call that this returns waits for the device and gives the seconds."""
    if device.type == "cpu":
        return lambda: lambda: 0.0
    module = torch.get_device_module(device)
    first, last = module.Event(enable_timing=True), module.Event(enable_timing=True)
    first.record()

    def stop() -> Callable[[], float]:
        last.record()

        def seconds() -> float:
            last.synchronize()
            return float(first.elapsed_time(last)) / 1000

        return seconds

    return stop
