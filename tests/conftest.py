"""For every test: no deadlines, because machines are shared, and one thread, because they are small."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("livedraft", deadline=None)
settings.load_profile("livedraft")

# Nothing in a test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
