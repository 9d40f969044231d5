"""Aggregation that some of the clients cannot spoil, whatever they send.

Median, TrimmedMean: Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal statistical rates"
(arXiv:1803.01498): of each coordinate by itself the median, or the mean without the `trim` n largest and smallest.

Krum, MultiKrum: Blanchard et al. 2017, "Machine learning with adversaries: Byzantine tolerant gradient descent";
the mean of several is in its experiments. Of n updates f may be false, n >= 2 f + 3. The score of an update
is the sum of its squared distances to the n - f - 2 nearest others; Krum takes the one with the lowest score, MultiKrum
the mean of the `select` lowest.

Each needs all updates themselves, so it works without secure aggregation only. Clients weigh the same, since a client
could claim any number of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from homespun.errors import InvalidConfig
from homespun.learning.arrays import Array, in_order
from homespun.learning.averaging import averaging
from homespun.learning.method import Method, register, require


def _method(
    name: str, combine: Callable[[Array], Array], server: str, settings: Mapping[str, float]
) -> Method:
    return averaging(
        name, server, settings, "equal", combine=lambda updates, weights: combine(updates)
    )


def median(server: str, server_settings: Mapping[str, float]) -> Method:
    """Of an even number of clients: the mean of the two in the middle."""

    def combine(updates: Array) -> Array:
        ordered, n = in_order(updates), len(updates)
        return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2

    return _method("Median", combine, server, server_settings)


def trimmed_mean(trim: float, server: str, server_settings: Mapping[str, float]) -> Method:
    """`trim`: share of the clients left out at either end, rounded down."""
    require(0 <= trim < 0.5, "TrimmedMean", "trim", ">= 0 and < 0.5", trim)

    def combine(updates: Array) -> Array:
        n = len(updates)
        out = int(trim * n + 1e-9)  # 0.29 of 100 are 29, whatever floating point says
        return in_order(updates)[out : n - out].mean(0)

    return _method("TrimmedMean", combine, server, server_settings)


def krum(
    name: str, byzantine: int, select: int, server: str, server_settings: Mapping[str, float]
) -> Method:
    """`byzantine`: the paper's f; `select`: how many are averaged, its m; 0: n - f.

    `combine` raises `InvalidConfig` for fewer than 2 f + 3 clients.
    """
    require(byzantine >= 0, name, "byzantine", ">= 0", byzantine)
    require(select >= 0, name, "select", ">= 0", select)

    def combine(updates: Array) -> Array:
        n = len(updates)
        if n < max(2 * byzantine + 3, select):
            raise InvalidConfig(
                f"{name} has too few clients in a round",
                expected=max(2 * byzantine + 3, select),
                got=n,
            )
        near = in_order(squared_distances(updates))[1 : n - byzantine - 1]
        chosen = near.sum(0).argsort()[: select or n - byzantine]
        return updates[chosen].mean(0)

    return _method(name, combine, server, server_settings)


def squared_distances(rows: Array) -> Array:
    """[n, n] of [n, d], in one matrix product; infinite where it overflows, as it does for absurd updates only."""
    with np.errstate(over="ignore", invalid="ignore"):
        products = rows @ rows.T
        squares = products.diagonal()
        distances = (squares[:, None] + squares - 2 * products).clip(0)
    distances[distances != distances] = float("inf")
    return distances


_SERVER = {"server": "FedAvg", "server_settings": {}}
register(median, "Median", **_SERVER)
register(trimmed_mean, "TrimmedMean", trim=0.1, **_SERVER)
register(partial(krum, "Krum", select=1), "Krum", byzantine=1, **_SERVER)
register(partial(krum, "MultiKrum"), "MultiKrum", byzantine=1, select=0, **_SERVER)
