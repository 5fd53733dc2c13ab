"""Watching and steering the engine over HTTP."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from livedraft.contracts.messages import EngineStatus, SwapReceipt, SwapRequest

from .conftest import Serve


def test_the_status_is_the_engines(start: Serve) -> None:
    served = start()
    answer = served.http.get("/admin/status")
    assert msgspec.json.decode(answer.content, type=EngineStatus) == served.engine.status()


def test_a_swap_is_handed_on_and_its_receipt_back(start: Serve) -> None:
    served = start()
    request = SwapRequest(path="/drafts/8", version="8", checksum="c8")
    answer = served.http.post("/admin/drafter", content=msgspec.json.encode(request))
    assert served.engine.swaps == [request]
    receipt = msgspec.json.decode(answer.content, type=SwapReceipt)
    assert (receipt.version, receipt.checksum, receipt.previous) == ("8", "c8", "7")
    metrics = served.http.get("/metrics").text
    assert "livedraft_swaps_total 1.0" in metrics
    assert "livedraft_swap_stall_seconds_sum 0.002" in metrics
    assert 'livedraft_drafter_info{checksum="c8",version="8"} 1.0' in metrics


def test_a_rejected_drafter_is_named_and_not_counted(start: Serve) -> None:
    served = start()
    answer = served.http.post("/admin/drafter", json={"path": "/drafts/9", "version": "9", "checksum": "bad"})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "drafter_rejected"
    assert "fc.weight" in answer.json()["error"]["message"]
    assert "livedraft_swaps_total 0.0" in served.http.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "param"),
    [({"path": "/drafts/9", "version": "9"}, "checksum"), ({"path": 1, "version": "9", "checksum": "c"}, "path")],
)
def test_a_bad_swap_request_names_its_field(start: Serve, body: dict[str, Any], param: str) -> None:
    answer = start().http.post("/admin/drafter", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_readiness_follows_the_engine(start: Serve) -> None:
    served = start()
    assert served.http.get("/readyz").json() == {"status": "ready"}
    served.engine.broken = RuntimeError("its thread is gone")
    answer = served.http.get("/readyz")
    assert answer.status_code == 503
    assert "its thread is gone" in answer.json()["error"]["message"]
    assert served.http.get("/healthz").status_code == 200
