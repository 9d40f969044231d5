"""Server optimizers: pure functions from (parameters, state, mean update) to the next (parameters, state).

An update is local parameters minus the checkpoint's, so the mean update is the pseudo-gradient with its
sign already turned: every optimizer here *adds* it. State is a tree like the parameters, one per moment,
and travels through the database as a safetensors file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from homespun.errors import InvalidConfig
from homespun.types import FloatArray, Tree

State = dict[str, FloatArray]
"""Moments, named `<moment>/<parameter>`."""


@dataclass(frozen=True)
class ServerOptimizer:
    """`init(parameters) -> state`; `apply(parameters, state, mean_update) -> (parameters, state)`."""

    name: str
    init: Callable[[Tree], State]
    apply: Callable[[Tree, State, Tree], tuple[dict[str, FloatArray], State]]


Settings = Mapping[str, float]
_DECAYS = ("momentum", "beta1", "beta2")  # at 1 or above, a moment never forgets
_registry: dict[str, tuple[Callable[..., ServerOptimizer], dict[str, float]]] = {}


def register(build: Callable[..., ServerOptimizer], name: str, **defaults: float) -> None:
    """Make an algorithm known by name to task descriptions, with the settings it takes."""
    _registry[name.lower()] = (build, defaults)


def names() -> tuple[str, ...]:
    """Names of all server optimizers, for help and documentation."""
    return tuple(sorted(_registry))


def defaults(name: str) -> dict[str, float]:
    """The settings that an optimizer takes. Raises `InvalidConfig` for an unknown name."""
    return dict(_known(name)[1])


def server_optimizer(name: str, settings: Settings) -> ServerOptimizer:
    """Build the optimizer of a task description. Raises `InvalidConfig` for an unknown name or setting."""
    build, default = _known(name)
    if unknown := sorted(settings.keys() - default.keys()):
        raise InvalidConfig(
            f"{name} has no setting {unknown[0]!r}", hint=f"it takes: {', '.join(default)}"
        )
    values = {**default, **settings}
    for key, value in values.items():
        limit = 1.0 if key in _DECAYS else np.inf
        if not 0 <= value < limit:
            raise InvalidConfig(
                f"{name}: {key} is out of range", expected=f">= 0 and < {limit:g}", got=value
            )
    if values.get("tau") == 0:
        raise InvalidConfig(f"{name}: tau must be above 0, it keeps the step finite", got=0.0)
    return build(**values)


def _known(name: str) -> tuple[Callable[..., ServerOptimizer], dict[str, float]]:
    if name.lower() not in _registry:
        raise InvalidConfig(
            f"unknown server optimizer {name!r}", hint=f"one of: {', '.join(names())}"
        )
    return _registry[name.lower()]


def zeros(prefix: str, parameters: Tree) -> State:
    """A moment of zeros for every parameter."""
    return {f"{prefix}/{name}": np.zeros_like(array) for name, array in parameters.items()}
