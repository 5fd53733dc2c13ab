"""The import rules of docs/architecture.md, held by reading every file's imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "contracts": set(),
    "kernels": set(),
    "traces": {"contracts"},
    "serving": {"contracts", "kernels", "traces"},
    "trainer": {"contracts", "kernels", "traces"},
    "swap": {"contracts", "traces"},
    "cli": {"contracts", "kernels", "traces", "serving", "trainer", "swap", "benchmarks"},
    "benchmarks": {"contracts", "kernels", "traces", "serving", "trainer", "swap", "cli"},
}
FILES = [p for package in MAY_IMPORT for p in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_imports_only_what_it_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("livedraft.")}
    assert used <= MAY_IMPORT[package] | {package}


def test_contracts_use_only_the_standard_library_msgspec_and_numpy() -> None:
    allowed = set(sys.stdlib_module_names) | {"msgspec", "numpy", "safetensors", "livedraft"}
    for path in (ROOT / "contracts").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path.name


@pytest.mark.parametrize("package", ["contracts", "traces", "swap", "serving/gateway"])
def test_imports_without_torch(package: str) -> None:
    modules = [
        ".".join(("livedraft", *p.relative_to(ROOT).with_suffix("").parts)) for p in (ROOT / package).rglob("*.py")
    ]
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_folder_of_the_repository_is_a_top_level_package() -> None:
    for package in MAY_IMPORT:
        assert not (ROOT / package / "__init__.py").exists()


def test_one_file_knows_the_kafka_client() -> None:
    users = {p.relative_to(ROOT).as_posix() for p in FILES if "kafka" in {name.split(".")[0] for name in imports(p)}}
    assert users == {"traces/kafka_client.py"}


def test_a_spool_needs_no_kafka_client() -> None:
    code = "import sys, livedraft.traces.urls, livedraft.cli.main\nassert 'kafka' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_drawers() -> None:
    names = {p.stem for p in FILES}
    assert not names & {"utils", "util", "common", "base", "manager", "helpers", "misc"}


def test_only_the_plugin_knows_sglang_and_loads_without_it() -> None:
    users = {p.relative_to(ROOT).as_posix() for p in FILES if "sglang" in {name.split(".")[0] for name in imports(p)}}
    assert {user.rpartition("/")[0] for user in users} <= {"serving/sglang"}
    code = "import sys, livedraft.serving.sglang.plugin\nassert not {'torch', 'sglang', 'zmq'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
