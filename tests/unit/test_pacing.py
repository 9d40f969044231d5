"""When to come back."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.pacing import DAY_S, OUTAGE_S, WAVE_S, Population
from homespun.protocol.messages import RetryWindow
from homespun.protocol.pacing import (
    BIN_S,
    DAY_BINS,
    MEETING_BINS,
    PERMANENT_ERROR,
    TRANSIENT_ERROR,
    Pace,
    demand,
    draw_retry,
    in_bin,
    latest_when_away,
)

MEETING_S = MEETING_BINS * BIN_S


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


def test_a_small_population_meets():
    """Whenever they came, all are told the same minute: the first after a meeting time."""
    pace, starts = Pace(), []
    for now in np.linspace(MEETING_S, 2 * MEETING_S - 2 * BIN_S, 30):
        (start,) = pace.promise(float(now), demand=40.0)
        starts.append(now + start)
    assert starts == pytest.approx([2 * MEETING_S] * 30)
    # Nobody is sent away only to come back at once.
    (soon,) = pace.promise(2 * MEETING_S - 1, demand=40.0)
    assert soon == pytest.approx(MEETING_S + 1)


def test_a_large_population_spreads():
    starts = Pace().promise(0.0, demand=10.0, num=5_000)
    per_minute = np.unique(starts, return_counts=True)[1]
    assert 6 <= per_minute.min() <= per_minute.max() <= 11
    assert sorted(starts) == starts.tolist()


def test_who_fills_the_day_comes_back_daily():
    starts = Pace().promise(0.0, demand=10.0, num=1_000_000)
    assert starts.max() <= (DAY_BINS + MEETING_BINS) * BIN_S
    assert np.unique(starts, return_counts=True)[1].max() <= 1_000_000 / DAY_BINS + 10


def test_promises_that_are_not_kept_are_made_to_more_devices():
    pace = Pace()
    for now in np.arange(0, 12 * 3600, BIN_S):  # half of those that come were promised to
        pace.promise(float(now), demand=100.0, num=100)
        pace.arrive(float(now), 50)
    assert pace.turnout < 0.8
    for now in np.arange(12 * 3600, 48 * 3600, BIN_S):
        pace.promise(float(now), demand=100.0, num=100)
        pace.arrive(float(now), 100)
    assert pace.turnout > 0.9


def test_a_restart_forgets_nothing():
    pace = Pace()
    pace.promise(50_000.0, demand=3.0, num=500)
    pace.arrive(50_030.0, 7)
    pace.arrive(50_200.0, 0)
    again = Pace.restored(pace.saved())
    assert again.saved() == pace.saved()
    assert again.promise(50_300.0, 3.0, 20).tolist() == pace.promise(50_300.0, 3.0, 20).tolist()
    assert again.turnout == pace.turnout


def test_a_clock_that_goes_back_is_harmless():
    pace = Pace()
    pace.arrive(1e9)
    (start,) = pace.promise(1e9 - 3600, demand=5.0)
    assert 0 <= start <= 2 * MEETING_S


def test_demand_is_what_fills_a_pool_in_its_window():
    assert demand(100, 60.0, 1e6, 0.1) == 100  # all who come claim
    assert 230 < demand(100, 60.0, 5e5, 5e5) < 240  # every second, and a margin
    assert demand(100, 600.0, 5e5, 5e5) == pytest.approx(demand(100, 60.0, 5e5, 5e5) / 10)
    assert demand(100, 0.0, 5e5, 5e5) == demand(100, 60.0, 5e5, 5e5)


def test_the_window_of_a_bin_is_never_in_the_past():
    assert in_bin(30.0) == RetryWindow(earliest_s=30.0, latest_s=30.0 + BIN_S)
    assert in_bin(-90.0) == RetryWindow(earliest_s=0.0, latest_s=0.0)


def test_a_device_that_was_to_come_late_does_not_hurry_when_the_server_is_away():
    assert latest_when_away(TRANSIENT_ERROR, 300.0) == TRANSIENT_ERROR.latest_s
    assert latest_when_away(TRANSIENT_ERROR, 36_000.0) == 72_000.0


@pytest.mark.parametrize(
    ("size", "wanted", "swings", "days"),
    [
        (50, 5, False, 1.0),
        (50, 5, True, 1.0),
        (5_000, 50, False, 1.0),
        (5_000, 50, True, 1.0),
        (1_000_000, 500, True, 0.75),
    ],
)
def test_check_ins_stay_within_twice_the_demand_and_rounds_fill(size, wanted, swings, days):
    ran = Population(size, wanted, swings=swings).run(days)
    assert OUTAGE_S[1] < days * DAY_S
    assert ran.peak(2 * WAVE_S, days * DAY_S) <= 2
    assert ran.num_rounds / (24 * days - 1) >= 4  # of 6 that the work leaves time for


def test_a_fixed_window_does_not():
    assert Population(5_000, 50, steered=False).run(0.2).peak(2 * WAVE_S, 0.2 * DAY_S) > 10
