"""``/metrics`` and ``/healthz`` of the processes that serve nothing else."""

from __future__ import annotations

import contextlib
import logging
import socketserver
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from livedraft.contracts.errors import SettingsError
from livedraft.contracts.settings import Metrics

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

log = logging.getLogger(__name__)


@contextlib.contextmanager
def observed(
    settings: Metrics, collectors: Iterable[Collector] = (), healthy: Callable[[], bool] = lambda: True
) -> Iterator[str]:
    """Answer on ``settings.host:port`` while the block runs; yields the address, "" where ``port`` is 0.

    ``/healthz`` is 503 while ``healthy`` says no.  Raises SettingsError when the address cannot be used.
    """
    if not settings.port:
        yield ""
        return
    from prometheus_client import CollectorRegistry, make_wsgi_app

    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            body: Iterable[bytes] = metrics(environ, start)
            return body
        well = healthy()
        known = environ["PATH_INFO"] == "/healthz"
        start("404 Not Found" if not known else "200 OK" if well else "503 Service Unavailable", [])
        return [b"ok\n" if known and well else b""]

    try:
        server = wsgiref.simple_server.make_server(settings.host, settings.port, answer, _Server, _Handler)
    except (OSError, OverflowError) as error:
        where = f"{settings.host}:{settings.port}"
        raise SettingsError(f"metrics.host, metrics.port: cannot listen on {where}: {error}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield f"http://{settings.host}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    """A slow scraper holds up nobody, and not our end either."""

    daemon_threads = True


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    """Silent: a health check every few seconds is no news."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
