"""Rows without owners become clients: the partitions of the literature, each an owner for every row.

`from_arrays(inputs, owners)` makes the arena. No row is lost, none is given twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from homespun import rng
from homespun.errors import InvalidConfig, InvalidInput
from homespun.types import AnyArray

Owners = npt.NDArray[np.int64]
"""[num_rows]: the client of each row."""


def iid(num_rows: int, num_clients: int, seed: int) -> Owners:
    """Rows dealt out at random, equally: numbers of rows differ by at most 1.

    Raises `InvalidConfig` for more clients than rows.
    """
    _check_clients(num_rows, num_clients)
    return rng.stream(seed, "iid").permutation(np.arange(num_rows) % num_clients)


def dirichlet(labels: AnyArray, num_clients: int, alpha: float, seed: int) -> Owners:
    """Clients with label distributions q ~ Dirichlet(alpha * p) and equal numbers of rows, within 1.

    Hsu, Qi, Brown 2019, "Measuring the effects of non-identical data distribution for federated visual
    classification", section 3; p is the labels' own distribution. `alpha` towards 0 gives one label per client, a
    large one identical clients. As rows are finite, a label runs out for some clients, who then draw from q among the
    labels that are left. Where the paper serves clients one after another, so that the last ones take what remains,
    all draw at once here and chance decides who is served. `labels` [num_rows]: integers or strings.

    Raises `InvalidConfig` for an alpha that is not above 0, or more clients than rows.
    """
    if not 0 < alpha < np.inf:
        raise InvalidConfig("alpha must be above 0", got=alpha)
    kinds, counts = _kinds(labels)
    _check_clients(len(kinds), num_clients)
    generator = rng.stream(seed, "dirichlet")
    left = counts.copy()
    need = np.bincount(np.arange(len(kinds)) % num_clients, minlength=num_clients)
    preferences = generator.dirichlet(alpha * counts / counts.sum(), num_clients)
    given = np.zeros((num_clients, len(counts)), np.int64)
    while (
        need.any()
    ):  # once per label at most: whenever somebody is not served, a label has run out
        chances = np.where(left > 0, preferences, 0)
        hopeless = chances.sum(axis=1) < 1e-12
        chances[hopeless] = left
        wanted = generator.multinomial(need, chances / chances.sum(axis=1, keepdims=True))
        for kind in np.flatnonzero(wanted.sum(axis=0) > left):
            wanted[:, kind] = generator.multivariate_hypergeometric(
                wanted[:, kind], left[kind], method="marginals"
            )
        given += wanted
        left -= wanted.sum(axis=0)
        need -= wanted.sum(axis=1)
    owners = np.empty(len(kinds), np.int64)
    by_kind = np.lexsort((generator.random(len(kinds)), kinds))
    owners[by_kind] = np.repeat(np.tile(np.arange(num_clients), len(counts)), given.T.ravel())
    return owners


def shards(labels: AnyArray, num_clients: int, shards_per_client: int, seed: int) -> Owners:
    """Rows sorted by label, cut into `num_clients * shards_per_client` equal shards, dealt out at random.

    McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data", section 3: their
    pathological non-IID MNIST has 100 clients with 2 shards. Shards differ by at most 1 row. `labels` [num_rows].

    Raises `InvalidConfig` for more shards than rows.
    """
    if shards_per_client < 1:
        raise InvalidConfig("shards_per_client must be at least 1", got=shards_per_client)
    kinds, _ = _kinds(labels)
    num_shards = num_clients * shards_per_client
    _check_clients(len(kinds), num_shards, "shards")
    generator = rng.stream(seed, "shards")
    owner_of_shard = generator.permutation(np.arange(num_shards) % num_clients)
    # Which rows of a label share a shard is left to chance, not to their order in the file.
    by_label = np.lexsort((generator.random(len(kinds)), kinds))
    owners = np.empty(len(kinds), np.int64)
    owners[by_label] = owner_of_shard[np.arange(len(kinds)) * num_shards // len(kinds)]
    return owners


def by_key(keys: Sequence[object] | AnyArray) -> tuple[Owners, npt.NDArray[np.str_]]:
    """One client per distinct key, in sorted order, and their names; `keys` [num_rows]: integers or strings.

    Raises `InvalidInput` for keys of other kinds.
    """
    array = np.asarray(keys)
    if array.ndim != 1 or array.dtype.kind not in "iuUS":
        raise InvalidInput(
            "keys must be a list of integers or of strings", got=f"{array.dtype}{list(array.shape)}"
        )
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    names, owners = np.unique(array, return_inverse=True)
    return owners.astype(np.int64), names.astype(np.str_)


def _kinds(labels: AnyArray) -> tuple[Owners, Owners]:
    """Labels as 0, 1, ... [num_rows] and how often there is each."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iuUSb":
        raise InvalidInput(
            "labels must be a list of integers or strings, at least one",
            hint="give one label per row",
            got=f"{labels.dtype}{list(labels.shape)}",
        )
    _, kinds, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return kinds.astype(np.int64), counts.astype(np.int64)


def _check_clients(num_rows: int, num_parts: int, what: str = "clients") -> None:
    if not 1 <= num_parts <= num_rows:
        raise InvalidConfig(
            f"{num_rows} rows cannot be divided among {num_parts} {what}",
            hint=f"ask for 1 to {num_rows} {what}",
        )
