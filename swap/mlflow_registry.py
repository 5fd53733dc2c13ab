"""The registry on an MLflow server: logged models, registered versions, aliases, and a history of decisions.

In the UI: the experiment ``<model>`` has a run and a logged model per version (lineage as parameters, measurements
as metrics), the registered model ``<model>`` has the versions and aliases, and the experiment
``<model>-decisions`` has a run per decision (evidence as metrics), so that decisions sort, filter and plot.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import NotFound, RegistryUnavailable
from livedraft.contracts.messages import Decision, DrafterVersion, Manifest
from livedraft.swap.lineage import lineage_tags
from msgspec.structs import replace

#: MLflow's client retries for minutes by default.  A decision can wait for the next poll; the watch cannot wait
#: for the registry.
_BOUNDS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
#: What a server that answers says about our own mistakes.
_OUR_FAULT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}


class MlflowRegistry:
    """``ports.Registry`` on the MLflow server at ``url``; each request ends within ``timeout`` seconds.

    Constructing it connects to nothing.  MLflow reads its bounds from the process environment, so they are set
    there (the retries unless the operator has set them).
    """

    def __init__(self, url: str, model: str = "drafter", *, timeout: float = 10.0) -> None:
        self.url = url.rstrip("/")
        self.model = model
        for name, value in _BOUNDS.items():
            os.environ.setdefault(name, value)
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, round(timeout)))

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.url, registry_uri=self.url)

    def publish(self, folder: Path, manifest: Manifest, metrics: dict[str, float]) -> DrafterVersion:
        """As ``ports.Registry``.  Weights that are registered already keep their version."""
        checksum = checkpoint.checksum(manifest.tensors)
        tags = (
            lineage_tags(manifest) | {"checksum": checksum} | ({"parent": manifest.parent} if manifest.parent else {})
        )
        with self._asking():
            self._register_model()
            if known := self._search(f"tags.checksum = '{checksum}'"):
                return self.get(known[0].version)
            run = self._client.create_run(self._experiment(self.model), run_name=checksum[:12], tags=tags)
            logged = self._client.create_logged_model(
                run.info.experiment_id,
                name=self.model,
                source_run_id=run.info.run_id,
                tags=tags,
                params=tags,
                model_type="drafter",
            )
            self._client.log_model_artifacts(logged.model_id, str(folder))
            self._log(run.info.run_id, logged.model_id, metrics, step=0)
            self._client.finalize_logged_model(logged.model_id, "READY")
            version = self._client.create_model_version(
                self.model,
                f"models:/{logged.model_id}",
                run.info.run_id,
                tags=tags,
                description=_history(manifest),
                await_creation_for=0,
                model_id=logged.model_id,
            )
            self._client.update_run(run.info.run_id, status="FINISHED", name=f"{self.model} {version.version}")
            return self.get(version.version)

    def resolve(self, alias: str) -> DrafterVersion | None:
        """As ``ports.Registry``: one request, about 10 ms, so that it can be polled."""
        from mlflow.exceptions import MlflowException

        with self._asking():
            try:
                return _drafter(self._client.get_model_version_by_alias(self.model, alias))
            except MlflowException as error:  # an unknown model has one code, an unknown alias another
                if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                    raise
                return None

    def point(self, alias: str, version: str) -> None:
        """As ``ports.Registry``."""
        with self._asking():
            self._find(version)
            self._client.set_registered_model_alias(self.model, alias, version)

    def versions(self) -> list[DrafterVersion]:
        """As ``ports.Registry``."""
        with self._asking():
            if not (found := self._search()):
                return []
            aliases: dict[str, list[str]] = {}
            for alias, version in self._client.get_registered_model(self.model).aliases.items():
                aliases.setdefault(str(version), []).append(alias)
            experiment = self._experiment(self.model)
            measured = {m.model_id: m.metrics for m in self._pages("search_logged_models", experiment_ids=[experiment])}
            return [
                replace(_drafter(v, measured.get(_logged(v))), aliases=tuple(sorted(aliases.get(str(v.version), ()))))
                for v in found  # a search leaves aliases out
            ]

    def get(self, version: str) -> DrafterVersion:
        """As ``ports.Registry``."""
        with self._asking():
            found = self._find(version)
            return _drafter(found, self._client.get_logged_model(_logged(found)).metrics)

    def fetch(self, version: str, into: Path) -> Path:
        """As ``ports.Registry``: ``into / version``, downloaded beside it and renamed when complete."""
        from mlflow.artifacts import download_artifacts

        folder = into / version
        if folder.exists():
            return folder
        into.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=into))
        try:
            with self._asking():
                logged = self._client.get_logged_model(_logged(self._find(version)))
                got = download_artifacts(logged.artifact_location, dst_path=str(half), tracking_uri=self.url)
            Path(got).rename(folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
        return folder

    def record(self, version: str, metrics: dict[str, float], step: int = 0) -> None:
        """As ``ports.Registry``."""
        with self._asking():
            found = self._find(version)
            self._log(found.run_id, _logged(found), metrics, step)

    def decide(self, decision: Decision) -> None:
        """As ``ports.Registry``.  The same decision again changes nothing, so an unsure caller may repeat it."""
        text = msgspec.json.encode(decision).decode()
        digest = hashlib.sha256(text.encode()).hexdigest()
        with self._asking():
            experiment = self._experiment(f"{self.model}-decisions")
            if self._client.search_runs([experiment], f"tags.digest = '{digest}'", max_results=1):
                return
            about = {"action": decision.action, "candidate": decision.candidate or "", "live": decision.live or ""}
            name = f"{decision.action} {decision.candidate or decision.live or ''}".strip()
            run = self._client.create_run(
                experiment,
                run_name=name,
                tags=about | {"digest": digest, "decision": text, "mlflow.note.content": decision.reason},
            )
            self._log(run.info.run_id, None, decision.evidence, step=0)
            self._client.update_run(run.info.run_id, status="FINISHED")

    def decisions(self) -> list[Decision]:
        """As ``ports.Registry``, in the order in which they reached the server."""
        with self._asking():
            experiment = self._experiment(f"{self.model}-decisions")
            runs = self._pages("search_runs", experiment_ids=[experiment], order_by=["attributes.start_time ASC"])
            return [msgspec.json.decode(run.data.tags["decision"], type=Decision) for run in runs]

    def _find(self, version: str) -> Any:
        if not version.isdigit():
            raise NotFound(f"version {version!r} of {self.model!r}")
        return self._client.get_model_version(self.model, version)

    def _search(self, condition: str = "") -> list[Any]:
        where = f"name = '{self.model}'" + (f" AND {condition}" if condition else "")
        return list(self._pages("search_model_versions", filter_string=where, order_by=["version_number DESC"]))

    def _pages(self, method: str, **arguments: Any) -> Iterator[Any]:
        token = None
        while True:
            page = getattr(self._client, method)(**arguments, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _experiment(self, name: str) -> str:
        """The id of an experiment, made on first use."""
        from mlflow.exceptions import MlflowException

        if (found := self._client.get_experiment_by_name(name)) is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)  # another process was faster
        return str(found.experiment_id)

    def _register_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_registered_model(self.model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            with contextlib.suppress(MlflowException):  # another process was faster, or the next call fails too
                self._client.create_registered_model(self.model, description="Drafter of speculative decoding")

    def _log(self, run: str, model: str | None, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, value, now, step, model_id=model, run_id=run) for name, value in metrics.items()]
        if points:
            self._client.log_batch(run, metrics=points)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn what MLflow's client raises into what the port promises; our own mistakes crash as they are."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise NotFound(error.message) from error
            if error.error_code in _OUR_FAULT:
                raise
            raise RegistryUnavailable(f"{self.url}: {error.message}") from error


def _logged(version: Any) -> str:
    """The logged model behind a version.  (The server keeps it only as the version's source.)"""
    return str(version.source).removeprefix("models:/")


def _drafter(version: Any, measured: Iterable[Any] | None = None) -> DrafterVersion:
    """Our record of MLflow's ``ModelVersion``; of a metric's points, the one of the latest step."""
    tags = dict(version.tags)
    points = sorted(measured or (), key=lambda m: (m.step, m.timestamp))
    return DrafterVersion(
        version=str(version.version),
        checksum=tags.pop("checksum", ""),  # "" for what somebody registered by hand
        parent=tags.pop("parent", None),
        aliases=tuple(sorted(version.aliases)),
        created_at=version.creation_timestamp / 1000,
        metrics={m.key: m.value for m in points},
        tags=tags,
    )


def _history(manifest: Manifest) -> str:
    """For the registry's page: what a version has behind it."""
    learned = f"{manifest.steps:,} steps on {manifest.tokens_trained:,} tokens" if manifest.steps else "not trained"
    return learned + (f", from version {manifest.parent}" if manifest.parent else "")
