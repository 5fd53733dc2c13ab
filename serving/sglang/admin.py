"""The engine's administration inside a scheduler process: what ``swap.engine_admin`` asks, on the standard library.

    GET /admin/status    EngineStatus        POST /admin/drafter    SwapRequest -> SwapReceipt

Authentication and errors are the gateway's (``serving.gateway``): the admin key or, where none is set, this machine.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
from livedraft.contracts.errors import BadRequest, BodyTooLarge, LivedraftError, NotFound
from livedraft.contracts.messages import EngineStatus, SwapReceipt, SwapRequest
from livedraft.serving.gateway.keys import require_admin
from livedraft.serving.gateway.schema import decode

log = logging.getLogger(__name__)

#: A request names a folder, a version and a checksum.
_BODY_LIMIT = 1 << 16
#: Seconds that a client may take to send its request.
_CLIENT_S = 30.0


class AdminServer:
    """Answers on a thread of its own until closed.  Raises OSError when the address is taken."""

    def __init__(
        self,
        host: str,
        port: int,
        admin_key: str | None,
        status: Callable[[], EngineStatus],
        swap: Callable[[SwapRequest], SwapReceipt],
    ) -> None:
        routes: dict[tuple[str, str], Callable[[bytes], object]] = {
            ("GET", "/admin/status"): lambda _: status(),
            ("POST", "/admin/drafter"): lambda body: swap(decode(body, SwapRequest)),
        }

        class Handler(_Handler):
            pass

        Handler.routes, Handler.admin_key = routes, admin_key
        self.host = host
        server = _Server6 if ":" in host else _Server
        self._server = server((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="livedraft-admin", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop answering; a swap that is under way goes on."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    routes: dict[tuple[str, str], Callable[[bytes], object]]
    admin_key: str | None
    timeout = _CLIENT_S
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        self._answer()

    def do_POST(self) -> None:
        """Answer."""
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Into the log of the process, which shows it when asked for."""
        log.debug("%s %s", self.address_string(), format % args)

    def _answer(self) -> None:
        try:
            body = self._body()
            require_admin(self.admin_key, self.headers.get("authorization"), str(self.client_address[0]))
            route = self.routes.get((self.command, self.path.partition("?")[0]))
            if route is None:
                raise NotFound(f"{self.command} {self.path}: the routes are GET /admin/status, POST /admin/drafter")
            status, content = 200, route(body)
        except LivedraftError as error:
            status, content = error.status, _error(error)
        except Exception:
            log.exception("%s %s failed", self.command, self.path)
            status, content = 500, _error(LivedraftError("internal error; the engine's log has it"))
        encoded = msgspec.json.encode(content)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def _body(self) -> bytes:
        length = self.headers.get("content-length", "0")
        if not length.isdecimal() or "transfer-encoding" in self.headers:
            self.close_connection = True
            raise BadRequest("expected a request with its length", field="content-length")
        if int(length) > _BODY_LIMIT:
            self.close_connection = True
            raise BodyTooLarge(f"the body has {length} bytes, the limit is {_BODY_LIMIT}")
        return self.rfile.read(int(length))


def _error(error: LivedraftError) -> dict[str, Any]:
    param = error.field if isinstance(error, BadRequest) else None
    return {"error": {"message": str(error), "type": error.kind, "param": param, "code": error.code}}
