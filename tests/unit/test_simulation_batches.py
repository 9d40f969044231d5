"""Batches of whole cohorts: every row once per epoch, the same whatever the chunk, and a device's own on request."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from homespun import zoo
from homespun.errors import InvalidConfig, InvalidInput
from homespun.plan.run import schedule
from homespun.simulation.batches import Batches, batches, chunks, device_batches, split, take

SIZES = np.array([7, 0, 12, 3, 40, 5, 12, 1, 10])
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)])
EVERYONE = np.arange(len(SIZES))


def make(clients=EVERYONE, offsets=OFFSETS, **changes):
    settings = {"batch_size": 5, "local_epochs": 2, "max_rows": None, "seed": 3, "round_number": 4}
    return batches(offsets, clients, **settings | changes)


def rows_of(found: Batches, client: int) -> list[list[int]]:
    """The batches of one client, without what stands in."""
    position = found.clients.tolist().index(client)
    return [
        found.rows[step, position][found.present[step, position]].tolist()
        for step in range(found.num_steps[position])
    ]


def assert_same(one: Batches, other: Batches) -> None:
    for name in ("clients", "active", "num_examples", "num_steps"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    for client in one.clients.tolist():
        assert rows_of(one, client) == rows_of(other, client)


def test_every_row_is_used_once_in_each_epoch_and_epochs_share_no_batch():
    found = make()
    for client in EVERYONE.tolist():
        steps = rows_of(found, client)
        per_epoch = len(steps) // 2
        for epoch in (steps[:per_epoch], steps[per_epoch:]):
            used = [row for batch in epoch for row in batch]
            assert sorted(used) == list(range(OFFSETS[client], OFFSETS[client + 1]))
            assert all(len(batch) == 5 for batch in epoch[:-1])
    assert found.rows.dtype == found.clients.dtype == found.active.dtype == np.int64


def test_epochs_and_rounds_and_seeds_have_orders_of_their_own():
    found = make()
    first, second = np.split(np.array(rows_of(found, 4)), 2)
    assert first.tolist() != second.tolist()
    for other in (make(seed=4), make(round_number=5)):
        assert rows_of(other, 4) != rows_of(found, 4)
    assert rows_of(make(), 4) == rows_of(found, 4)
    relative = [[np.subtract(b, OFFSETS[c]).tolist() for b in rows_of(found, c)] for c in (2, 6)]
    assert relative[0] != relative[1]  # two clients of the same size


def test_the_active_clients_of_a_step_are_a_prefix():
    found = make()
    assert (np.diff(found.num_steps) <= 0).all()
    assert found.clients.tolist() == [4, 2, 6, 0, 8, 3, 5, 7, 1]  # ties by index
    assert found.num_steps.tolist() == [16, 6, 6, 4, 4, 2, 2, 2, 0]
    assert found.active.tolist() == [(found.num_steps > step).sum() for step in range(16)]
    assert found.num_examples.tolist() == SIZES[found.clients].tolist()


def test_what_stands_in_is_a_row_of_the_same_batch():
    found = make()
    for step, active in enumerate(found.active):
        for rows, present in zip(
            found.rows[step, :active], found.present[step, :active], strict=True
        ):
            assert present.any()
            assert set(rows[~present]) <= set(rows[present])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("max_rows", [None, 8])
def test_the_order_depends_on_neither_chunk_nor_cohort(shuffle, max_rows):
    settings = {"max_rows": max_rows, "shuffle": shuffle}
    whole = make(**settings)
    for client in EVERYONE.tolist():
        alone = make(np.array([client]), **settings)
        assert rows_of(alone, client) == rows_of(whole, client)
    assert_same(make(EVERYONE[::-1], **settings), whole)
    for chunk_size in (1, 2, 4, 100):
        parts = list(split(whole, chunk_size))
        built = list(
            chunks(
                OFFSETS, EVERYONE, chunk_size, batch_size=5, local_epochs=2, seed=3, round_number=4,
                **settings,
            )
        )  # fmt: skip
        assert sum(len(part.clients) for part in parts) == len(EVERYONE)
        for part, alone in zip(parts, built, strict=True):
            assert len(part.clients) <= chunk_size
            assert part.rows.shape == alone.rows.shape == part.present.shape
            assert_same(part, alone)
            assert_same(part, take(whole, *np.searchsorted(*_bounds(whole, part))))
            assert np.shares_memory(part.rows, whole.rows) or not part.rows.size


def _bounds(whole: Batches, part: Batches):
    """Arguments for searchsorted that give the part's begin and end."""
    begin = whole.clients.tolist().index(part.clients[0])
    return np.arange(len(whole.clients) + 1), [begin, begin + len(part.clients)]


def test_a_client_with_more_rows_uses_one_choice_per_round():
    found = make(max_rows=8)
    first, second = pairwise([0, 2, 4])
    steps = rows_of(found, 4)
    chosen = [{row for batch in steps[slice(*at)] for row in batch} for at in (first, second)]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 8
    assert steps[:2] != steps[2:]
    other = {row for batch in rows_of(make(max_rows=8, round_number=5), 4) for row in batch}
    assert other != chosen[0]
    assert found.num_examples.tolist() == np.minimum(SIZES, 8)[found.clients].tolist()
    for client in (0, 3):  # not over the limit: all of their rows
        used = {row for batch in rows_of(found, client) for row in batch}
        assert used == set(range(OFFSETS[client], OFFSETS[client + 1]))


