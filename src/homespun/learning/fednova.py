"""FedNova: who made more steps does not pull harder.

Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous federated optimization"
(arXiv:2007.07481). Client i's update is minus lr times its gradients, weighted by a_i, a vector of one entry per
step. The server takes the mean of what each client did per step, times the mean number of steps:

    x <- step(x, tau sum p_i (y_i - x) / |a_i|_1),   tau = sum p_i |a_i|_1,   p_i = w_i / sum w

    SGD, K steps          |a|_1 = K
    momentum rho          |a|_1 = (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho)
    proximal term mu      |a|_1 = (1 - (1 - lr mu)^K) / (lr mu)

Summed: w / |a|_1 as the weight of a client's update, w |a|_1, and w.
"""

from __future__ import annotations

from collections.abc import Mapping

from homespun.learning.averaging import server_step
from homespun.learning.method import (
    Array,
    LocalResult,
    LocalRule,
    Method,
    Report,
    Sums,
    Vectors,
    register,
    require,
    weighting,
)


def fed_nova(
    momentum: float,
    proximal: float,
    server: str,
    server_settings: Mapping[str, float],
    weights: str,
) -> Method:
    """`momentum`: that of the clients' optimizer, which is set there; `proximal`: added to their steps, as FedProx."""
    require(0 <= momentum < 1, "FedNova", "momentum", ">= 0 and < 1", momentum)
    require(proximal >= 0, "FedNova", "proximal", ">= 0", proximal)
    require(not (momentum and proximal), "FedNova", "momentum", "0 with a proximal term", momentum)
    step = server_step(server, server_settings)
    weigh = weighting(weights)

    def normalised(num_examples: Array, num_steps: Array, length: Array) -> Mapping[str, Array]:
        share = weigh(num_examples, num_steps)["weight"]
        return {"weight": share / length, "steps": share * length, "share": share}

    def numbers(num_examples: Array, num_steps: Array) -> Mapping[str, Array]:
        still_moving = momentum * (1 - momentum**num_steps) / (1 - momentum)
        return normalised(num_examples, num_steps, (num_steps - still_moving) / (1 - momentum))

    def proximal_report(
        model: Array, vectors: Vectors, clients: Vectors, results: tuple[LocalResult, ...]
    ) -> Report:
        (result,) = results
        pull = result.learning_rate * proximal
        length = (1 - (1 - pull) ** result.num_steps) / pull
        counted = normalised(result.num_examples, result.num_steps, length)
        return Report({"update": counted["weight"][:, None] * result.update}, counted)

    def server_update(model: Array, vectors: Vectors, sums: Sums) -> tuple[Array, Vectors]:
        share = sums.numbers["share"]
        per_step = sums.vectors["update"] / share
        return step.take(model, vectors, per_step * (sums.numbers["steps"] / share))

    rules = (LocalRule(proximal=proximal),)
    return Method(
        name="FedNova",
        begin=lambda model, layout: step.begin(model),
        local=lambda model, vectors, clients: rules,
        numbers=numbers,
        report=proximal_report if proximal else None,
        server_update=server_update,
        terms={"momentum": momentum, "proximal": 0.0},
    )


register(
    fed_nova,
    "FedNova",
    momentum=0.0,
    proximal=0.0,
    server="FedAvg",
    server_settings={},
    weights="examples",
)
