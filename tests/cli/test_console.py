from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from livedraft.cli.console import LivedraftGroup, printable, settings_from
from livedraft.cli.wiring_registry import open_registry
from livedraft.contracts.errors import DrafterRejected, SettingsError
from livedraft.contracts.settings import Registry
from typer.testing import CliRunner, Result

from .conftest import Site


def run_raising(error: Exception) -> Result:
    app = typer.Typer(cls=LivedraftGroup, pretty_exceptions_enable=False)

    @app.command()
    def one() -> None:
        raise error

    @app.command()
    def two() -> None:
        pass

    return CliRunner().invoke(app, ["one"])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (SettingsError("a.toml: threads"), 2, "error: a.toml: threads\n"),
        (DrafterRejected("tensor fc.weight: shape [3]\nnot [4]"), 1, "error: tensor fc.weight: shape [3] not [4]\n"),
        (OSError(errno.ENOSPC, "No space left", "/spool"), 1, "error: [Errno 28] No space left: '/spool'\n"),
        (DrafterRejected("x" * 300), 1, "error: " + "x" * 300 + "\n"),
    ],
)
def test_expected_errors_are_one_line_and_a_status(error: Exception, status: int, line: str) -> None:
    result = run_raising(error)
    assert (result.exit_code, result.stderr, result.stdout) == (status, line, "")


def test_our_own_mistakes_are_not_hidden() -> None:
    assert isinstance(run_raising(ZeroDivisionError("ours")).exception, ZeroDivisionError)


def test_a_wrong_settings_file_is_named_with_its_key(site: Site) -> None:
    site.config.write_text("[traces]\nurls = 1\n")
    result = site.run("traces", "stats")
    assert result.exit_code == 2
    assert str(site.config) in result.stderr
    assert "urls" in result.stderr


def test_the_file_of_the_working_directory_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings_from(None).engine.threads == 1
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "laptop.toml").write_text("[engine]\nthreads = 3\n")
    assert settings_from(None).engine.threads == 3
    assert settings_from(None, target="mine").engine.target == "mine"


def test_printable_text_cannot_steer_a_terminal() -> None:
    assert printable("a\nb\x1b[31m ü\r") == "a⏎b·[31m ü·"


def test_a_process_has_one_registry_in_memory_for_equal_settings(tmp_path: Path) -> None:
    here, there = (
        Registry(url="memory:", folder=str(tmp_path / "a")),
        Registry(url="memory:", folder=str(tmp_path / "b")),
    )
    assert open_registry(here) is open_registry(here)
    assert open_registry(here) is not open_registry(there)


def test_an_unknown_registry_is_refused_by_its_url(site: Site) -> None:
    site.config.write_text('[registry]\nurl = "ftp://there"\n')
    result = site.run("drafts", "list")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "ftp://there" in result.stderr


def test_help_waits_for_no_heavy_import() -> None:
    code = (
        "import sys; from livedraft.cli import console, drafts, status, traces\n"
        "print(sorted({'torch', 'mlflow', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said == "[]\n"
