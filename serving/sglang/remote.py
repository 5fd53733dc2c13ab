"""``ports.EngineAdmin`` over SGLang's own HTTP routes, for an engine without the plugin.

It swaps; it does not learn.  SGLang counts neither rounds by drafter nor by domain, so a watch waits for its timeout
and keeps, and there are no traces.  What SGLang leaves to its callers is done here:

- a wrong shape ends its process and a wrong name is taken for success: the folder is held against the one that
  SGLang started from before anything is sent;
- generation is paused in place, so that running requests keep their cache, and goes on whatever happens between;
- ``/update_weights_from_disk`` writes the drafter over the target: it is never used.

Which drafter it holds is told by the label that a swap leaves (``weight_version``).  Whoever else updates weights
through SGLang leaves another label, and is then not seen through.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import pickle
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import EngineStatus, SwapReceipt, SwapRequest
from livedraft.contracts.settings import Settings
from livedraft.serving.sglang.identity import Identity, identify

log = logging.getLogger(__name__)

#: The first version that can update a drafter and leave its target alone.
FIRST = (0, 5, 21)
_LABEL = re.compile(r"livedraft:(?P<version>.*):(?P<checksum>[0-9a-f]{64})")


class SglangAdmin:
    """An engine at ``base``, whose target and drafters lie where this process can read them too.

    ``key`` is SGLang's ``--api-key``, and ``admin_key`` its ``--admin-api-key``, which counts only where it has one.
    A process that may swap, and no other swaps meanwhile, should ``release`` what one before it may hold; one that
    merely looks must not, since it would end another's swap in the middle.
    """

    def __init__(
        self,
        base: str,
        settings: Settings,
        key: str | None = None,
        admin_key: str | None = None,
        *,
        timeout: float = 5.0,
        swap_timeout: float = 60.0,
        release: bool = True,
    ) -> None:
        self._base = base.rstrip("/")
        self._settings = settings
        self._key = key
        self._admin_key = admin_key
        self._released = not release
        self._timeout = timeout
        self._swap_timeout = swap_timeout
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._identity: Identity | None = None
        #: Drafters that it started from, by folder: to hash one takes too long for every look.
        self._first: dict[Path, tuple[str, str]] = {}
        #: SGLang's own checksum of what was swapped in, by ours.
        self._seen: dict[str, str] = {}

    def status(self) -> EngineStatus:
        """As ``ports.EngineAdmin``, without counters and load, which this engine does not tell."""
        info, model = self._ask("/server_info"), self._ask("/model_info")
        self._release()
        who = self._identify(info)
        version, held = self._drafter(info, model)
        return EngineStatus(
            engine=who.engine,
            target=who.target,
            target_revision=who.target_revision,
            tokenizer_hash=who.tokenizer_hash,
            context_length=who.context_length,
            drafter=version,
            drafter_checksum=held,
            running=0,
            waiting=0,
            output_tokens=0,
            rounds=0,
            capture=False,
            disabled={
                "capture": "SGLang runs without the plugin",
                "counters": "SGLang runs without the plugin",
            },
        )

    def swap(self, request: SwapRequest) -> SwapReceipt:
        """As ``ports.EngineAdmin``."""
        info = self._ask("/server_info")
        previous, held = self._drafter(info, self._ask("/model_info"))
        arrays = self._proven(request, info)
        before = self._checksum_of_sglang()
        stall = self._send(arrays, request, ranks=int(info.get("tp_size") or 1))
        if self._drafter(info, self._ask("/model_info")) != (request.version, request.checksum):
            raise SwapFailed("SGLang took the drafter but not its label; another update came between")
        self._compare(held, before, request.checksum)
        return SwapReceipt(
            version=request.version,
            checksum=request.checksum,
            previous=previous,
            applied_at=time.time(),
            stall_s=stall,
        )

    def _drafter(self, info: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[str, str]:
        """(version, checksum): by the label of the last swap, or of the folder that SGLang started from."""
        label = str(model.get("weight_version"))
        if found := _LABEL.fullmatch(label):
            return found["version"], found["checksum"]
        if label != "default" or not info.get("speculative_draft_model_path"):
            return "", ""
        folder = Path(info["speculative_draft_model_path"])
        if folder not in self._first:
            try:
                self._first[folder] = folder.name, checkpoint.checksum(checkpoint.verify(folder)[1].tensors)
            except DrafterRejected:
                return "initial", ""
        return self._first[folder]

    def _identify(self, info: Mapping[str, Any]) -> Identity:
        if self._identity is None:
            args = SimpleNamespace(model_path=info["model_path"], tokenizer_path=info.get("tokenizer_path"))
            context = int(info.get("context_length") or info.get("max_req_input_len") or 0)
            self._identity = identify(self._settings, args, context, leads=True)
        return self._identity

    def _release(self) -> None:
        """Let go, once, of what one of us may have held when it was killed in the middle of a swap."""
        if self._released:
            return
        for path in ("/end_weight_update", "/continue_generation"):
            with contextlib.suppress(SwapFailed):
                self._ask(path, {})
        self._released = True

    def _proven(self, request: SwapRequest, info: Mapping[str, Any]) -> Mapping[str, Any]:
        """The folder's tensors, fit for this engine.  Raises DrafterRejected or SwapFailed."""
        version = tuple(int(part) for part in re.findall(r"\d+", str(info.get("version")))[:3])
        if version < FIRST:
            raise SwapFailed(f"SGLang {info.get('version')} cannot update a drafter alone; 0.5.21 can, or the plugin")
        if info.get("speculative_algorithm") != "EAGLE3":
            raise SwapFailed("SGLang was not started with --speculative-algorithm EAGLE3")
        who = self._identify(info)
        try:
            started_from = Path(info["speculative_draft_model_path"])
            like, _ = checkpoint.verify(started_from)
        except DrafterRejected as error:
            raise SwapFailed(f"the drafter that SGLang started from cannot be compared with: {error}") from error
        config, manifest = checkpoint.verify(
            Path(request.path), target_revision=who.target_revision, tokenizer_hash=who.tokenizer_hash, like=like
        )
        for field in ("rms_norm_eps", "rope_theta", "hidden_act"):
            if getattr(config, field) != getattr(like, field):
                raise DrafterRejected(f"config.json: {field} is {getattr(config, field)}, the first drafter's differs")
        if (found := checkpoint.checksum(manifest.tensors)) != request.checksum:
            raise SwapFailed(f"checksum of {request.path} is {found[:12]}, expected {request.checksum[:12]}")
        arrays = checkpoint.load(Path(request.path))
        if (arrays["d2t"] != checkpoint.load(started_from)["d2t"]).any():
            raise DrafterRejected("tensor d2t: differs from the drafter's that SGLang started from")
        # SGLang keeps its own map, and takes no other.
        return {name: array for name, array in arrays.items() if name not in ("d2t", "t2d")}

    def _send(self, arrays: Mapping[str, Any], request: SwapRequest, ranks: int) -> float:
        """Seconds that generation was paused."""
        import torch

        # Plain pickle: SGLang's own serializer shares memory with the process that sends, which here is no child.
        payload = pickle.dumps([(name, torch.from_numpy(array)) for name, array in arrays.items()])
        update = {
            "serialized_named_tensors": [base64.b64encode(payload).decode()] * ranks,
            "selector": "draft",
            "flush_cache": False,
            "weight_version": f"livedraft:{request.version}:{request.checksum}",
        }
        started = time.perf_counter()
        with self._paused(), self._session():
            self._ask("/update_weights_from_tensor", update, self._swap_timeout)
        return time.perf_counter() - started

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self._ask("/pause_generation", {"mode": "in_place"}, self._swap_timeout)
        try:
            yield
        finally:
            self._ask("/continue_generation", {}, self._swap_timeout)

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        self._ask("/begin_weight_update", {"selector": "draft"}, self._swap_timeout)
        try:
            yield
        finally:
            self._ask("/end_weight_update", {}, self._swap_timeout)

    def _compare(self, held: str, before: str, wanted: str) -> None:
        """Hold SGLang's checksum, where it gives one, against what it was for the same drafter and for the last."""
        after = self._checksum_of_sglang()
        if not after:
            return
        if held and held != wanted and after == before:
            raise SwapFailed("SGLang's weights have not changed")
        if self._seen.setdefault(wanted, after) != after:
            raise SwapFailed("SGLang's weights are not those it had with this drafter before")

    def _checksum_of_sglang(self) -> str:
        """ "" where SGLang does not give one: on a CPU before 0.5.23."""
        try:
            answer = self._ask("/weights_checker", {"action": "checksum", "selector": "draft"}, self._swap_timeout)
        except SwapFailed as error:
            log.debug("no checksum of SGLang's: %s", error)
            return ""
        return json.dumps(answer.get("per_engine_checksum") or answer.get("ranks"), sort_keys=True)

    def _ask(self, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None) -> dict[str, Any]:
        url = self._base + path
        encoded = None if body is None else json.dumps(body).encode()
        if encoded is not None and self._admin_key:  # what changes something wants this one, if SGLang has it at all
            with contextlib.suppress(_Unauthorized):
                return self._ask_with(self._admin_key, url, encoded, timeout or self._timeout)
        return self._ask_with(self._key, url, encoded, timeout or self._timeout)

    def _ask_with(self, key: str | None, url: str, body: bytes | None, timeout: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            with self._opener.open(urllib.request.Request(url, body, headers), timeout=timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read()[:500].decode(errors="replace")
            refused = _Unauthorized if error.code == 401 else SwapFailed
            raise refused(f"{url}: {error.code} {reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SwapFailed(f"{url}: {error}") from error
        if not isinstance(answer, dict) or answer.get("success") is False:
            raise SwapFailed(f"{url}: {answer}")
        return answer


class _Unauthorized(SwapFailed):
    """Another key might do."""
