"""FedPer: some parameters, mostly the last layers, are every client's own.

Arivazhagan et al. 2019, "Federated learning with personalization layers" (arXiv:1912.00818). Common and own
parameters are trained together by the local steps; the server averages the common ones, and never gets the others,
which are zeros in every sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from homespun.errors import InvalidConfig
from homespun.learning.averaging import averaging
from homespun.learning.method import (
    Array,
    Layout,
    LocalResult,
    LocalRule,
    Method,
    Report,
    Vectors,
    register,
    weighting,
)


def fed_per(own: str, server: str, server_settings: Mapping[str, float], weights: str) -> Method:
    """`own`: names of parameters that stay with the client, with * and ?, spaces between several: `"head.* *.bias"`.

    `begin` raises `InvalidConfig` if a pattern meets no parameter, or if they leave nothing to learn together.
    """
    patterns, weigh = own.split(), weighting(weights)

    def mask(model: Array, layout: Layout) -> Array:
        """[d]: 1 where a parameter is the client's own, else 0."""
        found = model * 0
        for pattern in patterns:
            matching = [n for n in layout.slices if fnmatchcase(n, pattern)]
            if not matching:
                known = ", ".join(layout.slices)
                raise InvalidConfig(
                    f"FedPer: no parameter is called {pattern!r}", hint=f"there are: {known}"
                )
            for name in matching:
                found[layout.slices[name]] = 1
        if not patterns or found.all():
            raise InvalidConfig("FedPer: own must name some of the parameters and not all", got=own)
        return found

    def whole(model: Array, vectors: Vectors, clients: Vectors) -> Array:
        """[m, d]: the common parameters with each client's own in their places."""
        parameters = clients["own"][:, :1] * 0 + model
        parameters[:, vectors["own"] > 0] = clients["own"]
        return parameters

    def local(model: Array, vectors: Vectors, clients: Vectors) -> tuple[LocalRule, ...]:
        return (LocalRule(start=whole(model, vectors, clients)),)

    def report(
        model: Array, vectors: Vectors, clients: Vectors, results: tuple[LocalResult, ...]
    ) -> Report:
        (result,) = results
        numbers = weigh(result.num_examples, result.num_steps)
        common = (1 - vectors["own"]) * result.update
        kept = clients["own"] + result.update[:, vectors["own"] > 0]
        return Report({"update": numbers["weight"][:, None] * common}, numbers, {"own": kept})

    method = averaging(
        "FedPer",
        server,
        server_settings,
        weights,
        client_begin=lambda model, layout: {"own": model[mask(model, layout) > 0]},
        local=local,
        report=report,
        evaluated=whole,
    )
    return replace(
        method,
        begin=lambda model, layout: {"own": mask(model, layout), **method.begin(model, layout)},
    )


register(fed_per, "FedPer", own="", server="FedAvg", server_settings={}, weights="examples")
