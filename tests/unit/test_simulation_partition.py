"""Partitions of the literature: no row lost, and the statistics that the papers name."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.errors import InvalidConfig, InvalidInput
from homespun.simulation.partition import by_key, dirichlet, iid, shards

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))


def table(owners, num_clients, labels=LABELS):
    """Rows by client and label [num_clients, 10]."""
    counts = np.zeros((num_clients, 10), np.int64)
    np.add.at(counts, (owners, labels), 1)
    return counts


@pytest.mark.parametrize(
    "owners",
    [
        iid(6000, 70, 1),
        dirichlet(LABELS, 70, 0.3, 1),
        dirichlet(LABELS, 70, 1e-6, 1),
        shards(LABELS, 35, 2, 1),
    ],
)
def test_every_row_has_an_owner_and_clients_are_of_equal_size(owners):
    assert owners.shape == (6000,)
    assert owners.dtype == np.int64
    sizes = np.bincount(owners)
    assert len(sizes) in {35, 70}
    assert sizes.max() - sizes.min() <= (2 if len(sizes) == 35 else 1)  # 2 shards, 1 row each


def test_iid_is_a_random_deal():
    owners = iid(6000, 10, 3)
    counts = table(owners, 10)
    assert ((counts - 60) ** 2 / 60).sum() < 126  # 81 degrees of freedom, 0.999
    assert (owners == iid(6000, 10, 3)).all()
    assert (owners != iid(6000, 10, 4)).any()


def test_dirichlet_goes_from_one_label_to_all_alike():
    def variance(alpha):
        shares = table(dirichlet(LABELS, 100, alpha, 2), 100) / 60
        return shares.var(axis=0).mean()

    # q_k ~ Beta(alpha / 10, 9 alpha / 10) has the variance 0.09 / (alpha + 1); 60 draws add a little,
    # and that labels run out takes some: by far the most where every client wants one label.
    assert 0.06 < variance(1e-4) < 0.09
    assert variance(1.0) == pytest.approx(0.09 / 2 * (1 + 1 / 60), rel=0.15)
    assert variance(1e6) < 0.09 / 60 * 1.2


def test_dirichlet_serves_no_client_last():
    """Served one after another, the last clients would have what remains: of other variety than the first."""
    kinds = np.concatenate(
        [(table(dirichlet(LABELS, 60, 0.1, seed), 60) > 0).sum(axis=1)[None] for seed in range(30)]
    )
    first, last = kinds[:, :20].mean(), kinds[:, 40:].mean()
    assert abs(first - last) < 4 * kinds.std() * (2 / 600) ** 0.5


def test_shards_give_each_client_few_labels():
    owners = shards(LABELS, 100, 2, 5)
    counts = table(owners, 100)
    assert (counts.sum(axis=1) == 60).all()
    assert ((counts > 0).sum(axis=1) <= 2).all()  # 20 shards to a label: none has two
    assert (owners != shards(LABELS, 100, 2, 6)).any()


def test_keys_become_clients_in_sorted_order():
    owners, names = by_key(["b", "a", "b", "c"])
    assert owners.tolist() == [1, 0, 1, 2]
    assert names.tolist() == ["a", "b", "c"]
    owners, names = by_key(np.array([10, 9, 10]))
    assert (owners.tolist(), names.tolist()) == ([1, 0, 1], ["9", "10"])


def test_what_cannot_be_divided_is_refused():
    for divide in (
        lambda: iid(3, 4, 0),
        lambda: iid(3, 0, 0),
        lambda: dirichlet(LABELS, 6001, 1.0, 0),
        lambda: dirichlet(LABELS, 10, 0.0, 0),
        lambda: shards(LABELS, 3001, 2, 0),
        lambda: shards(LABELS, 10, 0, 0),
    ):
        with pytest.raises(InvalidConfig):
            divide()
    with pytest.raises(InvalidInput, match="labels"):
        dirichlet(LABELS[:0], 1, 1.0, 0)
    with pytest.raises(InvalidInput, match="keys"):
        by_key([1.5, 2.0])
