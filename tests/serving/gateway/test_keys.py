"""Who may ask, on behalf of whom, and who may administer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from livedraft.contracts.errors import SettingsError, Unauthorized
from livedraft.serving.gateway.keys import load_keys, require_admin

from .conftest import Serve

CHAT = "/v1/chat/completions"
GUARDED = [("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/fake")]
OPEN = ["/healthz", "/readyz", "/metrics"]


def bearing(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_of_a_file_with_and_without_tenant(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team\nsk-one\n\n  sk-two  acme # since May\n")
    keys = load_keys(str(file), {"LIVEDRAFT_API_KEYS": "sk-three:bell, sk-four"})
    tenants = [keys.tenant(f"Bearer sk-{n}") for n in ("one", "two", "three", "four")]
    assert tenants == ["default", "acme", "bell", "default"]


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer sk-on", "Bearer sk-one2", "Basic sk-one", "sk-one", "Bearer schlüssel"],
)
def test_anything_else_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthorized):
        load_keys(None, {"LIVEDRAFT_API_KEYS": "sk-one"}).tenant(header)


def test_the_scheme_is_case_insensitive() -> None:
    assert load_keys(None, {"LIVEDRAFT_API_KEYS": "sk-one:acme"}).tenant("bearer sk-one") == "acme"


def test_without_keys_everybody_is_the_default_tenant() -> None:
    keys = load_keys(None, {})
    assert keys.tenant(None) == keys.tenant("Bearer anything") == "default"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no key"),
        (b"# none\n", "no key"),
        (b"ok\na b c\n", "line 2"),
        (b"\xff\xfe", "decode"),
        (None, "No such file"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=rf"api_keys_file: {file}.*{complaint}"):
        load_keys(str(file), {})


def test_a_tenant_without_a_key_is_refused() -> None:
    with pytest.raises(SettingsError, match="LIVEDRAFT_API_KEYS"):
        load_keys(None, {"LIVEDRAFT_API_KEYS": "sk-one,:acme"})


def test_a_wrong_key_gets_401_in_openais_shape(start: Serve) -> None:
    served = start(environ={"LIVEDRAFT_API_KEYS": "sk-one:acme"})
    for method, path in GUARDED:
        for headers in ({}, bearing("sk-two")):
            response = served.http.request(method, path, headers=headers)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
    for path in OPEN:
        assert served.http.get(path).status_code == 200


def test_the_key_tells_the_tenant(start: Serve, chat: dict[str, Any]) -> None:
    served = start(environ={"LIVEDRAFT_API_KEYS": "sk-one:acme,sk-shy:shy"})
    for key in ("sk-one", "sk-shy"):
        assert served.http.post(CHAT, json=chat, headers=bearing(key)).status_code == 200
    assert [(r.tenant, r.traced) for r in served.engine.submitted] == [("acme", True), ("shy", False)]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_without_an_admin_key_this_machine_administers(host: str) -> None:
    require_admin(None, None, host)


@pytest.mark.parametrize("host", [None, "", "testclient", "10.0.0.1", "::ffff:10.0.0.1", "2001:db8::1"])
def test_without_an_admin_key_nobody_else_does(host: str | None) -> None:
    with pytest.raises(Unauthorized):
        require_admin(None, "Bearer anything", host)


def test_with_an_admin_key_only_its_holder_administers() -> None:
    require_admin("root", "Bearer root", "10.0.0.1")
    for header in (None, "Bearer ", "Bearer roo"):
        with pytest.raises(Unauthorized):
            require_admin("root", header, "127.0.0.1")


def test_a_client_behind_a_local_proxy_is_not_local(start: Serve) -> None:
    served = start()
    assert served.http.get("/admin/status").status_code == 200
    for forwarded in ("203.0.113.9", "127.0.0.1, 203.0.113.9"):
        assert served.http.get("/admin/status", headers={"x-forwarded-for": forwarded}).status_code == 401


def test_an_api_key_is_not_an_admin_key(start: Serve) -> None:
    served = start(admin_key="root", environ={"LIVEDRAFT_API_KEYS": "sk-one"})

    def ask(key: str) -> httpx.Response:
        return served.http.get("/admin/status", headers=bearing(key))

    assert [ask(key).status_code for key in ("root", "sk-one")] == [200, 401]
