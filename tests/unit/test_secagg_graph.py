"""Degrees, thresholds and neighbours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from homespun.errors import InvalidConfig, TooManyDropOuts
from homespun.secagg.graph import Adversary, Graph, Shape, choose_shape, find_ring

ROWS = json.loads((Path(__file__).parents[1] / "vectors" / "graph_parameters.json").read_text())
STRICT = Adversary.SEMI_MALICIOUS
ROOT = bytes(range(32))


@pytest.mark.parametrize("row", ROWS["rows"], ids=str)
def test_rings_of_the_vectors(row):
    num_devices, corrupt, lost, adversary, degree, threshold = row
    found = find_ring(num_devices, corrupt, lost, Adversary(adversary))
    assert found == (degree, threshold)


@pytest.mark.parametrize(
    ("num_devices", "corrupt", "lost", "ring"),
    [
        (100, 0.10, 0.20, (52, 32)),
        (200, 0.10, 0.20, (88, 55)),
        (500, 0.10, 0.20, (152, 97)),
        (1000, 0.10, 0.20, (194, 124)),
        (5000, 0.10, 0.20, (260, 166)),
        (100, 0.05, 0.10, (26, 16)),
        (500, 0.05, 0.10, (66, 44)),
        (1000, 0.05, 0.10, (78, 52)),
    ],
)
def test_rings_of_the_design(num_devices, corrupt, lost, ring):
    shape = choose_shape(num_devices, corrupt, lost, STRICT)
    assert (shape.degree, shape.threshold) == ring
    assert shape.max_drop_outs == round(lost * num_devices)


@pytest.mark.parametrize(
    ("num_devices", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (10, 7), (64, 43)]
)
def test_small_groups_are_complete(num_devices, threshold):
    shape = choose_shape(num_devices, 0.1, 0.2, STRICT)
    assert shape == Shape(num_devices, num_devices - 1, threshold, num_devices - threshold)
    graph = Graph(shape, ROOT)
    for index in range(num_devices):
        assert graph.neighbours(index) == tuple(i for i in range(num_devices) if i != index)
        assert graph.holders(index) == tuple(range(num_devices))


def test_rings_begin_after_64():
    assert choose_shape(64, 0.1, 0.2, STRICT).is_complete
    assert not choose_shape(65, 0.05, 0.1, STRICT).is_complete


def test_a_ring_is_regular_symmetric_and_random():
    shape = choose_shape(100, 0.05, 0.1, STRICT)
    graph, other = Graph(shape, ROOT), Graph(shape, bytes(32))
    for index in range(100):
        neighbours = graph.neighbours(index)
        assert graph.holders(index) == neighbours == tuple(sorted(set(neighbours)))
        assert len(neighbours) == shape.degree
        assert index not in neighbours
        assert all(index in graph.neighbours(neighbour) for neighbour in neighbours)
    assert any(graph.neighbours(index) != other.neighbours(index) for index in range(100))


def test_the_ring_order_is_the_one_of_the_hashes():
    """Fixed for other implementations: SHA-256("homespun-secagg-ring-v1" | root | index) ascending."""
    graph = Graph(Shape(100, 2, 2, 10), ROOT)
    assert [graph.neighbours(index) for index in (0, 1, 99)] == RECORDED


RECORDED = [(19, 91), (34, 54), (73, 93)]


def test_losses_that_no_ring_bears():
    with pytest.raises(InvalidConfig, match="no ring"):
        choose_shape(100, 0.4, 0.4, STRICT)


def test_groups_beyond_the_field():
    with pytest.raises(InvalidConfig, match="too large"):
        choose_shape(2**16, 0.1, 0.2, STRICT)


def test_too_few_holders():
    graph = Graph(choose_shape(6, 0.1, 0.2, STRICT), ROOT)
    graph.check_holders(0, {0, 1, 2, 3, 4}, "answered")
    with pytest.raises(TooManyDropOuts, match="too few neighbours answered"):
        graph.check_holders(0, {0, 1, 2, 3}, "answered")
