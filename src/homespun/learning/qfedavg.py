"""q-FedAvg: clients with a high loss count more.

Li et al. 2020, "Fair resource allocation in federated learning" (arXiv:1905.10497), algorithm 2. F_i >= 0: client i's
mean loss with the model x, before its steps; L = 1 / lr, the estimate of the Lipschitz constant that the paper uses.

    client    u_i = L (x - y_i)
              Delta_i = F_i^q u_i
              h_i = q F_i^(q-1) |u_i|^2 + L F_i^q
    server    x <- x - sum Delta_i / sum h_i

With q = 0 this is FedAvg with equal weights; large q approaches minimax fairness.
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

_LEAST_LOSS = 1e-10
"""Added to a loss, as in the authors' code, so that F^(q-1) is finite."""


def q_fed_avg(q: float) -> Method:
    """`q`: how much fairness counts. The loss must not be negative."""
    require(q >= 0, "qFedAvg", "q", ">= 0", q)

    def local(model: Array, vectors: Vectors, clients: Vectors) -> tuple[LocalRule, ...]:
        return (LocalRule(candidates=model[None, :]),)

    def report(
        model: Array, vectors: Vectors, clients: Vectors, results: tuple[LocalResult, ...]
    ) -> Report:
        (result,) = results
        assert result.losses is not None
        lipschitz, loss = 1 / result.learning_rate, result.losses[:, 0] + _LEAST_LOSS
        moved = lipschitz * result.update
        height = q * loss ** (q - 1) * (moved * moved).sum(1) + lipschitz * loss**q
        return Report({"update": (loss**q)[:, None] * moved}, {"weight": height})

    def server_update(model: Array, vectors: Vectors, sums: Sums) -> tuple[Array, Vectors]:
        return model + mean_update(sums), vectors

    return Method(
        name="qFedAvg", local=local, numbers=equally, report=report, server_update=server_update
    )


register(q_fed_avg, "qFedAvg", q=1.0)
