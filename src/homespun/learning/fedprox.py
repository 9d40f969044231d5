"""FedProx: clients are held near the model that they were given.

Li et al. 2020, "Federated optimization in heterogeneous networks" (arXiv:1812.06127), algorithm 2. Client i minimises

    f_i(y) + proximal / 2 |y - x|^2            (the paper's mu; section 3.2)

by its local steps. Where they reach the minimum y_i, the model rests where sum w_i (y_i - x) = 0.
"""

from __future__ import annotations

from collections.abc import Mapping

from homespun.learning.averaging import averaging
from homespun.learning.method import LocalRule, Method, register, require


def fed_prox(
    proximal: float, server: str, server_settings: Mapping[str, float], weights: str
) -> Method:
    """`proximal` 0 is FedAvg; times the learning rate it must stay below 2, or the steps diverge."""
    require(proximal >= 0, "FedProx", "proximal", ">= 0", proximal)
    rules = (LocalRule(proximal=proximal),)
    return averaging(
        "FedProx", server, server_settings, weights, local=lambda model, vectors, clients: rules
    )


register(
    fed_prox, "FedProx", proximal=0.01, server="FedAvg", server_settings={}, weights="examples"
)
