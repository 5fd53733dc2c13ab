"""The files of a deployment agree with their schemas, with one another and with the program."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from livedraft.contracts import metrics
from livedraft.contracts.settings import Settings, load

from .composition import ROOT, Image, container_ports, read_compose, read_env, seconds
from .conftest import SECRETS, tool

OURS = ("engine", "gateway", "relay", "trainer", "controller")


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load(ROOT / "configs" / "compose.toml", {})


def test_compose_file_is_valid() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_dockerfile_has_nothing_to_complain_about() -> None:
    run(tool("hadolint"), "--failure-threshold", "info", "Dockerfile")


def test_prometheus_takes_its_configuration() -> None:
    run(tool("promtool"), "check", "config", "deploy/prometheus.yml")


def test_without_its_secrets_the_stack_does_not_start() -> None:
    example = read_env(ROOT / ".env.example")
    for name in SECRETS:
        with pytest.raises(KeyError, match=f"{name}: set it in .env"):
            read_compose(example | {key: value for key, value in SECRETS.items() if key != name})


def test_every_variable_is_explained_in_the_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    assert used | {"COMPOSE_PROFILES"} == set(read_env(ROOT / ".env.example"))


def test_ports_are_bound_to_this_machine_unless_asked_otherwise() -> None:
    for name, service in read_compose(SECRETS)["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"


def test_images_are_pinned_and_ours_run_as_nobody_special(composed: dict[str, Any], images: dict[str, Image]) -> None:
    for base in re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.M):
        assert base in images or re.fullmatch(
            r"python:\d+\.\d+\.\d+-slim-bookworm|lmsysorg/sglang:v\d+\.\d+\.\d+", base
        )
    for name, service in composed["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        if "build" in service:
            assert images[service["build"]["target"]].user.isdigit(), name
            assert service["cap_drop"] == ["ALL"], name


def test_every_process_of_ours_has_what_an_operator_expects(composed: dict[str, Any], settings: Settings) -> None:
    for name in OURS:
        service = composed["services"][name]
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["init"] is True
        # Drain, flush, and a moment to load off what is left.
        assert seconds(service["stop_grace_period"]) > settings.gateway.drain_s + 15
        assert service["command"][0] == name


def test_folders_of_volumes_belong_to_the_user_of_the_image(composed: dict[str, Any], images: dict[str, Image]) -> None:
    for name in (*OURS, "drafter", "sglang"):
        service = composed["services"][name]
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            if source in composed["volumes"]:
                assert target in images[service["build"]["target"]].run, f"{name}: {target} is not made in the image"


def test_the_engine_reads_what_the_controller_writes(composed: dict[str, Any], settings: Settings) -> None:
    mounts = {name: composed["services"][name]["volumes"] for name in ("engine", "controller")}
    assert f"swap:{settings.swap.folder}:ro" in mounts["engine"]
    assert f"swap:{settings.swap.folder}" in mounts["controller"]


def test_addresses_in_the_settings_are_services_that_listen(composed: dict[str, Any], settings: Settings) -> None:
    addresses = {settings.traces.url, settings.registry.url, *(engine.base for engine in settings.engine.remote)}
    addresses.add(composed["services"]["engine"]["environment"]["LIVEDRAFT_TRACES__URL"])
    for address in addresses:
        host, port = address.split("://")[1].split(":")
        service = composed["services"][host]
        inside = f"{host}:{port}" in str(service.get("environment", ""))  # Kafka's second listener
        assert int(port) in container_ports(service) or inside, address


# With SGLang on a GPU.


def settings_of(composed: dict[str, Any], name: str) -> Settings:
    """The settings of a service's process: the file, and the service's environment."""
    said = composed["services"][name]["environment"]
    # YAML makes numbers and nothings of what to Compose are strings.
    environment = {key: "" if value is None else str(value) for key, value in said.items()}
    return load(ROOT / "configs" / "compose.toml", environment)


def option(composed: dict[str, Any], name: str) -> str:
    """A value on SGLang's command line."""
    [value] = [
        word.partition("=")[2] for word in composed["services"]["sglang"]["command"] if word.startswith(name + "=")
    ]
    return str(value)


