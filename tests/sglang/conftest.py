"""Servers and drafters that tests share: a start takes some 20 seconds."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from livedraft.cli.prompts import held_out_prompts

from . import drafters
from .plugged import Engine, capturing, engine
from .relay import Relay
from .server import Server, Speculation, serving

if find_spec("sglang") is None or find_spec("sgl_kernel") is None:
    raise pytest.UsageError("SGLang is not installed here; `make test-sglang` runs these tests in an environment of it")

#: Tokens of prompt read at once, so that ordinary prompts take several turns.
CHUNKED = ["--chunked-prefill-size=64"]


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Prose and code in turn; the trained drafter has learned the answers to them."""
    return held_out_prompts()[:8]


@pytest.fixture(scope="session")
def fresh_drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows nothing of the target but its head."""
    folder = tmp_path_factory.mktemp("drafters") / "fresh"
    drafters.write_fresh(folder)
    return folder


@pytest.fixture(scope="session")
def trained_drafter(fresh_drafter: Path, prompts: list[str]) -> Path:
    """A checkpoint of the same shapes that has learned the first 48 greedy tokens after each of ``prompts``."""
    folder = fresh_drafter.with_name("trained")
    drafters.write_trained(folder, fresh_drafter, prompts)
    return folder


@pytest.fixture(scope="session")
def imported_drafter(trained_drafter: Path) -> Path:
    """``trained_drafter`` as somebody else would have published it, imported."""
    folder = trained_drafter.with_name("imported")
    drafters.write_imported(folder, trained_drafter, trained_drafter.with_name("published"))
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Without speculation; the plugin, which asks for the key "secret", finds nothing to do there."""
    with engine(tmp_path_factory.mktemp("plain"), None, key="secret") as one:
        yield one


@pytest.fixture(scope="session")
def plain_server(plain: Engine) -> Server:
    """Without speculation."""
    return plain.server


@pytest.fixture(scope="session")
def chain_server(tmp_path_factory: pytest.TempPathFactory, imported_drafter: Path) -> Iterator[Server]:
    """EAGLE-3 chains of 3 by the trained drafter, without the plugin; its log has what every request asked for."""
    arguments = [*CHUNKED, "--log-requests", "--log-requests-level=1", "--enable-metrics"]
    with serving(tmp_path_factory.mktemp("chain"), Speculation(imported_drafter), arguments=arguments) as server:
        yield server


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory, trained_drafter: Path) -> Iterator[tuple[Server, Relay]]:
    """EAGLE-3 trees of 8 nodes by the trained drafter, captured."""
    folder = tmp_path_factory.mktemp("tree")
    with capturing(folder, Speculation(trained_drafter, topk=4), CHUNKED) as captured:
        yield captured


@pytest.fixture(scope="session")
def tree_server(tree: tuple[Server, Relay]) -> Server:
    """EAGLE-3 trees of 8 nodes by the trained drafter."""
    return tree[0]


@pytest.fixture(scope="session")
def swapping(tmp_path_factory: pytest.TempPathFactory, fresh_drafter: Path) -> Iterator[Engine]:
    """Chains of 3 by the fresh drafter, with the plugin: whoever exchanges it puts it back."""
    with engine(tmp_path_factory.mktemp("swapping"), Speculation(fresh_drafter)) as one:
        one.started()
        yield one
