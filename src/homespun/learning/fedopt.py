"""FedAdagrad, FedAdam, FedYogi: adaptive server optimizers.

Reddi et al. 2021, "Adaptive federated optimization" (arXiv:2003.00295). As there, without bias correction; `tau`
is the degree of adaptivity and v starts at tau^2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from homespun.learning.optimizers import ServerOptimizer, State, register, zeros
from homespun.types import FloatArray, Tree

SecondMoment = Callable[[FloatArray, FloatArray], FloatArray]
"""(v, squared update) -> next v."""


def _adaptive(
    name: str, learning_rate: float, beta1: float, tau: float, second_moment: SecondMoment
) -> ServerOptimizer:
    rate, b1, t = np.float32(learning_rate), np.float32(beta1), np.float32(tau)

    def init(x: Tree) -> State:
        return {
            **zeros("m", x),
            **{f"v/{key}": np.full_like(array, t * t) for key, array in x.items()},
        }

    def apply(x: Tree, state: State, update: Tree) -> tuple[dict[str, FloatArray], State]:
        moved: dict[str, FloatArray] = {}
        moments: State = {}
        for key in x:
            m = b1 * state[f"m/{key}"] + (1 - b1) * update[key]
            v = second_moment(state[f"v/{key}"], np.square(update[key]))
            moments[f"m/{key}"], moments[f"v/{key}"] = m, v
            moved[key] = (x[key] + rate * m / (np.sqrt(v) + t)).astype(x[key].dtype)
        return moved, moments

    return ServerOptimizer(name, init, apply)


def fed_adagrad(
    learning_rate: float = 0.1, beta1: float = 0.0, tau: float = 1e-3
) -> ServerOptimizer:
    """v <- v + u^2."""
    return _adaptive("FedAdagrad", learning_rate, beta1, tau, lambda v, square: v + square)


def fed_adam(
    learning_rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> ServerOptimizer:
    """v <- beta2 v + (1 - beta2) u^2."""
    b2 = np.float32(beta2)
    return _adaptive(
        "FedAdam", learning_rate, beta1, tau, lambda v, square: b2 * v + (1 - b2) * square
    )


def fed_yogi(
    learning_rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> ServerOptimizer:
    """v <- v - (1 - beta2) u^2 sign(v - u^2)."""
    b2 = np.float32(beta2)
    return _adaptive(
        "FedYogi",
        learning_rate,
        beta1,
        tau,
        lambda v, square: v - (1 - b2) * square * np.sign(v - square),
    )


register(fed_adagrad, "FedAdagrad", learning_rate=0.1, beta1=0.0, tau=1e-3)
register(fed_adam, "FedAdam", learning_rate=0.01, beta1=0.9, beta2=0.99, tau=1e-3)
register(fed_yogi, "FedYogi", learning_rate=0.01, beta1=0.9, beta2=0.99, tau=1e-3)
