"""The contribution: clip, weight, encode; add; decode. And what no honest device sends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from homespun.errors import InvalidConfig, NumericFailure, ShapeMismatch
from homespun.learning.contribution import AUX_LIMIT, AUX_SCALE, Contribution, ContributionCodec
from homespun.learning.metrics import MetricSum

CODEC = ContributionCodec(
    dimension=2, clip_norm=5.0, max_weight=10, metrics=("loss", "top1"), max_group=4
)
EVALUATION = ContributionCodec(
    dimension=0, clip_norm=1.0, max_weight=0, metrics=("0.top1",), max_group=4
)
METRICS = {"loss": MetricSum(-2.5, 8.0), "top1": MetricSum(3.0, 8.0), "extra": MetricSum(1.0, 1.0)}


def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def encode(update=(3.0, 4.0), num_examples=10, metrics=METRICS):
    return CODEC.encode(np.array(update, np.float32), num_examples, metrics, rng())


def total_of(codec, *contributions):
    total = codec.empty()
    for contribution in contributions:
        codec.add(total, contribution)
    return total


# --- round trip ---------------------------------------------------------------------------------------


def test_the_weighted_mean_on_paper():
    # weights 10/10 and 5/10: (1 * (3, 4) + 0.5 * (0, -2)) / 1.5 = (2, 2)
    result = CODEC.decode(total_of(CODEC, encode(), encode((0.0, -2.0), 5)))
    np.testing.assert_allclose(result.mean_update, [2.0, 2.0], atol=1e-6)
    assert result.mean_update.dtype == np.float32
    assert (result.num_clients, result.weight, result.clipped_share) == (2, 1.5, 0.0)
    assert result.metrics == {"loss": MetricSum(-5.0, 16.0), "top1": MetricSum(6.0, 16.0)}


def test_a_long_update_is_clipped_and_counted():
    # |(30, 40)| = 50, clipped to 5: (3, 4)
    result = CODEC.decode(total_of(CODEC, encode((30.0, 40.0)), encode((3.0, 4.0))))
    np.testing.assert_allclose(result.mean_update, [3.0, 4.0], atol=1e-6)
    assert result.clipped_share == 0.5  # at the bound is not beyond it


def test_aux_on_paper():
    aux = encode((0.0, 0.0), 5).aux
    one = 65536
    assert CODEC.aux_names == (
        "weight", "clients", "clipped", "loss.sum", "loss.count", "top1.sum", "top1.count",
    )  # fmt: skip
    assert aux.tolist() == [one // 2, one, 0, 2**64 - 5 * one // 2, 8 * one, 3 * one, 8 * one]


@pytest.mark.parametrize(
    ("num_examples", "weight"),
    [(10, 1.0), (11, 1.0), (10**12, 1.0), (5, 0.5), (1, 6554 / 65536), (0, 1 / 65536)],
)
def test_the_weight_is_the_capped_share(num_examples, weight):
    assert CODEC.weight(num_examples) == weight


def test_without_a_cap_everybody_weighs_one():
    assert {replace(CODEC, max_weight=0).weight(n) for n in (0, 1, 1000)} == {1.0}


def test_a_device_without_examples_does_not_stop_the_round():
    result = CODEC.decode(total_of(CODEC, encode((0.0, 0.0), 0)))
    assert result.num_clients == 1
    np.testing.assert_array_equal(result.mean_update, [0.0, 0.0])


def test_evaluation_has_no_update_only_metrics():
    one = EVALUATION.encode(np.zeros(0, np.float32), 7, {"0.top1": MetricSum(2.0, 7.0)}, rng())
    EVALUATION.check(one)
    result = EVALUATION.decode(total_of(EVALUATION, one, one))
    assert result.mean_update.shape == (0,)
    assert (result.num_clients, result.weight) == (2, 2.0)
    assert result.metrics == {"0.top1": MetricSum(4.0, 14.0)}


def test_values_far_below_one_step_keep_their_mean():
    """The square of a small difference is what the standard error of an evaluation is made of."""
    codec = replace(EVALUATION, metrics=("difference_squared",), max_group=4000)
    tiny, generator, total = 0.1 / AUX_SCALE, rng(), codec.empty()
    for _ in range(4000):
        value = {"difference_squared": MetricSum(tiny, 1.0)}
        codec.add(total, codec.encode(np.zeros(0, np.float32), 1, value, generator))
    found = codec.decode(total).metrics["difference_squared"].sum * AUX_SCALE
    assert abs(found - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_group_of_the_largest_metrics_does_not_wrap(sign):
    codec = replace(EVALUATION, max_group=65_535)
    values = {"0.top1": MetricSum(sign * AUX_LIMIT, AUX_LIMIT)}
    one = codec.encode(np.zeros(0, np.float32), 1, values, rng())
    total = Contribution(one.main, one.aux * np.uint64(65_535))
    assert codec.decode(total).metrics["0.top1"].sum == sign * AUX_LIMIT * 65_535


# --- what does not leave a device ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 3])
def test_an_update_of_another_length_is_not_encoded(length):
    with pytest.raises(ShapeMismatch) as failure:
        encode((1.0,) * length)
    assert failure.value.details == {"expected": 2, "got": length}


def test_a_missing_metric_is_named():
    with pytest.raises(ShapeMismatch, match="'top1' is missing"):
        encode(metrics={"loss": MetricSum(1.0, 1.0)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_encoded(value):
    with pytest.raises(NumericFailure, match="update is not finite"):
        encode((value, 0.0))
    with pytest.raises(NumericFailure, match="metric is not finite"):
        encode(metrics={**METRICS, "loss": MetricSum(value, 1.0)})


def test_an_absurd_metric_is_not_encoded():
    encode(metrics={**METRICS, "loss": MetricSum(AUX_LIMIT, 1.0)})
    with pytest.raises(NumericFailure):
        encode(metrics={**METRICS, "loss": MetricSum(AUX_LIMIT * 1.001, 1.0)})


# --- what the server refuses --------------------------------------------------------------------------


def aux_with(**changes: float) -> Contribution:
    honest = encode()
    aux = honest.aux.copy()
    for name, value in changes.items():
        aux[CODEC.aux_names.index(name.replace("__", "."))] = np.array(
            round(value * AUX_SCALE), np.int64
        ).astype(np.uint64)
    return Contribution(honest.main, aux)


def main_of(*entries: int) -> Contribution:
    return Contribution(np.array(entries, np.int32).view(np.uint32), encode().aux)


def test_honest_contributions_pass_the_check():
    for update in ((0.0, 0.0), (3.0, 4.0), (5.0, 0.0), (-5.0, 0.0), (300.0, 400.0)):
        for num_examples in (0, 1, 3, 10, 1000):
            CODEC.check(encode(update, num_examples))
    CODEC.check(aux_with(clipped=1.0))


BIGGEST = CODEC.fixed_point.largest


@pytest.mark.parametrize(
    "dishonest",
    [
        aux_with(weight=0.0),
        aux_with(weight=1.0 + 1 / AUX_SCALE),
        aux_with(weight=-1.0),
        aux_with(weight=0.5),  # the update is twice as long as this weight allows
        aux_with(clients=0.0),
        aux_with(clients=2.0),
        aux_with(clients=-1.0),
        aux_with(clipped=0.5),
        aux_with(clipped=2.0),
        aux_with(clipped=-1.0),
        aux_with(loss__sum=AUX_LIMIT + 1),
        aux_with(loss__sum=-AUX_LIMIT - 1),
        aux_with(top1__count=AUX_LIMIT + 1),
        aux_with(top1__count=-1 / AUX_SCALE),
        main_of(BIGGEST + 1, 0),
        main_of(-BIGGEST - 1, 0),
        main_of(-(2**31), 0),
        main_of(
            BIGGEST, BIGGEST
        ),  # each entry is in range, both together are longer than clip_norm
    ],
)
def test_dishonest_numbers_are_refused(dishonest):
    with pytest.raises(NumericFailure):
        CODEC.check(dishonest)


@pytest.mark.parametrize(
    "misshapen",
    [
        Contribution(np.zeros(1, np.uint32), encode().aux),
        Contribution(np.zeros(3, np.uint32), encode().aux),
        Contribution(np.zeros((2, 1), np.uint32), encode().aux),
        Contribution(np.zeros(2, np.uint16), encode().aux),
        Contribution(encode().main, encode().aux[:-1]),
        Contribution(encode().main, encode().aux[:1]),
        Contribution(encode().main, encode().aux.astype(np.int64)),
    ],
)
def test_misshapen_contributions_are_refused_and_not_added(misshapen):
    total = total_of(CODEC, encode())
    with pytest.raises(ShapeMismatch):
        CODEC.check(misshapen)
    with pytest.raises(ShapeMismatch):
        CODEC.add(total, misshapen)
    assert total.main.tolist() == encode().main.tolist()
    assert total.aux.tolist() == encode().aux.tolist()


def test_without_a_cap_no_other_weight_is_honest():
    one = EVALUATION.encode(np.zeros(0, np.float32), 1, {"0.top1": MetricSum(1.0, 1.0)}, rng())
    half = one.aux.copy()
    half[0] //= 2
    with pytest.raises(NumericFailure):
        EVALUATION.check(Contribution(one.main, half))


def test_a_sum_without_weight_is_not_decoded():
    with pytest.raises(NumericFailure, match="no weight"):
        CODEC.decode(CODEC.empty())
    with pytest.raises(NumericFailure, match="no weight"):
        CODEC.decode(aux_with(clients=0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_group": 65_536},
        {"max_group": 0},
        {"bits": 8},
        {"bits": 16, "max_group": 16_384},
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"dimension": -1},
        {"max_weight": -1},
    ],
)
def test_a_codec_that_cannot_work_is_not_made(changes):
    with pytest.raises(InvalidConfig):
        replace(CODEC, **changes)
