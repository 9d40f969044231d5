"""FedAvg and FedAvgM.

McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data" (arXiv:1602.05629),
algorithm 1; Hsu et al. 2019, "Measuring the effects of non-identical data distribution for federated visual
classification" (arXiv:1909.06335).
"""

from __future__ import annotations

import numpy as np

from homespun.learning.optimizers import ServerOptimizer, State, register, zeros
from homespun.types import FloatArray, Tree


def fed_avg(learning_rate: float = 1.0) -> ServerOptimizer:
    """x <- x + lr * mean update."""
    rate = np.float32(learning_rate)

    def apply(x: Tree, state: State, update: Tree) -> tuple[dict[str, FloatArray], State]:
        return {name: x[name] + rate * update[name] for name in x}, state

    return ServerOptimizer("FedAvg", lambda _: {}, apply)


def fed_avg_m(learning_rate: float = 1.0, momentum: float = 0.9) -> ServerOptimizer:
    """v <- momentum * v + mean update; x <- x + lr * v."""
    rate, beta = np.float32(learning_rate), np.float32(momentum)

    def apply(x: Tree, state: State, update: Tree) -> tuple[dict[str, FloatArray], State]:
        velocity = {f"v/{name}": beta * state[f"v/{name}"] + update[name] for name in x}
        return {name: x[name] + rate * velocity[f"v/{name}"] for name in x}, velocity

    return ServerOptimizer("FedAvgM", lambda x: zeros("v", x), apply)


register(fed_avg, "FedAvg", learning_rate=1.0)
register(fed_avg_m, "FedAvgM", learning_rate=1.0, momentum=0.9)
