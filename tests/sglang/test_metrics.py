"""What SGLang's dashboard asks for, a server tells."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

from .server import Server

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "sglang.json"


def test_sglang_tells_what_its_dashboard_asks_for(chain_server: Server, prompts: list[str]) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"sglang:\w+", target["expr"])
    }
    chain_server.generate_together(prompts)
    with urllib.request.urlopen(f"{chain_server.url}/metrics", timeout=30) as answer:
        told = set(re.findall(r"^(sglang:\w+)", answer.read().decode(), re.M))
    assert len(asked) >= len(panels)
    assert asked - told == set()
