"""FedDyn: each client's objective is bent so that all of them come to rest at the same point.

Acar et al. 2021, "Federated learning based on dynamic regularization" (arXiv:2111.04263). h_i: what client i has of
the gradient at its last parameters, h: the mean of all h_i; all 0 at first. N clients, of which S take part.

    client    y_i ~ argmin f_i(y) - <h_i, y> + alpha / 2 |y - x|^2        by its local steps, from y = x
              h_i <- h_i - alpha (y_i - x)
    server    h <- h - alpha / N sum (y_i - x)
              x <- 1/|S| sum y_i - h / alpha

Clients weigh the same.
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
    equally,
    mean_update,
    register,
    require,
)


def fed_dyn(alpha: float) -> Method:
    """`alpha`: strength of the regularization; times the learning rate it must stay below 2."""
    require(alpha > 0, "FedDyn", "alpha", "> 0", alpha)

    def local(model: Array, vectors: Vectors, clients: Vectors) -> tuple[LocalRule, ...]:
        return (LocalRule(proximal=alpha, correction=-clients["gradient"]),)

    def report(
        model: Array, vectors: Vectors, clients: Vectors, results: tuple[LocalResult, ...]
    ) -> Report:
        (result,) = results
        return Report(
            {"update": result.update},
            equally(result.num_examples, result.num_steps),
            kept={"gradient": clients["gradient"] - alpha * result.update},
        )

    def server_update(model: Array, vectors: Vectors, sums: Sums) -> tuple[Array, Vectors]:
        gradient = vectors["gradient"] - alpha / sums.population * sums.vectors["update"]
        return model + mean_update(sums) - gradient / alpha, {"gradient": gradient}

    return Method(
        name="FedDyn",
        begin=lambda model, layout: {"gradient": model * 0},
        client_begin=lambda model, layout: {"gradient": model * 0},
        local=local,
        numbers=equally,
        report=report,
        server_update=server_update,
    )


register(fed_dyn, "FedDyn", alpha=0.1)
