"""For every test: no deadlines, because machines are shared, one thread, because they are small, and a broker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("livedraft", deadline=None)
settings.load_profile("livedraft")

# Nothing in a test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def broker_address() -> Iterator[str]:
    """host:port of a broker: the one in LIVEDRAFT_TEST_KAFKA, else one that is started.  Its absence is a failure."""
    from livedraft.cli.local_broker import memory_broker

    if given := os.environ.get("LIVEDRAFT_TEST_KAFKA"):
        yield given
        return
    with memory_broker() as broker:
        yield broker.address
