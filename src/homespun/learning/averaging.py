"""Methods whose server takes the weighted mean update to a server optimizer's step.

FedAvg, FedAvgM: McMahan et al. 2017, algorithm 1; Hsu et al. 2019. FedAdagrad, FedAdam, FedYogi: Reddi
et al. 2021. The formulas are in `fedavg` and `fedopt`: the step here is the very record that the server
of a deployment runs, in NumPy, so a simulation moves the model to the same bits.

    x <- step(x, sum w_i (y_i - x) / sum w_i)          y_i: the client's parameters after its steps
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from homespun.learning.arrays import as_numpy, like
from homespun.learning.method import (
    Array,
    Method,
    Vectors,
    mean_update,
    register,
    require,
    weighting,
)
from homespun.learning.optimizers import ServerOptimizer, defaults, server_optimizer

_MODEL = "model"
"""The optimizers work on trees; here the flat vector is the only leaf."""


@dataclass(frozen=True)
class ServerStep:
    """A server optimizer on flat vectors; its moments are among the server's vectors, as `<moment>/model`."""

    optimizer: ServerOptimizer

    def begin(self, model: Array) -> Vectors:
        moments = self.optimizer.init({_MODEL: as_numpy(model)})
        return {name: like(model, moment) for name, moment in moments.items()}

    def take(self, model: Array, server: Vectors, update: Array) -> tuple[Array, Vectors]:
        """The next model, and the server's vectors with the next moments."""
        state = {k: as_numpy(v) for k, v in server.items() if k.endswith(f"/{_MODEL}")}
        moved, moments = self.optimizer.apply(
            {_MODEL: as_numpy(model)}, state, {_MODEL: as_numpy(update)}
        )
        changed = {name: like(model, moment) for name, moment in moments.items()}
        return like(model, moved[_MODEL]), {**server, **changed}


def server_step(name: str, settings: Mapping[str, float]) -> ServerStep:
    """That of a registered optimizer. Raises `InvalidConfig` for an unknown one, or a setting that it cannot have."""
    for key, value in settings.items():
        require(isinstance(value, Real), name, key, "a number", value)
    return ServerStep(server_optimizer(name, settings))


def averaging(
    name: str,
    server: str,
    server_settings: Mapping[str, float],
    weights: str = "examples",
    **others: Any,
) -> Method:
    """A method whose server makes `server`'s step along the mean update; `others`: what its clients do.

    `weights`: `examples` or `equal`. Raises `InvalidConfig` for an optimizer or a setting that does not exist.
    """
    step = server_step(server, server_settings)
    return Method(
        name=name,
        begin=lambda model, layout: step.begin(model),
        server_update=lambda model, vectors, sums: step.take(model, vectors, mean_update(sums)),
        numbers=weighting(weights),
        **others,
    )


def from_optimizer(name: str, *, weights: str, **settings: float) -> Method:
    """The method of plain clients and the server optimizer `name`."""
    return averaging(name, name, settings, weights)


for _name in ("FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"):
    register(partial(from_optimizer, _name), _name, **defaults(_name), weights="examples")
