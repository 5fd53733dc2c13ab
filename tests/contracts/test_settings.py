from __future__ import annotations

from pathlib import Path

import pytest
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.settings import Settings, load

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_file_parses(path: Path) -> None:
    assert isinstance(load(path, {}), Settings)


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[engine]\nthreads = 1\n")
    assert load(path, {"LIVEDRAFT_ENGINE__THREADS": "3"}).engine.threads == 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[engine]\nthread = 1\n", "thread"),
        ('[engine]\nthreads = "many"\n', "threads"),
        ("[engine\n", "a.toml"),
        ('[traces]\nfsync = "often"\n', "fsync"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=named):
        load(path, {})


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml"):
        load(tmp_path / "absent.toml", {})
