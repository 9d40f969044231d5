"""Which rows of the arena each client's steps see: whole chunks of clients at once, no Python per client.

The order depends on (seed, round, client, epoch) alone: not on the strategy, the chunk or the worker. It is the rank
of a counter-based word of (seed, round, client, epoch, row), so that nothing is drawn in sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homespun import rng
from homespun.errors import InvalidConfig, InvalidInput
from homespun.simulation import counters
from homespun.simulation.counters import Words

Integers = npt.NDArray[np.int64]

_OWNER_BITS = 24


@dataclass(frozen=True)
class Batches:
    """The steps of m clients in lockstep.

    `clients` [m]: their indexes in the arena, those with the most steps first, so that the active ones of step s are
    a prefix of `active[s]` clients. `rows` [num_steps, m, B]: rows of the arena; where a batch is shorter than B, a
    row of the same client stands in whose `present` [num_steps, m, B] is False. What lies beyond the prefix means
    nothing. `num_examples` [m]: rows used, once however many epochs; `num_steps` [m].
    """

    clients: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    present: npt.NDArray[np.bool_]
    active: npt.NDArray[np.int64]
    num_examples: npt.NDArray[np.int64]
    num_steps: npt.NDArray[np.int64]


def batches(
    offsets: Integers,
    clients: Integers,
    *,
    batch_size: int,
    local_epochs: int,
    max_rows: int | None,
    seed: int,
    round_number: int,
    shuffle: bool = True,
) -> Batches:
    """The steps of `clients` in round `round_number`.

    As on a device: a client with more than `max_rows` rows uses a random choice of so many in this round; every epoch
    has a random order of its own; its last batch may be short, and epochs do not share a batch. Without `shuffle`,
    the first `max_rows` rows in the arena's order. A client without rows takes no step. Memory is
    (most steps of a client) * m * B * 9 bytes: for a whole cohort of very different clients, use `chunks`.

    Raises `InvalidConfig` for numbers that mean nothing, `InvalidInput` for clients that the arena does not have.
    """
    cohort = _Cohort.sorted_by_steps(offsets, clients, batch_size, local_epochs, max_rows)
    keys = _client_keys(cohort.clients, seed, round_number) if shuffle else None
    return _fill(cohort, _orders(cohort, keys))


def chunks(
    offsets: Integers,
    clients: Integers,
    chunk_size: int,
    *,
    batch_size: int,
    local_epochs: int,
    max_rows: int | None,
    seed: int,
    round_number: int,
    shuffle: bool = True,
) -> Iterator[Batches]:
    """What `split(batches(...), chunk_size)` gives, but one chunk is built at a time.

    Clients of a chunk have about the same number of steps, so that hardly any memory is beyond the prefix.
    """
    whole = _Cohort.sorted_by_steps(offsets, clients, batch_size, local_epochs, max_rows)
    keys = _client_keys(whole.clients, seed, round_number) if shuffle else None
    for begin in range(0, len(whole.clients), _at_least_one("chunk_size", chunk_size)):
        part = slice(begin, begin + chunk_size)
        cohort = whole.part(part)
        yield _fill(cohort, _orders(cohort, None if keys is None else keys[part]))


def device_batches(
    offsets: Integers,
    clients: Integers,
    seeds: Sequence[int],
    *,
    batch_size: int,
    local_epochs: int,
    max_rows: int | None,
) -> Batches:
    """The very batches of `homespun.plan.run.schedule` on devices that hold these rows: `seeds[i]` is the training
    seed of `clients[i]`.

    For proofs that simulation and devices agree; it draws from one generator per client and epoch. Raises as
    `batches` does.
    """
    if len(seeds) != len(clients):
        raise InvalidInput("not one seed per client", expected=len(clients), got=len(seeds))
    seed_of = dict(zip(np.asarray(clients).tolist(), seeds, strict=True))
    cohort = _Cohort.sorted_by_steps(offsets, clients, batch_size, local_epochs, max_rows)
    chosen = []
    for client, begin, held in zip(cohort.clients, cohort.begins, cohort.num_rows, strict=True):
        rows = np.arange(begin, begin + held)
        if max_rows is not None and held > max_rows:
            rows = rows[rng.stream(seed_of[int(client)], "rows").permutation(held)[:max_rows]]
        chosen.append(rows)

    def epoch_order(epoch: int) -> Integers:
        orders = [
            rows[rng.stream(seed_of[int(client)], "batches", epoch).permutation(len(rows))]
            for client, rows in zip(cohort.clients, chosen, strict=True)
        ]
        return np.concatenate([np.empty(0, np.int64), *orders])

    return _fill(cohort, (epoch_order(epoch) for epoch in range(local_epochs)))


def take(whole: Batches, begin: int, end: int) -> Batches:
    """The clients at positions `begin` to `end`, without a copy: the active ones are still a prefix."""
    num_steps = whole.num_steps[begin:end]
    steps = int(num_steps[0]) if len(num_steps) else 0
    return Batches(
        clients=whole.clients[begin:end],
        rows=whole.rows[:steps, begin:end],
        present=whole.present[:steps, begin:end],
        active=np.clip(whole.active[:steps] - begin, 0, len(num_steps)),
        num_examples=whole.num_examples[begin:end],
        num_steps=num_steps,
    )


def split(whole: Batches, chunk_size: int) -> Iterator[Batches]:
    """`whole` in chunks of at most `chunk_size` clients, views of it. Raises `InvalidConfig` for a size below 1."""
    for begin in range(0, len(whole.clients), _at_least_one("chunk_size", chunk_size)):
        yield take(whole, begin, min(begin + chunk_size, len(whole.clients)))


@dataclass(frozen=True)
class _Cohort:
    """Clients with the most steps first, ties by index: where their rows begin, how many they hold and use.

    All arrays are [m].
    """

    clients: Integers
    begins: Integers
    num_rows: Integers
    num_examples: Integers
    num_steps: Integers
    batch_size: int
    local_epochs: int

    @classmethod
    def sorted_by_steps(
        cls,
        offsets: Integers,
        clients: Integers,
        batch_size: int,
        local_epochs: int,
        max_rows: int | None,
    ) -> _Cohort:
        _at_least_one("batch_size", batch_size)
        _at_least_one("local_epochs", local_epochs)
        clients = np.asarray(clients, np.int64)
        num_clients = len(offsets) - 1
        if len(clients) and not 0 <= clients.min() <= clients.max() < num_clients:
            raise InvalidInput(
                "the cohort names a client that the arena does not have",
                hint=f"clients are numbered 0 to {num_clients - 1}",
                got=int(clients.max() if clients.min() >= 0 else clients.min()),
            )
        num_rows = offsets[clients + 1] - offsets[clients]
        used = num_rows
        if max_rows is not None:
            used = np.minimum(num_rows, _at_least_one("max_rows", max_rows))
        num_steps = -(-used // batch_size) * local_epochs
        order = np.lexsort((clients, -num_steps))
        return cls(
            clients=clients[order],
            begins=offsets[clients[order]],
            num_rows=num_rows[order],
            num_examples=used[order],
            num_steps=num_steps[order],
            batch_size=batch_size,
            local_epochs=local_epochs,
        )

    def part(self, part: slice) -> _Cohort:
        return _Cohort(
            clients=self.clients[part],
            begins=self.begins[part],
            num_rows=self.num_rows[part],
            num_examples=self.num_examples[part],
            num_steps=self.num_steps[part],
            batch_size=self.batch_size,
            local_epochs=self.local_epochs,
        )


def _orders(cohort: _Cohort, client_keys: Words | None) -> Iterator[Integers]:
    """For each epoch the arena's rows in the order of use, client after client: [sum of num_examples]."""
    owners, rows = _positions(cohort.num_examples)
    begins = cohort.begins[owners]
    if client_keys is None:
        for _ in range(cohort.local_epochs):
            yield begins + rows
        return
    if (cohort.num_rows > cohort.num_examples).any():
        all_owners, all_rows = _positions(cohort.num_rows)
        order = _shuffled(client_keys, 0, all_owners, all_rows)
        # A client's rows are sorted by key now: those of the lowest keys are its choice.
        rows = all_rows[order][all_rows < cohort.num_examples[all_owners]]
    for epoch in range(cohort.local_epochs):
        yield begins + rows[_shuffled(client_keys, 1 + epoch, owners, rows)]


