"""Metrics as sums and counts, and the pairing of an evaluation."""

from __future__ import annotations

import pytest

from homespun.learning.metrics import MetricSum, paired, paired_names


def test_the_metric_is_the_quotient():
    assert MetricSum(3.0, 4.0).mean == 0.75
    assert MetricSum(0.0, 0.0).mean == 0.0


def test_sums_and_counts_are_added_apart():
    assert MetricSum(1.0, 2.0) + MetricSum(3.0, 8.0) == MetricSum(4.0, 10.0)


def test_pairing_two_checkpoints_on_paper():
    candidate = {"top1": MetricSum(6.0, 10.0), "loss": MetricSum(20.0, 10.0)}
    incumbent = {"top1": MetricSum(4.0, 10.0), "loss": MetricSum(25.0, 10.0)}
    sums = paired((candidate, incumbent), "top1", 1.0)
    assert tuple(sums) == (
        "0.top1", "0.loss", "1.top1", "1.loss", "difference", "difference_squared", "wins",
    )  # fmt: skip
    assert set(paired_names(("top1", "loss"), 2)) == set(sums)
    assert sums["difference"].sum == pytest.approx(0.2)
    assert sums["difference_squared"].sum == pytest.approx(0.04)
    assert sums["wins"] == MetricSum(1.0, 1.0)
    bounded = paired((incumbent, candidate), "top1", 0.1)
    assert bounded["difference"] == MetricSum(-0.1, 1.0)
    assert bounded["difference_squared"].sum == pytest.approx(0.01)
    assert paired((incumbent, candidate), "top1", 1.0)["wins"] == MetricSum(0.0, 1.0)
    assert paired((candidate, candidate), "top1", 1.0)["wins"] == MetricSum(0.0, 1.0)


def test_one_checkpoint_has_nothing_to_be_compared_with():
    assert paired(({"top1": MetricSum(1.0, 2.0)},), "top1", 1.0) == {"0.top1": MetricSum(1.0, 2.0)}
    assert paired_names(("top1",), 1) == ("0.top1",)
