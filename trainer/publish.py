"""From the learner to the registry, without making the learner wait."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from pathlib import Path

from livedraft.contracts import checkpoint
from livedraft.contracts.errors import RegistryUnavailable
from livedraft.contracts.messages import Manifest
from livedraft.contracts.ports import Registry
from livedraft.trainer.learner import Learner

_log = logging.getLogger(__name__)


class Onlooker:
    """A publisher's place on ranks that do not publish: they take part in putting the candidate together."""

    latest: str | None = None
    outlived = False

    def offer(self, learner: Learner, metrics: dict[str, float]) -> None:
        """As ``Publisher.offer``, without a folder."""
        learner.candidate()

    def close(self, timeout: float = 10.0) -> None:
        """Nothing waits."""


class Publisher:
    """Publishes candidates on a thread of its own; a newer one replaces one still waiting.

    publisher.offer(learner, metrics)     # writes the folder, returns at once
    ...
    publisher.close()                     # a last try for what waits

    ``lineage`` is that of the drafter that learns.  Once the live version is of another one, ``outlived`` is true: what
    is learned here would not be served.
    """

    def __init__(
        self,
        registry: Registry,
        folder: Path,
        *,
        parent: str | None = None,
        lineage: str = "",
        retry_s: float = 5.0,
        look_s: float = 5.0,
    ) -> None:
        self._registry = registry
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier start; its weights live in the checkpoint
        self._retry_s = retry_s
        self._look_s = look_s
        self._lineage = lineage
        self.outlived = False
        self._waiting: tuple[Path, Manifest, dict[str, float]] | None = None
        self._closing = False
        self._changed = threading.Condition()
        #: Version published last.
        self.latest = parent
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def offer(self, learner: Learner, metrics: dict[str, float]) -> Path:
        """Write the learner's candidate as a folder and queue it for the registry; returns the folder.

        It is deleted once the registry has it, or a newer one has taken its place.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the publisher's thread has died: nothing more would be published")
        arrays = learner.candidate()
        manifest = Manifest(
            tensors=checkpoint.hash_tensors(arrays),
            target=learner.target.target,
            target_revision=learner.target.target_revision,
            tokenizer_hash=learner.target.tokenizer_hash,
            parent=self.latest,
            offsets=dict(learner.offsets),
            tokens_trained=learner.tokens,
            steps=learner.steps,
            created_at=time.time(),
        )
        # Named by content: a restart that learns the same again finds its folder there.
        place = self._folder / f"{learner.steps:010d}-{checkpoint.checksum(manifest.tensors)[:12]}"
        if not place.exists():
            manifest = checkpoint.write(place, learner.drafter.config, arrays, manifest)
        with self._changed:
            replaced, self._waiting = self._waiting, (place, manifest, metrics)
            self._changed.notify()
        if replaced and replaced[0] != place:
            shutil.rmtree(replaced[0], ignore_errors=True)
        return place

    def close(self, timeout: float = 10.0) -> None:
        """Try once more to publish what waits, then stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing, self._look_s)
                job = self._waiting
            if job is None and self._closing:
                return
            if not self._closing:
                self._look()
            if self.outlived:
                with self._changed:
                    self._waiting = job = None
            if job is None:
                continue
            if not self._publish(*job):
                with self._changed:
                    if self._changed.wait_for(lambda: self._closing, self._retry_s):
                        return

    def _look(self) -> None:
        """Whether what is live is still what we learn for; a registry that is away is asked again later."""
        with contextlib.suppress(RegistryUnavailable):
            live = self._registry.resolve("live")
            known = live.tags.get("lineage") if live else None
            self.outlived = bool(known and self._lineage and known != self._lineage)

    def _publish(self, place: Path, manifest: Manifest, metrics: dict[str, float]) -> bool:
        try:
            version = self._registry.publish(place, manifest, metrics).version
            self._registry.point("candidate", version)
        except RegistryUnavailable as error:
            _log.warning("registry: %s; candidate %s waits", error, place.name)
            return False
        self.latest = version
        with self._changed:
            if self._waiting is not None and self._waiting[0] == place:
                self._waiting = None
        shutil.rmtree(place, ignore_errors=True)
        return True
