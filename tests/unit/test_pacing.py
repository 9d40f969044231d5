"""When to come back."""

from __future__ import annotations

import numpy as np

from homespun.protocol.messages import RetryWindow
from homespun.protocol.pacing import PERMANENT_ERROR, TRANSIENT_ERROR, draw_retry


def test_the_time_lies_in_the_window_and_uses_all_of_it():
    rng = np.random.default_rng(4)
    window = RetryWindow(earliest_s=10.0, latest_s=20.0)
    times = [draw_retry(window, 1000.0, rng) for _ in range(1000)]
    assert min(times) >= 1010.0
    assert max(times) <= 1020.0
    assert abs(sum(times) / 1000 - 1015.0) < 4 * (100 / 12 / 1000) ** 0.5
    assert (min(times) < 1010.1, max(times) > 1019.9) == (True, True)


def test_a_window_without_width_is_a_moment():
    for latest_s in (10.0, 3.0):  # one that ends before it begins is read as its beginning
        window = RetryWindow(earliest_s=10.0, latest_s=latest_s)
        assert draw_retry(window, 5.0, np.random.default_rng(0)) == 15.0


def test_the_windows_after_errors():
    assert (TRANSIENT_ERROR.earliest_s / 60, TRANSIENT_ERROR.latest_s / 60) == (12.0, 18.0)
    assert (PERMANENT_ERROR.earliest_s, PERMANENT_ERROR.latest_s) == (0.8 * 14_400, 1.2 * 14_400)
