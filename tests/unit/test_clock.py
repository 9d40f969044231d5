"""A test can be the clock."""

from __future__ import annotations

import time

from homespun.clock import Clock, ManualClock, SystemClock


def test_the_manual_clock_moves_only_when_told():
    clock = ManualClock(100.0)
    assert (clock.now(), clock.now()) == (100.0, 100.0)
    clock.advance(2.5)
    assert clock.now() == 102.5


def test_sleeping_on_the_manual_clock_costs_no_time():
    clock = ManualClock(100.0)
    clock.sleep(3600.0)
    assert clock.now() == 3700.0


def test_the_system_clock_is_unix_time():
    clock: Clock = SystemClock()
    before = time.time()
    assert before <= clock.now() <= time.time()
    clock.sleep(0.0)
