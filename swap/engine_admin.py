"""``ports.EngineAdmin`` over HTTP: the swap controller's handle on an engine in another process."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from typing import TypeVar

import msgspec
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import EngineStatus, SwapReceipt, SwapRequest

T = TypeVar("T")


class _Error(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    """OpenAI's error shape, as far as we read it."""

    error: _Error


class HttpEngineAdmin:
    """``GET {base}/admin/status`` and ``POST {base}/admin/drafter``, each bounded in time.

    Proxies of the environment are not used: an engine is a neighbour.  A swap that timed out may still be applied
    later; whoever asked looks at ``status`` to know.
    """

    def __init__(
        self, base: str, admin_key: str | None = None, *, timeout: float = 5.0, swap_timeout: float = 30.0
    ) -> None:
        self.base = base.rstrip("/")
        self._headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
        self._timeout = timeout
        self._swap_timeout = swap_timeout
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def status(self) -> EngineStatus:
        """As ``ports.EngineAdmin``."""
        return self._ask("/admin/status", None, self._timeout, EngineStatus)

    def swap(self, request: SwapRequest) -> SwapReceipt:
        """As ``ports.EngineAdmin``."""
        return self._ask("/admin/drafter", msgspec.json.encode(request), self._swap_timeout, SwapReceipt)

    def _ask(self, route: str, body: bytes | None, timeout: float, answer: type[T]) -> T:
        url = self.base + route
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        try:
            with self._opener.open(urllib.request.Request(url, body, headers), timeout=timeout) as response:
                return msgspec.json.decode(response.read(), type=answer)
        except urllib.error.HTTPError as error:
            with error:
                reason = _reason(error)
            if error.code == DrafterRejected.status:
                raise DrafterRejected(reason) from error
            raise SwapFailed(f"{url}: {error.code} {reason}") from error
        except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
            raise SwapFailed(f"{url}: {error}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    """The message in an error's body, else the bare status line."""
    try:
        return msgspec.json.decode(error.read(), type=_ErrorBody).error.message
    except (OSError, http.client.HTTPException, msgspec.DecodeError):
        return str(error.reason)
