"""Mime-lite: clients step with the server's momentum, which nobody but the server changes.

Karimireddy et al. 2021, "Breaking the centralized barrier for cross-device federated learning" (as a preprint:
"Mime: mimicking centralized stochastic algorithms in federated learning", arXiv:2008.03606), MimeLite with SGDm
as the base. s: momentum, 0 at first.

    client    y <- y - lr ((1 - beta) g(y) + beta s),  from y = x
              sends y - x, and the gradient of all of its examples at x
    server    x <- x + mean (y_i - x)
              s <- (1 - beta) mean grad f_i(x) + beta s
"""

from __future__ import annotations

from homespun.learning.method import (
    Array,
    LocalResult,
    LocalRule,
    Method,
    Report,
    Sums,
    Vectors,
    mean_update,
    register,
    require,
    weighting,
)


def mime_lite(beta: float, weights: str) -> Method:
    """`beta` 0 is FedAvg. The clients' own optimizer must be plain SGD."""
    require(0 <= beta < 1, "MimeLite", "beta", ">= 0 and < 1", beta)
    weigh = weighting(weights)

    def local(model: Array, vectors: Vectors, clients: Vectors) -> tuple[LocalRule, ...]:
        momentum = beta * vectors["momentum"]
        return (LocalRule(scale=1 - beta, correction=momentum, wants_gradient=True),)

    def report(
        model: Array, vectors: Vectors, clients: Vectors, results: tuple[LocalResult, ...]
    ) -> Report:
        (result,) = results
        numbers = weigh(result.num_examples, result.num_steps)
        weight = numbers["weight"][:, None]
        return Report(
            {"update": weight * result.update, "gradient": weight * result.gradient}, numbers
        )

    def server_update(model: Array, vectors: Vectors, sums: Sums) -> tuple[Array, Vectors]:
        gradient = sums.vectors["gradient"] / sums.numbers["weight"]
        momentum = (1 - beta) * gradient + beta * vectors["momentum"]
        return model + mean_update(sums), {"momentum": momentum}

    return Method(
        name="MimeLite",
        begin=lambda model, layout: {"momentum": model * 0},
        local=local,
        numbers=weigh,
        report=report,
        server_update=server_update,
        terms=dict.fromkeys(("momentum", "weight_decay", "proximal", "max_grad_norm"), 0.0),
    )


register(mime_lite, "MimeLite", beta=0.9, weights="examples")
