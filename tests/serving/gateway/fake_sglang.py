"""An SGLang server of recorded answers: what 0.5.23 said, with EAGLE-3 and without, to the requests its names tell."""

from __future__ import annotations

import http.server
import json
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

RECORDED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("sglang_0_5_23.json").read_text())


class FakeSglang:
    """Serves on a free port from a thread; its plugin's administration on another.

    ``says`` names the recorded answer to everything, by default the one that fits the request.  ``step_s`` seconds
    pass before each event of a stream; a client that left is counted in ``left``.  ``drafter`` None: no plugin.
    """

    def __init__(
        self,
        says: str | None = None,
        *,
        step_s: float = 0.0,
        drafter: str | None = "7",
        api_key: str | None = None,
        admin_key: str | None = None,
        knows_ready: bool = True,
    ) -> None:
        self.says = says
        self.step_s = step_s
        self.drafter = drafter
        self.ready = True
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.probes: list[str] = []
        self.left = 0
        outer = self

        class Sglang(_Quiet):
            def do_GET(self) -> None:
                if self.path in ("/ready", "/health"):
                    outer.probes.append(self.path)
                    known = knows_ready or self.path == "/health"
                    self.answer(404 if not known else 200 if outer.ready else 503, "text/plain", b"")
                else:
                    names = {"/v1/models": "models", "/v1/models/none": "model unknown"}
                    self.say(names.get(self.path, "no route"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                if api_key and self.headers["Authorization"] != f"Bearer {api_key}":
                    self.say("no key")
                elif "application/json" not in self.headers.get("Content-Type", ""):
                    self.say("bad value")
                else:
                    self.say(outer.says or _fitting(self.path, body), body)

            def say(self, name: str, asked: dict[str, Any] | None = None) -> None:
                recorded = RECORDED[name]
                body = _told(recorded["body"], asked or {})
                if not recorded["content_type"].startswith("text/event-stream"):
                    if asked:
                        time.sleep(outer.step_s)
                    self.answer(recorded["status"], recorded["content_type"], body.encode())
                    return
                self.send_response(200)
                self.send_header("Content-Type", recorded["content_type"])
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    for event in body.split("\n\n")[:-1]:
                        time.sleep(outer.step_s)
                        self.wfile.write(event.encode() + b"\n\n")
                except OSError:
                    outer.left += 1

        class Plugin(_Quiet):
            def do_GET(self) -> None:
                if admin_key and self.headers["Authorization"] != f"Bearer {admin_key}":
                    self.answer(401, "application/json", b'{"error": {"message": "wrong key"}}')
                    return
                assert self.path == "/admin/status"
                status = {"engine": "sglang", "drafter": outer.drafter, "drafter_checksum": "c", "capture": True}
                self.answer(200, "application/json", json.dumps(status).encode())

        self._server, self._plugin = (
            http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (Sglang, Plugin)
        )
        self._running = [self._server] + ([self._plugin] if drafter is not None else [])
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in self._running]
        self.base = f"http://127.0.0.1:{self._server.server_port}"
        self.url = f"sglang+{self.base}?admin={self._plugin.server_port}"

    def __enter__(self) -> FakeSglang:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server, thread in zip(self._running, self._threads, strict=True):
            server.shutdown()
            thread.join()
        self._server.server_close()
        self._plugin.server_close()


class _Quiet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _fitting(path: str, body: dict[str, Any]) -> str:
    usage = " usage" if (body.get("stream_options") or {}).get("include_usage") else ""
    stream = " stream" + usage if body.get("stream") else ""
    if path == "/v1/completions":
        return "completion" + stream + (" 2 prompts" if isinstance(body["prompt"], list) else "")
    if body.get("max_tokens") == 1:
        return "chat 1 token"
    return "chat" + stream + (" 2 choices" if body.get("n") == 2 else "")


def _told(body: str, asked: dict[str, Any]) -> str:
    """The recorded answer under the request's id, telling of speculation only what was asked for."""
    if (rid := asked.get("rid")) and (asked.get("n") or 1) == 1:
        recorded = body.partition('"id":"')[2].partition('"')[0]
        if recorded:
            body = body.replace(f'"id":"{recorded}"', f'"id":"{rid}"')
    if asked and not asked.get("return_spec_tokens_details"):
        kept = []
        for event in body.split("\n\n"):
            head, found, _ = event.partition(',"sglext":{')
            if found and '"choices":[]' in head:
                continue  # in a stream it is a chunk of its own
            kept.append(head + "}" if found else event)
        body = "\n\n".join(kept)
    return body
