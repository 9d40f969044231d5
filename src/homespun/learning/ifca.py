"""IFCA: several models, and every client trains the one that fits it best.

Ghosh et al. 2020, "An efficient framework for clustered federated learning" (arXiv:2006.04088), with model averaging.
The server has k models x_j, at first the given one with noise added.

    client    j = argmin_j f_i(x_j);  y <- y - lr g(y),  from y = x_j;  sends y - x_j and which j
    server    x_j <- x_j + mean over the clients that chose j of (y - x_j)

All k models go to every client. What it chose goes out as a one among k weights, of which only sums need be seen.
"""

from __future__ import annotations

from homespun.learning.arrays import as_numpy, like
from homespun.learning.method import (
    Array,
    Layout,
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
from homespun.rng import stream


def ifca(clusters: int, spread: float, seed: int, weights: str) -> Method:
    """`spread`: standard deviation of the noise that sets the models apart at first; from `seed`.

    The server's `models` are [k, d]; the model itself is then their mean, which nobody uses. A client predicts with the
    one that it chose last, and with the first one if it never took part.
    """
    require(clusters >= 1, "IFCA", "clusters", ">= 1", clusters)
    require(spread >= 0, "IFCA", "spread", ">= 0", spread)
    weigh = weighting(weights)

    def begin(model: Array, layout: Layout) -> Vectors:
        noise = stream(seed, "ifca").normal(size=(clusters, *model.shape))
        return {"models": like(model, as_numpy(model) + spread * noise)}

    def local(model: Array, vectors: Vectors, clients: Vectors) -> tuple[LocalRule, ...]:
        return (LocalRule(candidates=vectors["models"]),)

    def report(
        model: Array, vectors: Vectors, clients: Vectors, results: tuple[LocalResult, ...]
    ) -> Report:
        (result,) = results
        assert result.choice is not None
        weight = weigh(result.num_examples, result.num_steps)["weight"]
        chose = [weight * (result.choice == j) for j in range(clusters)]
        return Report(
            {f"update/{j}": share[:, None] * result.update for j, share in enumerate(chose)},
            {"weight": weight, **{f"weight/{j}": share for j, share in enumerate(chose)}},
            kept={"choice": weight[:, None] * 0 + result.choice[:, None]},
        )

    def server_update(model: Array, vectors: Vectors, sums: Sums) -> tuple[Array, Vectors]:
        models = vectors["models"] + 0  # another array
        for j in range(clusters):
            if sums.numbers[f"weight/{j}"] > 0:
                models[j] += sums.vectors[f"update/{j}"] / sums.numbers[f"weight/{j}"]
        return models.mean(0), {"models": models}

    def evaluated(model: Array, vectors: Vectors, clients: Vectors) -> Array:
        choice = clients["choice"]
        return sum((choice == j) * vectors["models"][j] for j in range(clusters))

    return Method(
        name="IFCA",
        begin=begin,
        client_begin=lambda model, layout: {"choice": model[:1] * 0},
        local=local,
        numbers=weigh,
        report=report,
        server_update=server_update,
        evaluated=evaluated,
    )


register(ifca, "IFCA", clusters=2, spread=0.01, seed=0, weights="equal")
