"""Median, trimmed mean, Krum: against direct computations, and against clients that send what they want."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from homespun.errors import InvalidConfig
from homespun.learning.method import method
from homespun.learning.robust import squared_distances

KINDS = (np.asarray, torch.from_numpy)


def combined(name, rows, settings=None) -> Any:
    combine = method(name, settings).combine
    assert combine is not None
    return combine(rows, rows[:, 0] * 0 + 1)


def updates(n, d=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def krum_scores(rows, f):
    scores = []
    for i, row in enumerate(rows):
        others = sorted(((row - other) ** 2).sum() for j, other in enumerate(rows) if j != i)
        scores.append(sum(others[: len(rows) - f - 2]))
    return np.array(scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_the_median_is_that_of_every_coordinate(n, kind):
    rows = updates(n)
    found = combined("Median", kind(rows))
    np.testing.assert_allclose(np.asarray(found), np.median(rows, 0), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "trim", "out"), [(10, 0.1, 1), (10, 0.25, 2), (100, 0.29, 29), (7, 0.0, 0), (3, 0.49, 1)]
)
def test_the_trimmed_mean_leaves_both_ends_out(n, trim, out, kind):
    rows = updates(n)
    found = combined("TrimmedMean", kind(rows), {"trim": trim})
    expected = [np.mean(sorted(column)[out : n - out]) for column in rows.T]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "f"), [(5, 1), (9, 3), (12, 2), (3, 0)])
def test_krum_takes_the_update_with_the_nearest_neighbours(n, f, kind):
    for seed in range(5):
        rows = updates(n, seed=seed)
        best = krum_scores(rows, f).argsort()
        one = combined("Krum", kind(rows), {"byzantine": f})
        np.testing.assert_allclose(np.asarray(one), rows[best[0]])
        for select in (0, 2):
            settings = {"byzantine": f, "select": select}
            several = combined("MultiKrum", kind(rows), settings)
            expected = rows[best[: select or n - f]].mean(0)
            np.testing.assert_allclose(np.asarray(several), expected, rtol=1e-12)


ATTACKS = {
    "one far away": lambda honest: np.full(honest.shape[1], 1e12),
    "beyond floating point": lambda honest: np.full(honest.shape[1], 1e200),
    "against the mean": lambda honest: -50 * honest.mean(0),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Median", {}),
        ("TrimmedMean", {"trim": 0.3}),
        ("Krum", {"byzantine": 3}),
        ("MultiKrum", {"byzantine": 3}),
    ],
)
def test_three_of_ten_cannot_spoil_it_while_one_spoils_the_mean(name, settings, attack):
    honest = 1.0 + 0.1 * updates(7)
    false = ATTACKS[attack](honest)
    rows = np.concatenate([honest[:3], np.tile(false, (3, 1)), honest[3:]])
    found = combined(name, rows, settings)
    assert (found >= honest.min(0)).all()
    assert (found <= honest.max(0)).all()
    assert np.abs(np.concatenate([honest, false[None]]).mean(0) - 1).max() > 0.5
    order = np.random.default_rng(1).permutation(10)
    np.testing.assert_allclose(combined(name, rows[order], settings), found)


def test_krum_refuses_a_round_that_is_too_small_for_its_promise():
    combined("Krum", updates(7), {"byzantine": 2})
    with pytest.raises(InvalidConfig, match="too few clients"):
        combined("Krum", updates(6), {"byzantine": 2})
    with pytest.raises(InvalidConfig, match="too few clients"):
        combined("MultiKrum", updates(8), {"byzantine": 0, "select": 9})


@pytest.mark.parametrize("kind", KINDS)
def test_squared_distances(kind):
    rows = updates(6)
    expected = ((rows[:, None] - rows[None]) ** 2).sum(2)
    found = np.asarray(squared_distances(kind(rows)))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found.diagonal() == 0).all()
    alike = np.asarray(squared_distances(kind(1e4 + 1e-6 * rows)))  # below what a product resolves
    assert (alike >= 0).all()
    rows[:2] = 1e200
    overflown = np.asarray(squared_distances(kind(rows)))
    assert (overflown[:2] == np.inf).all()
    np.testing.assert_allclose(overflown[2:, 2:], expected[2:, 2:], atol=1e-12)


@pytest.mark.parametrize("name", ["Median", "TrimmedMean", "Krum", "MultiKrum"])
def test_what_is_given_stays_as_it_is(name):
    for kind in KINDS:
        rows = kind(updates(9))
        before = rows + 0
        combined(name, rows)
        np.testing.assert_array_equal(rows, before)
