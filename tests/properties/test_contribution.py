"""Laws of contributions: what honest devices send passes the check, and sums decode to weighted means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from homespun.errors import NumericFailure
from homespun.learning.contribution import AUX_SCALE, ContributionCodec
from homespun.learning.metrics import MetricSum

METRICS = ("loss", "top1")


@st.composite
def codecs(draw) -> ContributionCodec:
    bits = draw(st.integers(8, 32))
    return ContributionCodec(
        dimension=draw(st.integers(0, 12)),
        clip_norm=draw(st.floats(1e-4, 1e4)),
        max_weight=draw(st.integers(0, 1000)),
        metrics=METRICS,
        max_group=draw(st.integers(6, min(1000, (2 ** (bits - 1) - 1) // 2))),
        bits=bits,
        rotation_seed=draw(st.none() | st.integers(0, 2**53 - 1)),
    )


CODECS = codecs()
REPORTS = st.lists(
    st.tuples(
        st.integers(0, 10**9),  # the seed of an update, often beyond the clip bound
        st.floats(0, 10),
        st.integers(0, 2000),
        st.floats(-1e6, 1e6),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=6,
)


def encoded(codec: ContributionCodec, reports):
    """The true update, number of examples and contribution of each report."""
    for seed, size, num_examples, loss, count in reports:
        rng = np.random.default_rng(seed)
        update = (rng.normal(size=codec.dimension) * size * codec.clip_norm).astype(np.float32)
        metrics = {"loss": MetricSum(loss, count), "top1": MetricSum(count / 2, count)}
        yield update, num_examples, codec.encode(update, num_examples, metrics, rng)


@given(CODECS, REPORTS)
def test_every_honest_contribution_passes(codec, reports):
    for _, _, contribution in encoded(codec, reports):
        codec.check(contribution)


@given(CODECS, REPORTS)
def test_a_sum_decodes_to_the_weighted_mean(codec, reports):
    total, weight, mean = codec.empty(), 0.0, np.zeros(codec.dimension)
    for update, num_examples, contribution in encoded(codec, reports):
        codec.add(total, contribution)
        length = float(np.linalg.norm(update.astype(np.float64)))
        share = codec.weight(num_examples)
        weight += share
        mean += share * update * min(1.0, codec.clip_norm / length if length else 1.0)
    result = codec.decode(total)
    assert result.num_clients == len(reports)
    assert result.weight == weight
    # Turning back, the errors of all entries may meet in one.
    step = len(reports) / codec.fixed_point.scale * max(codec.dimension, 1) ** 0.5
    tolerance = (step + 1e-6 * codec.clip_norm * len(reports)) / weight
    np.testing.assert_allclose(result.mean_update, mean / weight, rtol=1e-5, atol=tolerance)
    assert result.metrics["top1"].count == sum(report[4] for report in reports)
    loss = sum(report[3] for report in reports)
    assert abs(result.metrics["loss"].sum - loss) <= len(reports) * 1.001 / AUX_SCALE + 1e-9


@given(CODECS, REPORTS)
def test_no_device_moves_the_mean_further_than_the_clip_bound(codec, reports):
    for _, _, contribution in encoded(codec, reports):
        alone = codec.decode(contribution)
        # Rounding to whole steps weighs most when the device itself weighs little.
        slack = codec.dimension**0.5 / codec.fixed_point.scale / alone.weight
        assert np.linalg.norm(alone.mean_update.astype(np.float64)) <= (
            codec.clip_norm * (1 + 1e-5) + slack
        )


@given(CODECS, REPORTS, st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_groups_decoded_together_are_one_group(codec, reports, places):
    groups, together = [codec.empty() for _ in range(3)], codec.empty()
    for place, (_, _, contribution) in zip(places, encoded(codec, reports), strict=False):
        codec.add(groups[place], contribution)
        codec.add(together, contribution)
    several, one = codec.decode(*groups), codec.decode(together)
    np.testing.assert_array_equal(several.mean_update, one.mean_update)
    assert replace(several, mean_update=None) == replace(one, mean_update=None)


@given(CODECS, REPORTS, st.randoms(use_true_random=False))
def test_any_order_gives_the_same_words(codec, reports, random):
    parts = [contribution for _, _, contribution in encoded(codec, reports)]
    totals = []
    for _ in range(2):
        total = codec.empty()
        for part in parts:
            codec.add(total, part)
        totals.append((total.main.tobytes(), total.aux.tobytes()))
        random.shuffle(parts)
    assert totals[0] == totals[1]


@given(
    arrays.arrays(np.float32, 3, elements=st.floats(width=32)),
    st.floats(),
    st.floats(),
)
def test_whatever_the_numbers_an_encoding_is_honest_or_refused(update, loss, count):
    codec = ContributionCodec(
        dimension=3, clip_norm=1.0, max_weight=0, metrics=("loss",), max_group=4
    )
    try:
        contribution = codec.encode(
            update, 1, {"loss": MetricSum(loss, abs(count))}, np.random.default_rng(0)
        )
    except NumericFailure:
        return
    codec.check(contribution)