def _positions(counts: Integers) -> tuple[Integers, Integers]:
    """For clients of so many rows, one after another: the client of each row, and its number within the client."""
    owners = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    return owners, np.arange(len(owners)) - firsts[owners]


def _fill(cohort: _Cohort, orders: Iterator[Integers]) -> Batches:
    """Cut each epoch's order into batches and lay them out step by step."""
    size, used = cohort.batch_size, cohort.num_examples
    order = np.concatenate(list(orders))
    per_epoch = np.maximum(-(-used // size), 1)
    steps = np.arange(cohort.num_steps.max(initial=0))[:, None]
    epoch = np.minimum(steps // per_epoch, cohort.local_epochs - 1)
    first = (steps - epoch * per_epoch) * size  # in its client's order of the epoch
    # As on the device, a short batch is filled with its first row; what is beyond the last step means nothing.
    inside = np.arange(size)
    present = inside < (used - first)[:, :, None]
    places = epoch * used.sum() + (np.cumsum(used) - used) + np.minimum(first, used - 1)
    rows = order[places[:, :, None] + inside * present]
    # num_steps falls, so that the clients with more than s steps are the first ones.
    active = np.searchsorted(-cohort.num_steps, -steps[:, 0], side="left")
    return Batches(
        clients=cohort.clients,
        rows=rows,
        present=present,
        active=active.astype(np.int64),
        num_examples=used,
        num_steps=cohort.num_steps,
    )


def _client_keys(clients: Integers, seed: int, round_number: int) -> Words:
    return counters.draw(counters.begin(seed, "batches", round_number), clients)


def _shuffled(client_keys: Words, epoch: int, owners: Integers, rows: Integers) -> Integers:
    """Where the rows of each owner stand once in random order; owners stay in theirs."""
    if len(client_keys) > 1 << _OWNER_BITS:
        raise InvalidConfig(
            f"batches of {len(client_keys)} clients at once", hint="make them in `chunks`"
        )
    # One SplitMix64 sequence per (client, epoch); row r has its r-th number. Owner and number in one
    # word sort many times faster than one after the other; equal numbers stay in the rows' order.
    starts = counters.draw(client_keys, np.array([epoch]))
    numbers = counters.draw(starts[owners], rows) >> np.uint64(_OWNER_BITS)
    words = owners.astype(np.uint64) << np.uint64(64 - _OWNER_BITS) | numbers
    return np.argsort(words, kind="stable")


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise InvalidConfig(f"{name} must be at least 1", got=value)
    return value
