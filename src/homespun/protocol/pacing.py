"""When to come back. A retry time is drawn once and kept; see `device.runtime` for where it is stored."""

from __future__ import annotations

import numpy as np

from homespun.protocol.messages import RetryWindow

TRANSIENT_ERROR = RetryWindow(earliest_s=12 * 60.0, latest_s=18 * 60.0)
"""The server was unreachable or busy: 15 minutes, give or take a fifth."""
PERMANENT_ERROR = RetryWindow(earliest_s=3.2 * 3600.0, latest_s=4.8 * 3600.0)
"""The server refused us: 4 hours, give or take a fifth."""


def draw_retry(window: RetryWindow, now: float, rng: np.random.Generator) -> float:
    """Unix seconds at which to come back."""
    return now + float(rng.uniform(window.earliest_s, max(window.earliest_s, window.latest_s)))
