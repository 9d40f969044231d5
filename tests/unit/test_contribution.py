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


def encode(update=(3.0, 4.0), num_examples=10, metrics=METRICS) -> Contribution:
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


@pytest.mark.parametrize(("staleness", "share"), [(0, 1.0), (1, 2**-0.5), (3, 0.5), (8, 1 / 3)])
def test_who_is_behind_weighs_less(staleness, share):
    """In whole steps, and as much less in both vectors: the mean of one contribution is its update."""
    steps = round(0.5 * share * AUX_SCALE)
    assert CODEC.weight(5, staleness) == steps / AUX_SCALE
    update = np.array([3, 4], np.float32)
    metrics = {name: MetricSum(0.0, 1.0) for name in CODEC.metrics}
    contribution = CODEC.encode(update, 5, metrics, np.random.default_rng(0), staleness)
    assert contribution.aux[0] == steps
    assert CODEC.decode(contribution).mean_update == pytest.approx(update, abs=1e-6)


def test_the_sum_is_a_mean_weighted_by_staleness():
    """sum(s w u) / sum(s w) on paper: (0.5 * 3 + 1 * 0) / 1.5 = 1."""
    metrics = {name: MetricSum(0.0, 1.0) for name in CODEC.metrics}
    total = CODEC.empty()
    for value, staleness in ((3.0, 3), (0.0, 0)):
        update = np.array([value, 0], np.float32)
        CODEC.add(total, CODEC.encode(update, 10, metrics, np.random.default_rng(0), staleness))
    assert CODEC.decode(total).mean_update == pytest.approx([1.0, 0.0], abs=1e-6)


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
    total = replace(one, aux=one.aux * np.uint64(65_535))
    assert codec.decode(total).metrics["0.top1"].sum == sign * AUX_LIMIT * 65_535
    # Two such groups are more than 64 bits hold.
    assert codec.decode(total, total).metrics["0.top1"].sum == sign * AUX_LIMIT * 131_070


# --- rotated, in few bits -----------------------------------------------------------------------------

ROTATED = ContributionCodec(
    dimension=20_000,
    clip_norm=5.0,
    max_weight=0,
    metrics=(),
    max_group=100,
    bits=16,
    rotation_seed=3,
)


def relative_error(codec: ContributionCodec, num_devices: int = 100) -> float:
    """Of the mean of heavy-tailed updates that agree in most."""
    generator, total = rng(), codec.empty()
    common = generator.standard_t(3, codec.dimension)
    mean = np.zeros(codec.dimension)
    for _ in range(num_devices):
        update = common + 0.3 * generator.normal(size=codec.dimension)
        sent = (4.9 * update / np.linalg.norm(update)).astype(np.float32)
        mean += sent / num_devices
        codec.add(total, codec.encode(sent, 1, {}, generator))
    result = codec.decode(total)
    assert result.clipped_share == 0.0
    return float(np.linalg.norm(result.mean_update - mean) / np.linalg.norm(mean))


def test_sixteen_bits_are_as_good_as_exact_and_twelve_still_good():
    assert relative_error(ROTATED) < 0.002
    assert relative_error(replace(ROTATED, bits=12)) < 0.03
    # Without the rotation, the clip bound of every entry has to be that of the whole update.
    assert relative_error(replace(ROTATED, rotation_seed=None)) > 0.01


def test_the_clip_of_a_rotated_entry_on_paper():
    assert ROTATED.clip == 6 * 5.0 / 128  # sqrt(16,384)
    assert ROTATED.fixed_point.clip == ROTATED.clip
    assert replace(ROTATED, rotation_seed=None).clip == 5.0
    assert replace(ROTATED, dimension=0).clip == replace(ROTATED, dimension=17).clip == 5.0


def test_what_is_sent_is_rotated_with_the_seed():
    codec = replace(ROTATED, dimension=5, clip_norm=100.0, bits=32, rotation_seed=7)
    sent = codec.encode(np.array([1, 2, 3, 4, 5], np.float32), 1, {}, rng())
    # The vector of docs/protocol.md.
    np.testing.assert_allclose(
        codec.fixed_point.decode(sent.main), [0.0, 1.5, 5.5, 1.5, -4.5], atol=1e-5
    )


@pytest.mark.parametrize("place", [0, 10_000, 19_999])
def test_an_update_of_one_entry_comes_through(place):
    """Unrotated, the worst case for a bound of every entry; rotated, it is clipped nowhere."""
    update = np.zeros(20_000, np.float32)
    update[place] = 5.0
    one = ROTATED.encode(update, 1, {}, rng())
    ROTATED.check(one)
    result = ROTATED.decode(one)
    assert result.mean_update.argmax() == place
    # Clipping a single entry would already cost more than rounding does: half a step each.
    rounding = 0.5 / ROTATED.fixed_point.scale * 20_000**0.5
    assert np.linalg.norm(result.mean_update - update) < rounding
    np.testing.assert_allclose(result.mean_update[place], 5.0, rtol=0.01)


