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
    ("value", "tenants"),
    [("acme", ("acme",)), ("acme, Übersee-2 ,x:y", ("acme", "Übersee-2", "x:y")), ("", ()), (" ", ())],
)
def test_the_environment_lists_by_commas(value: str, tenants: tuple[str, ...]) -> None:
    assert load(None, {"LIVEDRAFT_TRACES__OPTED_OUT": value}).traces.opted_out == tenants


def test_a_list_in_the_environment_replaces_the_file_s(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[traces]\nopted_out = ["acme"]\n[trainer]\nbetas = [0.5, 0.5]\n')
    environ = {"LIVEDRAFT_TRACES__OPTED_OUT": "other", "LIVEDRAFT_TRAINER__BETAS": "0.8, 0.9"}
    settings = load(path, environ)
    assert settings.traces.opted_out == ("other",)
    assert settings.trainer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LIVEDRAFT_TRACES__OPTED_OUT", "acme,,other", r"'acme,,other', expected entries .* by commas: .*\$\[1\]"),
        ("LIVEDRAFT_TRACES__OPTED_OUT", "acme;two words", r"'acme;two words', expected entries separated by commas"),
        ("LIVEDRAFT_TRACES__OPTED_OUT", '["acme"]', "separated by commas, without brackets"),
        ("LIVEDRAFT_TRACES__OPTED_OUTS", "acme", "there is no setting traces.opted_outs"),
        ("LIVEDRAFT_TRACE__OPTED_OUT", "acme", "there is no setting trace.opted_out"),
        ("LIVEDRAFT_ENGINE__THREADS", "many", "'many': Expected `int`"),
        ("LIVEDRAFT_TRAINER__BETAS", "0.9", "expected entries separated by commas: .*length 2"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{name}: .*{said}"):
        load(None, {name: value})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[engine]\nthread = 1\n", "thread"),
        ('[engine]\nthreads = "many"\n', "threads"),
        ("[engine\n", "a.toml"),
        ('[traces]\nfsync = "often"\n', "fsync"),
        ('[traces]\nopted_out = ["two words"]\n', "opted_out"),
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


@pytest.mark.parametrize(
    ("line", "terms"),
    [
        ("", {"forward_kl": 1.0}),
        ('objective = "lk_hybrid"', {"lk_hybrid": 1.0}),
        ("objective = { forward_kl = 0.5, ntp = 0.1 }", {"forward_kl": 0.5, "ntp": 0.1}),
    ],
)
def test_an_objective_is_a_name_or_a_table(tmp_path: Path, line: str, terms: dict[str, float]) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f"[trainer]\n{line}\n")
    assert load(path, {}).trainer.objective_terms == terms


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('objective = "kl"', r"objective: unknown 'kl', expected names of forward_kl, .*policy_gradient"),
        ("objective = { forward_kl = 1.0, hinge = 2.0 }", r"objective: unknown 'hinge'"),
        ("objective = { forward_kl = -1.0 }", r"objective: .* weights above 0"),
        ("objective = {}", r"objective: .* at least one name"),
        ('objective = "ntp"\ndiscard = 0.1', r"discard: 0.1, expected 0, or above 0 with one of forward_kl"),
        ("discard = -0.1", r"discard: -0.1"),
        ("discard_depth = -1", r"discard_depth: -1"),
        ("importance_cap = 0.0", r"importance_cap: 0.0, expected a number above 0"),
        ('parallel = "tp"', r"parallel: 'tp', expected one of ddp, fsdp2"),
    ],
)
def test_a_wrong_setting_of_the_trainer_is_refused_with_what_was_expected(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f"[trainer]\n{line}\n")
    with pytest.raises(SettingsError, match=said):
        load(path, {})