def test_profiles_share_all_but_the_engine(composed: dict[str, Any], composed_gpu: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles") for name, service in composed_gpu["services"].items()}
    assert {name: found for name, found in profiles.items() if found} == {
        "engine": ["cpu"],
        "drafter": ["gpu"],
        "sglang": ["gpu"],
    }
    [ours] = settings_of(composed, "gateway").engine.remote
    assert (ours.base, ours.kind) == ("http://engine:8000", "livedraft")


def test_gateway_and_controller_reach_sglang_and_its_plugin(composed_gpu: dict[str, Any]) -> None:
    service = composed_gpu["services"]["sglang"]
    for name in ("gateway", "controller"):
        settings = settings_of(composed_gpu, name)
        [engine] = settings.engine.remote
        assert engine.kind == "sglang"
        for address in (engine.base, engine.admin):
            host, port = address.removeprefix("http://").split(":")
            assert host == "sglang"
            assert int(port) in container_ports(service)
        assert settings.gateway.admin_key == settings_of(composed_gpu, "sglang").gateway.admin_key == "admin"
    assert option(composed_gpu, "--port") == "30000"
    plugin = settings_of(composed_gpu, "sglang").sglang
    assert (plugin.admin_host, plugin.admin_port) == ("0.0.0.0", 0)  # the port after SGLang's
    assert option(composed_gpu, "--api-key") == settings_of(composed_gpu, "gateway").gateway.engine_key


def test_everybody_begins_with_the_drafter_that_sglang_is_started_with(composed_gpu: dict[str, Any]) -> None:
    folder = option(composed_gpu, "--speculative-draft-model-path")
    assert f"--out={folder}" in composed_gpu["services"]["drafter"]["command"]
    for name in ("trainer", "controller"):
        assert settings_of(composed_gpu, name).engine.drafter == folder
    for name in ("drafter", "sglang", "trainer", "controller"):
        service = composed_gpu["services"][name]
        assert any(volume.startswith("drafter:/var/lib/livedraft/drafter") for volume in service["volumes"])
        assert settings_of(composed_gpu, name).engine.target == option(composed_gpu, "--model-path")
    assert composed_gpu["services"]["sglang"]["depends_on"]["drafter"]["condition"] == "service_completed_successfully"


def test_sglang_drafts_as_deep_as_the_gate_reckons_and_reads_what_it_swaps(composed_gpu: dict[str, Any]) -> None:
    settings = settings_of(composed_gpu, "controller")
    assert int(option(composed_gpu, "--speculative-num-steps")) == settings.engine.draft_depth
    assert int(option(composed_gpu, "--speculative-num-draft-tokens")) == settings.engine.draft_depth + 1
    service = composed_gpu["services"]["sglang"]
    assert f"swap:{settings.swap.folder}:ro" in service["volumes"]
    assert settings_of(composed_gpu, "sglang").traces.url == "relay+tcp://relay:5555"
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "/health" in service["healthcheck"]["test"][-1]


def test_topics_are_those_that_the_settings_name(composed: dict[str, Any], settings: Settings) -> None:
    script = composed["services"]["kafka-init"]["command"][0]
    made = dict(re.findall(r"--topic (\S+) --partitions (\d+)", script))
    prefix = settings.kafka.prefix
    assert set(made) == {f"{prefix}.{name}" for name in ("traces", "drafts", "swaps", "dead")}
    assert int(made[f"{prefix}.traces"]) == settings.kafka.partitions
    assert f"max.message.bytes={settings.kafka.max_message_bytes}" in script
    assert f"retention.ms={settings.kafka.retention_hours * 3600_000:.0f}" in script
    assert f"retention.bytes={settings.kafka.retention_bytes}" in script
    broker = int(composed["services"]["kafka"]["environment"]["KAFKA_MESSAGE_MAX_BYTES"])
    assert broker >= settings.kafka.max_message_bytes


def test_prometheus_scrapes_every_process_of_ours(composed: dict[str, Any]) -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    found = {job["job_name"]: job for job in scraped}
    assert set(found) == {*OURS, "sglang"}
    for name in OURS:
        [static] = found[name]["static_configs"]
        for target in static["targets"]:
            host, port = target.split(":")
            assert host == name
            assert int(port) in container_ports(composed["services"][host])


def test_prometheus_finds_the_replicas_of_sglang_which_tell_their_metrics(composed_gpu: dict[str, Any]) -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    [job] = [job for job in scraped if job["job_name"] == "sglang"]
    [found] = job["dns_sd_configs"]
    assert (found["names"], found["type"]) == (["sglang"], "A")
    assert found["port"] == int(option(composed_gpu, "--port"))
    assert "--enable-metrics" in composed_gpu["services"]["sglang"]["command"]


def test_grafana_is_provisioned_with_what_is_mounted(composed: dict[str, Any]) -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert int(port) in container_ports(composed["services"][host])
    [provider] = yaml.safe_load((provisioning / "dashboards/livedraft.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in composed["services"]["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"


DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
NAMES = {value for name, value in vars(metrics).items() if name.isupper()}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_a_dashboard_asks_for_metrics_that_the_contract_names(path: Path) -> None:
    """SGLang's have a dashboard of their own, which the tests of SGLang hold against a server."""
    dashboard = json.loads(path.read_text())
    asked = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "prometheus"
        for target in panel["targets"]:
            found = re.findall(r"\blivedraft_\w+", target["expr"])
            assert found or target["expr"] == "up" or path.stem == "sglang", target
            asked |= {re.sub(r"_(total|bucket|sum|count|info)$", "", name) for name in found}
    assert asked <= NAMES
    assert path.stem == "sglang" or NAMES - asked <= {metrics.REPLICA_UP}, "the dashboard leaves a metric out"


def test_panels_do_not_overlap() -> None:
    for path in DASHBOARDS:
        taken = set()
        for panel in json.loads(path.read_text())["panels"]:
            at = panel["gridPos"]
            for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
                assert cell not in taken
                assert cell[0] < 24
                taken.add(cell)


def test_the_build_sees_the_package_and_nothing_of_ours_besides() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {package.split(".")[1] for package in project["tool"]["setuptools"]["packages"]}
    files = {"pyproject.toml", project["project"]["readme"], "LICENSE"}
    assert allowed == packages | files
