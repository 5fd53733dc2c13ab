"""A fake engine behind the two admin routes of the gateway."""

from __future__ import annotations

import http.server
import threading
from types import TracebackType

import msgspec
from livedraft.contracts.errors import LivedraftError, Unauthorized
from livedraft.contracts.messages import SwapRequest

from .fakes import FakeEngine


class EngineServer:
    """Serves ``engine`` on a free port from a thread."""

    def __init__(self, engine: FakeEngine, admin_key: str | None = None) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer("/admin/status", lambda: engine.status())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer("/admin/drafter", lambda: engine.swap(msgspec.json.decode(body, type=SwapRequest)))

            def _answer(self, route: str, make: object) -> None:
                assert callable(make)
                status, answer = 200, None
                try:
                    if admin_key and self.headers["Authorization"] != f"Bearer {admin_key}":
                        raise Unauthorized("wrong key")
                    assert self.path == route
                    answer = make()
                except LivedraftError as error:
                    status = error.status
                    answer = {"error": {"message": str(error), "type": error.kind, "code": error.code}}
                body = msgspec.json.encode(answer)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> EngineServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
