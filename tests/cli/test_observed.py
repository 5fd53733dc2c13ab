"""Health and metrics of the processes that serve nothing else."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest
from livedraft.cli.collectors import ControllerCollector, TrainerCollector
from livedraft.cli.observed import observed
from livedraft.cli.ports import free_port
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import Decision
from livedraft.contracts.settings import Metrics, Trainer
from livedraft.swap.journal import Journal


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_health_follows_the_process() -> None:
    well = [True]
    with observed(Metrics(port=free_port()), healthy=lambda: well[0]) as url:
        assert get(f"{url}/healthz") == (200, "ok\n")
        well[0] = False
        assert get(f"{url}/healthz")[0] == 503
        assert get(f"{url}/")[0] == 404
    with pytest.raises(urllib.error.URLError):
        get(f"{url}/healthz")


def test_trainer_and_controller_tell_what_is_on_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    collectors = [TrainerCollector(Trainer(folder=str(tmp_path))), ControllerCollector(journal)]
    with observed(Metrics(port=free_port()), collectors) as url:
        assert "livedraft_trainer" not in get(f"{url}/metrics")[1]
        (tmp_path / "progress.json").write_text(
            '{"steps": 3, "tokens": 40, "tokens_per_s": 1.0, "lag": 5, "at": 0.0, "loss": 2.5}'
        )
        for at, action in enumerate(("reject", "promote", "reject")):
            journal.append(Decision(action=action, reason="", candidate=str(at), at=float(at)))  # type: ignore[arg-type]
        text = get(f"{url}/metrics")[1]
        (tmp_path / "progress.json").write_text(
            '{"steps": 4, "tokens": 50, "tokens_per_s": 1.0, "lag": null, "at": 0.0}'
        )
        later = get(f"{url}/metrics")[1]
    assert "livedraft_trainer_steps_total 4.0" in later
    assert "livedraft_trainer_lag" not in later  # nobody knows
    for line in (
        "livedraft_trainer_steps_total 3.0",
        "livedraft_trainer_tokens_total 40.0",
        "livedraft_trainer_lag_records 5.0",
        "livedraft_trainer_loss 2.5",
        'livedraft_decisions_total{action="reject"} 2.0',
        'livedraft_decisions_total{action="promote"} 1.0',
    ):
        assert line in text.splitlines()


def test_port_0_is_silence_and_a_taken_one_is_named() -> None:
    with observed(Metrics()) as url:
        assert url == ""
    port = free_port()
    with (
        observed(Metrics(port=port)),
        pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{port}"),
        observed(Metrics(port=port)),
    ):
        pass
