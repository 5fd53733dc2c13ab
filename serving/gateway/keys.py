"""API keys: who may ask, and on behalf of which tenant."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from livedraft.contracts.errors import SettingsError, Unauthorized

ENVIRONMENT = "LIVEDRAFT_API_KEYS"
#: In which a gateway tells an engine whose request it is.
TENANT_HEADER = "x-livedraft-tenant"
DEFAULT_TENANT = "default"


class Keys:
    """Known API keys with their tenants.  Without any, everybody may ask as the default tenant.

    ``engine_key`` is a gateway's: its holder has authenticated the client and names the tenant.  It is a secret and
    not an address, because addresses are shared and forged.  An engine that has one asks everybody for a key.

    Only digests are kept, and every one is compared in constant time, so that neither memory nor timing
    tells a key.
    """

    def __init__(self, tenants: Mapping[str, str], engine_key: str | None = None) -> None:
        self._tenants = {_digest(key): tenant for key, tenant in tenants.items()}
        self._gateway = _digest(engine_key) if engine_key else None

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._tenants) or self._gateway is not None

    def tenant(self, authorization: str | None, on_behalf_of: str | None = None) -> str:
        """Tenant of an ``Authorization: Bearer KEY`` header; ``on_behalf_of`` counts with the gateway's key alone.

        Raises Unauthorized.
        """
        if not self:
            return DEFAULT_TENANT
        offered = _digest(bearer(authorization))
        if self._gateway is not None and hmac.compare_digest(self._gateway, offered):
            return unquote(on_behalf_of or DEFAULT_TENANT)
        matches = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(known, offered)]
        if not matches:
            raise Unauthorized("missing or wrong API key; send it as `Authorization: Bearer KEY`")
        return matches[0]


def load_keys(path: str | None, environ: Mapping[str, str], engine_key: str | None = None) -> Keys:
    """Keys of a file and of the environment's ``LIVEDRAFT_API_KEYS``.

    The file has ``key`` or ``key tenant`` a line and # comments, the variable ``key`` or ``key:tenant`` by commas.
    Raises SettingsError naming the file and line, also when a file is named that holds no key: an empty list
    of keys would open the endpoint to everybody.
    """
    tenants = _read(Path(path)) if path else {}
    for entry in filter(None, map(str.strip, environ.get(ENVIRONMENT, "").split(","))):
        key, _, tenant = entry.partition(":")
        if not key:
            raise SettingsError(f"{ENVIRONMENT}: an entry has no key, expected key or key:tenant")
        tenants[key] = tenant or DEFAULT_TENANT
    return Keys(tenants, engine_key)


def require_admin(admin_key: str | None, authorization: str | None, host: str | None) -> None:
    """Let an administrator pass: the admin key's holder or, where no key is set, a client on this machine.

    ``host`` is the client's address.  Raises Unauthorized.  Behind a reverse proxy on the same machine set a
    key: every client looks local there.
    """
    if admin_key is not None:
        if not hmac.compare_digest(_digest(admin_key), _digest(bearer(authorization))):
            raise Unauthorized("missing or wrong admin key; send it as `Authorization: Bearer KEY`")
    elif not _is_loopback(host):
        raise Unauthorized("admin routes answer only to this machine until gateway.admin_key is set")


def bearer(authorization: str | None) -> str:
    """The token of a Bearer header, "" where there is none."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"gateway.api_keys_file: {path}: {error}") from error
    tenants = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if len(words) > 2:
            raise SettingsError(f"gateway.api_keys_file: {path}, line {number}: expected `key` or `key tenant`")
        if words:
            tenants[words[0]] = words[1] if len(words) == 2 else DEFAULT_TENANT
    if not tenants:
        raise SettingsError(f"gateway.api_keys_file: {path}: holds no key")
    return tenants


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_loopback(host: str | None) -> bool:
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
