"""The law of secure aggregation: the sum is the plain integer sum, bit for bit, or a named error says why not."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homespun.errors import SecureAggregationError, TooManyDropOuts
from homespun.rng import stream
from homespun.secagg.graph import Adversary, choose_shape
from tests.vectors.secagg import STEPS, World

STAYS = "stays"
FATES = (*STEPS, STAYS)


def check(world: World, gone: Mapping[int, str], seed: int) -> bool:
    """Run a group to its end: whether its sum was opened. A wrong sum fails the test."""
    try:
        survivors = world.run(gone, seed)
        main, aux = world.group.open_sum()
    except SecureAggregationError:
        return False
    assert survivors == sorted(i for i in world.devices if gone.get(i) not in STEPS[:2])
    assert (main.tolist(), aux.tolist()) == world.plain_sum(survivors)
    return True


def must_open(num_devices: int, gone: Mapping[int, str]) -> bool:
    """A complete graph opens exactly when at least t devices stay to the end (and t is at least n_min)."""
    threshold = 2 * num_devices // 3 + 1
    return num_devices - len(gone) >= threshold


@pytest.mark.parametrize("num_devices", [3, 4, 5])
def test_every_pattern_of_drop_outs(num_devices: int):
    opened = 0
    for number, fates in enumerate(combinations_with_replacement(FATES, num_devices)):
        shuffled = stream(number, "fates").permutation(num_devices)
        gone = {int(i): fate for i, fate in zip(shuffled, fates, strict=True) if fate != STAYS}
        done = check(World(num_devices), gone, number)
        assert done == must_open(num_devices, gone), gone
        opened += done
    assert opened >= (1 if num_devices == 3 else 5)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_group_any_drop_outs_any_order(data):
    num_devices = data.draw(st.integers(3, 16))
    bits = data.draw(st.sampled_from([1, 7, 12, 16, 17, 32]))
    dimension, num_aux = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 5))
    numbers = st.integers(0, num_devices - 1)
    bearable = num_devices - (2 * num_devices // 3 + 1)
    gone = data.draw(st.dictionaries(numbers, st.sampled_from(STEPS), max_size=bearable + 1))
    world = World(num_devices, bits=bits, dimension=dimension, num_aux=num_aux)
    assert check(world, gone, data.draw(st.integers(0, 2**32))) == must_open(num_devices, gone)


@settings(max_examples=12, deadline=None)
@given(st.integers(17, 200), st.integers(0, 2**32), st.integers(-3, 2))
def test_groups_of_any_size_with_the_default_terms(num_devices: int, seed: int, beyond: int):
    """Complete up to 64 devices, rings above; as many losses as it bears, some fewer, or too many."""
    world = World(num_devices, corrupt_fraction=0.05, drop_out_fraction=0.1, dimension=5, bits=16)
    shape = choose_shape(num_devices, 0.05, 0.1, Adversary.SEMI_MALICIOUS)
    assert shape.is_complete == (num_devices <= 64)
    rng = stream(seed, "fates")
    lost = rng.permutation(num_devices)[: max(0, shape.max_drop_outs + beyond)].tolist()
    gone = {index: STEPS[rng.integers(len(STEPS))] for index in lost}
    opened = check(world, gone, seed)
    # Those who leave when the survivors are fixed are no loss to a ring, as long as everybody has neighbours left.
    assert opened or beyond > 0


def test_a_large_complete_group():
    gone = {i: STEPS[i % 4] for i in range(0, 39, 3)}
    assert check(World(40), gone, 1) == must_open(40, gone) is True


@pytest.mark.parametrize("num_gone", [0, 6])
def test_a_ring_bears_the_losses_that_it_promises(num_gone: int):
    world = World(65, corrupt_fraction=0.05, drop_out_fraction=0.1)
    assert not world.group.graph.shape.is_complete
    assert check(world, drop(world, num_gone), num_gone)


def test_a_large_ring():
    world = World(200, corrupt_fraction=0.0, drop_out_fraction=0.1, adversary=Adversary.SEMI_HONEST)
    assert world.group.graph.shape.degree < 40
    assert check(world, drop(world, 20), 3)


def test_a_ring_refuses_more():
    world = World(65, corrupt_fraction=0.05, drop_out_fraction=0.1)
    with pytest.raises(TooManyDropOuts):
        world.run(dict.fromkeys(range(7), "mask_input"))


def drop(world: World, num_gone: int) -> dict[int, str]:
    """That many devices, at steps in turn."""
    chosen = stream(num_gone, "drop").permutation(len(world.devices))[:num_gone].tolist()
    return {index: STEPS[i % len(STEPS)] for i, index in enumerate(chosen)}
