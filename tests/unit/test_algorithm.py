"""From contributions to the next checkpoint: the functions of one task put together."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.errors import NumericFailure, ShapeMismatch
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import ContributionCodec
from homespun.learning.metrics import MetricSum
from homespun.learning.optimizers import names, server_optimizer
from homespun.tensors import codec as checkpoints
from homespun.tensors import tree

SHAPES = (("w", (2,)), ("b", ()))
START = {"b": np.array(1.0, np.float32), "w": np.array([0.0, 10.0], np.float32)}


def algorithm(name="FedAvg", clip_norm=100.0, **settings) -> Algorithm:
    codec = ContributionCodec(
        dimension=tree.dimension(SHAPES),
        clip_norm=clip_norm,
        max_weight=4,
        metrics=("loss",),
        max_group=8,
    )
    return Algorithm(SHAPES, codec, server_optimizer(name, settings))


def total_of(method: Algorithm, *reports):
    """The sum of (update [w0, w1, b], examples)."""
    total, rng = method.codec.empty(), np.random.default_rng(2)
    for update, num_examples in reports:
        method.codec.add(
            total,
            method.codec.encode(
                np.array(update, np.float32), num_examples, {"loss": MetricSum(1.0, 2.0)}, rng
            ),
        )
    return total


def test_a_round_on_paper():
    # weights 1 and 1/2: ((3, 0, 6) + (0, 6, 0) / 2) / 1.5 = (2, 2, 4)
    method = algorithm()
    total = total_of(method, ((3.0, 0.0, 6.0), 4), ((0.0, 6.0, 0.0), 2))
    moved, state, aggregate = method.server_update(START, {}, total)
    np.testing.assert_allclose(moved["w"], [2.0, 12.0], atol=1e-5)
    np.testing.assert_allclose(moved["b"], 5.0, atol=1e-5)
    assert state == {}
    assert (aggregate.num_clients, aggregate.metrics["loss"].mean) == (2, 0.5)


@pytest.mark.parametrize("name", names())
def test_what_comes_out_can_be_stored_and_goes_in_again(name):
    method = algorithm(name)
    total = total_of(method, ((3.0, 0.0, 6.0), 4))
    moved, state, _ = method.server_update(START, method.optimizer.init(START), total)
    tree.check_shapes(moved, SHAPES)
    assert all(isinstance(array, np.ndarray) for array in (*moved.values(), *state.values()))
    stored = checkpoints.decode_tree(checkpoints.encode_tree(moved))
    state = checkpoints.decode_tree(checkpoints.encode_tree(state))
    again, _, _ = method.server_update(stored, state, total)
    tree.check_shapes(again, SHAPES)


def test_the_order_of_arrival_does_not_change_a_bit():
    method, rng = algorithm("FedAdam"), np.random.default_rng(5)
    parts = [
        method.codec.encode(
            rng.normal(size=3).astype(np.float32), n, {"loss": MetricSum(n, 1)}, rng
        )
        for n in range(1, 7)
    ]
    results = set()
    for order in (parts, parts[::-1], parts[3:] + parts[:3]):
        total = method.codec.empty()
        for part in order:
            method.codec.add(total, part)
        moved, state, _ = method.server_update(START, method.optimizer.init(START), total)
        results.add(checkpoints.encode_tree(moved) + checkpoints.encode_tree(state))
    assert len(results) == 1


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_step_that_overflows_is_refused():
    method = algorithm(clip_norm=1e38, learning_rate=1e3)
    with pytest.raises(NumericFailure, match="'w' is not finite"):
        method.server_update(START, {}, total_of(method, ((1e37, 0.0, 0.0), 4)))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_moment_that_overflows_is_refused():
    # The square of 1e25 is beyond float32: the parameters would stay finite, and never move again.
    method = algorithm("FedAdagrad", clip_norm=1e30)
    with pytest.raises(NumericFailure, match="v/w"):
        method.server_update(
            START, method.optimizer.init(START), total_of(method, ((1e25, 0.0, 0.0), 4))
        )


def test_nothing_to_add_up_is_refused():
    method = algorithm()
    with pytest.raises(NumericFailure, match="no weight"):
        method.server_update(START, {}, method.codec.empty())


def test_another_plans_shapes_are_refused():
    method = algorithm()
    other = Algorithm((("w", (5,)),), method.codec, method.optimizer)
    with pytest.raises(ShapeMismatch):
        other.server_update(START, {}, total_of(method, ((1.0, 1.0, 1.0), 1)))