def test_without_shuffling_it_is_the_order_of_the_arena():
    assert rows_of(make(shuffle=False, local_epochs=1), 2) == [
        [7, 8, 9, 10, 11], [12, 13, 14, 15, 16], [17, 18]
    ]  # fmt: skip
    assert rows_of(make(shuffle=False, local_epochs=1, max_rows=6), 2) == [[7, 8, 9, 10, 11], [12]]


@pytest.mark.parametrize("max_rows", [11, 1000])
def test_device_batches_are_the_schedule_of_a_plan(max_rows):
    plan = zoo.load("digits").with_settings(local_epochs=3, max_rows=max_rows)
    manifest = plan.manifest
    sizes = np.array([30, 2, 25, 11, 10])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    clients, seeds = np.array([2, 0, 4, 1, 3]), [11, 12, 13, 2**53 - 1, 15]
    found = device_batches(
        offsets, clients, seeds,
        batch_size=manifest.batch_size, local_epochs=manifest.local_epochs, max_rows=max_rows,
    )  # fmt: skip
    for client, seed in zip(clients.tolist(), seeds, strict=True):
        rows = {"row": np.arange(offsets[client], offsets[client + 1])}
        expected = list(schedule(manifest, rows, seed))
        position = found.clients.tolist().index(client)
        assert found.num_steps[position] == len(expected)
        for step, (batch, weight) in enumerate(expected):
            assert found.rows[step, position].tolist() == batch["row"].tolist()
            assert found.present[step, position].tolist() == (weight == 1).tolist()


def test_every_order_of_a_clients_rows_is_as_likely():
    """Chi-square over the 24 orders of 4 rows, over 24,000 clients: 23 degrees of freedom, so below 49.7 with
    probability 0.999; and over (first row, round) for few clients and many rounds."""
    offsets = np.arange(24_001) * 4
    found = make(np.arange(24_000), offsets, batch_size=4, local_epochs=2)
    local = found.rows - offsets[found.clients][:, None]
    for epoch in local:
        counts = np.unique(epoch @ 4 ** np.arange(4), return_counts=True)[1]
        assert len(counts) == 24
        assert ((counts - 1000) ** 2 / 1000).sum() < 49.7
    same = (local[0] == local[1]).all(axis=1).mean()
    assert abs(same - 1 / 24) < 4 * (1 / 24 / 24_000) ** 0.5  # epochs know nothing of each other

    sizes = np.array([0, 10])
    firsts = [
        make(np.array([0]), sizes, local_epochs=1, round_number=number).rows[0, 0, 0]
        for number in range(2000)
    ]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # 9 degrees of freedom, 0.999


def test_the_choice_of_rows_is_uniform():
    offsets = np.arange(20_001) * 10
    found = make(np.arange(20_000), offsets, batch_size=3, local_epochs=1, max_rows=3)
    counts = np.bincount((found.rows[0] - offsets[found.clients][:, None]).ravel(), minlength=10)
    # Without replacement the variance of a count is 0.7 of the multinomial's.
    assert ((counts - 6000) ** 2 / 6000).sum() < 27.9


def test_nobody_and_nothing_give_no_steps():
    for found in (make(EVERYONE[:0]), make(np.array([1]))):
        assert found.rows.shape[0] == len(found.active) == 0
    assert list(split(make(EVERYONE[:0]), 3)) == []
    assert device_batches(
        OFFSETS, EVERYONE[:0], [], batch_size=5, local_epochs=1, max_rows=None
    ).rows.shape == (0, 0, 5)


def test_what_means_nothing_is_refused():
    for name in ("batch_size", "local_epochs", "max_rows"):
        with pytest.raises(InvalidConfig, match=name):
            make(**{name: 0})
    for client in (-1, len(SIZES)):
        with pytest.raises(InvalidInput, match="a client that the arena does not have") as caught:
            make(np.array([0, client]))
        assert caught.value.details["got"] == client
    with pytest.raises(InvalidConfig, match="chunk_size"):
        list(split(make(), 0))
    with pytest.raises(InvalidInput, match="seed"):
        device_batches(OFFSETS, EVERYONE, [1], batch_size=5, local_epochs=1, max_rows=None)


def test_a_hundred_thousand_clients_at_once():
    sizes = np.random.default_rng(0).integers(1, 8, 100_000)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    found = make(np.arange(100_000), offsets, batch_size=4, local_epochs=1)
    used = found.rows[found.present]
    assert len(used) == offsets[-1]
    assert (np.sort(used) == np.arange(offsets[-1])).all()
    owners = np.searchsorted(offsets, found.rows, side="right") - 1
    within = np.arange(len(found.clients)) < found.active[:, None]
    assert (owners == found.clients[:, None])[within].all()
