"""The registry of this process."""

from __future__ import annotations

import functools

from livedraft.contracts import settings
from livedraft.contracts.ports import Registry
from livedraft.swap.registry import connect


@functools.cache
def open_registry(settings: settings.Registry) -> Registry:
    """The registry that ``settings.url`` names, connecting to nothing yet.

    One object for equal settings, so that everybody in a process sees what ``memory:`` holds.  Raises SettingsError
    for another scheme.
    """
    return connect(settings)
