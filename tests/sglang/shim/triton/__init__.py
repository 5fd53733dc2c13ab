"""Enough of triton for SGLang's modules to be imported where no kernel of theirs runs; the wheel has a gigabyte.

Whatever is asked of it is there: submodules, types, and decorators that leave their function alone.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

__version__ = "3.6.0"


class _Type:
    """A type in triton, made with whatever arguments."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class _Name(types.ModuleType):
    """A name in triton, whatever it stands for there."""

    __path__: list[str] = []
    __file__ = __file__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = type(name, (_Type,), {}) if name[0].isupper() else _Name(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As a decorator, plain or with options; the value of anything else is never looked at."""
        if len(args) == 1 and not options and isinstance(args[0], types.FunctionType):
            return args[0]
        return _undecorated

    def __getitem__(self, _: Any) -> _Name:
        return self

    def __or__(self, _: Any) -> _Name:
        return self

    __ror__ = __or__


def _undecorated(function: Any) -> Any:
    return function


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every ``triton.*``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith("triton."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Name(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_Submodules())
_ROOT = _Name("triton")
jit: Callable[..., Any] = _ROOT.jit


def __getattr__(name: str) -> Any:
    return getattr(_ROOT, name)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is n or more."""
    return 1 << (n - 1).bit_length()
