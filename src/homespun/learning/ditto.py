"""Ditto: beside the common model every client has its own, drawn towards it.

Li et al. 2021, "Ditto: fair and robust federated learning through personalization" (arXiv:2012.04221). v_i: client i's
own parameters, the first model at first. In each round in which it takes part, with the model x it was given:

    common    y <- y - lr g(y),  from y = x                                (any averaging method's step follows)
    own       v_i <- v_i - lr (g(v_i) + pull (v_i - x))                    (the paper's lambda)

v_i never leaves the client.
"""

from __future__ import annotations

from collections.abc import Mapping

from homespun.learning.averaging import averaging
from homespun.learning.method import (
    PLAIN,
    Array,
    LocalResult,
    LocalRule,
    Method,
    Report,
    Vectors,
    register,
    require,
    weighting,
)


def ditto(pull: float, server: str, server_settings: Mapping[str, float], weights: str) -> Method:
    """`pull` 0 is local training, a large one the common model; times the learning rate it must stay below 2."""
    require(pull >= 0, "Ditto", "pull", ">= 0", pull)
    weigh = weighting(weights)

    def local(model: Array, vectors: Vectors, clients: Vectors) -> tuple[LocalRule, ...]:
        return PLAIN, LocalRule(start=clients["own"], proximal=pull)

    def report(
        model: Array, vectors: Vectors, clients: Vectors, results: tuple[LocalResult, ...]
    ) -> Report:
        common, own = results
        numbers = weigh(common.num_examples, common.num_steps)
        return Report(
            {"update": numbers["weight"][:, None] * common.update},
            numbers,
            kept={"own": clients["own"] + own.update},
        )

    return averaging(
        "Ditto",
        server,
        server_settings,
        weights,
        client_begin=lambda model, layout: {"own": model},
        local=local,
        report=report,
        evaluated=lambda model, vectors, clients: clients["own"],
    )


register(ditto, "Ditto", pull=0.1, server="FedAvg", server_settings={}, weights="examples")
