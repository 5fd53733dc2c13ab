"""Where engines in processes of their own answer, and where they are administered."""

from __future__ import annotations

import re
from typing import Literal

import msgspec
from livedraft.contracts.errors import SettingsError

_HOST = r"(?:[^/\s:?#@,\[\]]+|\[[0-9a-f:]+\])"
_OURS = re.compile(rf"(?P<base>https?://{_HOST}(?::\d+)?)/?")
_SGLANG = re.compile(
    rf"sglang\+(?P<base>https?://(?P<host>{_HOST}):(?P<port>\d+))/?(?:\?(?:admin=(?P<admin>\d+)|plugin=(?P<plugin>no)))?"
)

_EXPECTED = "local:, http://host:port or sglang+http://host:port[?admin=port|?plugin=no], several separated by commas"


class EngineAddress(msgspec.Struct, frozen=True, kw_only=True):
    """One engine."""

    #: Base URL of OpenAI's routes.
    base: str
    #: Base URL of ``/admin/status`` and ``/admin/drafter``; without our plugin of SGLang's own routes.
    admin: str
    kind: Literal["livedraft", "sglang"] = "livedraft"
    #: Whether it answers at our routes; an SGLang that has no plugin does not.
    plugin: bool = True


def parse(url: str) -> tuple[EngineAddress, ...]:
    """The engines that the setting ``engine.url`` names; none for ``local:``.  Raises SettingsError.

    SGLang with our plugin is administered on a port of its own, the one after SGLang's unless ``?admin=`` says
    otherwise, and always without TLS.  With ``?plugin=no`` it has none: it is swapped over SGLang's own routes.
    """
    if url == "local:":
        return ()
    addresses = tuple(_parse_one(entry.strip()) for entry in url.split(","))
    for field in ("base", "admin"):
        named = [getattr(address, field) for address in addresses]
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise SettingsError(f"engine.url: names {twice} twice")
    return addresses


def _parse_one(entry: str) -> EngineAddress:
    if found := _OURS.fullmatch(entry):
        return EngineAddress(base=found["base"], admin=found["base"])
    if found := _SGLANG.fullmatch(entry):
        if found["plugin"]:
            return EngineAddress(base=found["base"], admin=found["base"], kind="sglang", plugin=False)
        port = int(found["admin"] or int(found["port"]) + 1)
        if 0 < port < 1 << 16:
            return EngineAddress(base=found["base"], admin=f"http://{found['host']}:{port}", kind="sglang")
    raise SettingsError(f"engine.url: {entry!r}, expected {_EXPECTED}")
