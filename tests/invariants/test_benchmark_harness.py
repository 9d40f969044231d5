"""The harness measures what it says: turns are fair, memory is the child's own, ratios are of medians."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.harness import Options, alternate, parse_options, report, rows, run_child


def test_sides_take_turns_in_alternating_order():
    calls: list[str] = []
    timings = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"  # the first pair is the warm-up
    assert {side: len(values) for side, values in timings.items()} == {"a": 3, "b": 3}


def test_peak_memory_is_the_childs_own():
    ballast = bytes(300_000_000)  # this process is large; the child must not be charged for it
    small = run_child([sys.executable, "-S", "-c", "print('hello')"])
    large = run_child([sys.executable, "-S", "-c", "b'x' * 200_000_000"])
    assert len(ballast) > small.peak_bytes
    assert small.stdout == "hello\n"
    assert 200_000_000 < large.peak_bytes < 260_000_000


def test_a_failing_command_is_not_a_measurement():
    with pytest.raises(subprocess.CalledProcessError):
        run_child([sys.executable, "-c", "raise SystemExit(3)"])


def test_ratios_are_of_medians():
    ours, floor, peer = rows(
        "sum", {"ours": [2.0, 9.0, 2.0], "floor": [1.0], "peer": [4.0]}, floor="floor", peer="peer"
    )
    assert (ours.median, ours.ratio_to_floor, ours.ratio_to_peer) == (2.0, 2.0, 2.0)
    assert (floor.ratio_to_floor, peer.ratio_to_peer) == (1.0, 1.0)


def test_rows_as_json_lines(capsys: pytest.CaptureFixture[str]):
    options = parse_options("a benchmark", ["--json"])
    assert options == Options(quick=False, json=True)
    report(rows("sum", {"ours": [1.0, 3.0]}), options)
    row = json.loads(capsys.readouterr().out)
    assert (row["case"], row["side"], row["median"], row["raw"]) == ("sum", "ours", 2.0, [1.0, 3.0])