def test_a_rotated_update_longer_than_its_weight_allows_is_refused():
    codec = replace(ROTATED, max_weight=10, bits=32)
    update = np.full(20_000, 5.0 / 20_000**0.5, np.float32)
    one = codec.encode(update, 10, {}, rng())
    codec.check(one)
    lighter = one.aux.copy()
    lighter[0] = lighter[0] * 999 // 1000
    with pytest.raises(NumericFailure, match="longer"):
        codec.check(replace(one, aux=lighter))


@pytest.mark.parametrize("seed", [None, 8])
def test_groups_are_decoded_together(seed):
    codec = replace(ROTATED, dimension=5, max_group=2, rotation_seed=seed, metrics=("loss",))
    generator, groups = rng(), [codec.empty() for _ in range(3)]
    wide, together = (
        replace(codec, bits=32, max_group=6),
        replace(codec, bits=32, max_group=6).empty(),
    )
    for index in range(6):
        update = generator.normal(size=5).astype(np.float32)
        metrics = {"loss": MetricSum(index / 2, 1.0)}
        codec.add(groups[index // 2], codec.encode(update, 1, metrics, generator))
        wide.add(together, wide.encode(update, 1, metrics, generator))
    several, one = codec.decode(*groups), wide.decode(together)
    np.testing.assert_allclose(
        several.mean_update, one.mean_update, atol=1.01 / codec.fixed_point.scale * 5**0.5
    )
    assert several.metrics == one.metrics == {"loss": MetricSum(7.5, 6.0)}
    assert (several.num_clients, several.weight) == (one.num_clients, one.weight) == (6, 6.0)


def test_the_schema_names_what_both_ends_must_share():
    assert CODEC.schema == (
        "fixed-point-1;rotation=None;max_weight=10;"
        "aux=65536*weight,clients,clipped,loss.sum,loss.count,top1.sum,top1.count"
    )
    others = [
        replace(CODEC, rotation_seed=0),
        replace(CODEC, rotation_seed=1),
        replace(CODEC, max_weight=11),
        replace(CODEC, metrics=("top1", "loss")),
        replace(CODEC, metrics=("loss",)),
    ]
    assert len({codec.schema for codec in (CODEC, *others)}) == 6


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
    return replace(honest, aux=aux)


def main_of(*entries: int) -> Contribution:
    return replace(encode(), main=np.array(entries, np.int32).view(np.uint32))


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
        replace(encode(), main=np.zeros(1, np.uint32)),
        replace(encode(), main=np.zeros(3, np.uint32)),
        replace(encode(), main=np.zeros((2, 1), np.uint32)),
        replace(encode(), main=np.zeros(2, np.uint16)),
        replace(encode(), main=np.zeros(2, np.uint16), bits=16),
        replace(encode(), bits=31),  # in the same machine words
        replace(encode(), aux=encode().aux[:-1]),
        replace(encode(), aux=encode().aux[:1]),
        replace(encode(), aux=encode().aux.astype(np.int64)),
    ],
)
def test_misshapen_contributions_are_refused_and_not_added(misshapen):
    total = total_of(CODEC, encode())
    with pytest.raises(ShapeMismatch):
        CODEC.check(misshapen)
    with pytest.raises(ShapeMismatch):
        CODEC.add(total, misshapen)
    with pytest.raises(ShapeMismatch):
        CODEC.decode(total, misshapen)
    assert total.main.tolist() == encode().main.tolist()
    assert total.aux.tolist() == encode().aux.tolist()


def test_without_a_cap_no_other_weight_is_honest():
    one = EVALUATION.encode(np.zeros(0, np.float32), 1, {"0.top1": MetricSum(1.0, 1.0)}, rng())
    half = one.aux.copy()
    half[0] //= 2
    with pytest.raises(NumericFailure):
        EVALUATION.check(replace(one, aux=half))


def test_a_sum_without_weight_is_not_decoded():
    with pytest.raises(NumericFailure, match="no weight"):
        CODEC.decode(CODEC.empty())
    with pytest.raises(NumericFailure, match="no weight"):
        CODEC.decode()
    with pytest.raises(NumericFailure, match="no weight"):
        CODEC.decode(aux_with(clients=0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_group": 65_536},
        {"max_group": 0},
        {"bits": 7},
        {"bits": 33},
        {"bits": 8, "max_group": 64},
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
