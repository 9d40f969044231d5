"""SCAFFOLD: control variates take out of every local step what is the client's own drift.

Karimireddy et al. 2020, "SCAFFOLD: stochastic controlled averaging for federated learning" (arXiv:1910.06378),
algorithm 1, option II.
c: the server's control variate, c_i: client i's, both 0 at first; K steps of rate lr; N clients, of which S take part.

    client    y <- y - lr (g(y) - c_i + c),  from y = x
              c_i+ = c_i - c + (x - y) / (K lr)
    server    x <- step(x, 1/|S| sum (y_i - x))          the paper's step is FedAvg's, its lr_g the learning rate
              c <- c + 1/N sum (c_i+ - c_i)

Clients weigh the same: c is the mean of all c_i only then. c_i+ is the mean gradient along the way only where local
steps are plain SGD, so momentum, a proximal term and clipping of gradients are refused. Weight decay is part of f_i.
"""

from __future__ import annotations

from collections.abc import Mapping

from homespun.learning.averaging import server_step
from homespun.learning.method import (
    Array,
    Layout,
    LocalResult,
    LocalRule,
    Method,
    Report,
    Sums,
    Vectors,
    equally,
    mean_update,
    register,
)


def scaffold(server: str, server_settings: Mapping[str, float]) -> Method:
    """`server`: of the optimizers whose step the server makes."""
    step = server_step(server, server_settings)

    def begin(model: Array, layout: Layout) -> Vectors:
        return {"control": model * 0, **step.begin(model)}

    def local(model: Array, vectors: Vectors, clients: Vectors) -> tuple[LocalRule, ...]:
        return (LocalRule(correction=vectors["control"] - clients["control"]),)

    def report(
        model: Array, vectors: Vectors, clients: Vectors, results: tuple[LocalResult, ...]
    ) -> Report:
        (result,) = results
        distance = (result.num_steps * result.learning_rate)[:, None]
        change = -vectors["control"] - result.update / distance
        return Report(
            {"update": result.update, "control": change},
            equally(result.num_examples, result.num_steps),
            kept={"control": clients["control"] + change},
        )

    def server_update(model: Array, vectors: Vectors, sums: Sums) -> tuple[Array, Vectors]:
        control = vectors["control"] + sums.vectors["control"] / sums.population
        return step.take(model, {**vectors, "control": control}, mean_update(sums))

    return Method(
        name="SCAFFOLD",
        begin=begin,
        client_begin=lambda model, layout: {"control": model * 0},
        local=local,
        numbers=equally,
        report=report,
        server_update=server_update,
        terms={"momentum": 0.0, "proximal": 0.0, "max_grad_norm": 0.0},
    )


register(scaffold, "SCAFFOLD", server="FedAvg", server_settings={})
