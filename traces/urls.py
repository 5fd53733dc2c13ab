"""The stream that a URL in the settings names."""

from __future__ import annotations

from pathlib import Path

from livedraft.contracts.errors import SettingsError
from livedraft.contracts.settings import Traces
from livedraft.traces.redaction import Redactor
from livedraft.traces.source import SpoolSource
from livedraft.traces.spool import SpoolWriter
from livedraft.traces.spool_sink import SpoolSink

KNOWN = ("spool://",)


def open_sink(settings: Traces, redactor: Redactor | None = None) -> SpoolSink:
    """The sink of ``settings.url``.

    Raises SettingsError for an unknown URL, TraceError when another process already writes there.
    """
    folder = spool_folder(settings.url)
    return SpoolSink(
        lambda: SpoolWriter(
            folder,
            segment_bytes=settings.segment_bytes,
            retain_bytes=settings.retain_bytes,
            fsync=settings.fsync,
        ),
        buffer_bytes=settings.buffer_bytes,
        message_bytes=settings.message_bytes,
        redactor=redactor,
    )


def open_source(settings: Traces, group: str) -> SpoolSource:
    """A source of ``settings.url`` for a consumer group.  Raises SettingsError for an unknown URL or a bad name."""
    return SpoolSource(spool_folder(settings.url), group)


def spool_folder(url: str) -> Path:
    """``spool:///a/b`` is the folder /a/b, ``spool://a/b`` is a/b of the working directory.  Raises SettingsError."""
    scheme, separator, path = url.partition("://")
    if scheme != "spool" or not separator:
        raise SettingsError(f"traces.url is {url!r}, expected one of {', '.join(KNOWN)}")
    if not path:
        raise SettingsError(f"traces.url is {url!r}, expected a folder after spool://")
    return Path(path)
