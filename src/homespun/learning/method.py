"""A federated method, cut where the network is, over a whole chunk of clients at once.

    server   begin                       the server's vectors
    client   local                       how its steps differ from plain SGD     LocalRule
             (the engine trains)                                                 LocalResult
             report                      what it adds to the sums                Report
    -------------------------------------------- only sums cross -----------------------------
    server   server_update               sums to the next model

The model is one flat vector `[d]`; the chunk's m clients are the rows of `[m, d]`. Functions here use operators,
slices and methods that NumPy and PyTorch share, so that the engine calls them with the arrays it computes with, on
whatever device. A method is one file that makes one `Method` and makes it known with `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from homespun.errors import InvalidConfig

Array = Any
"""A NumPy array or a PyTorch tensor: [d], [m], or [m, d]."""
Vectors = dict[str, Array]
"""Named vectors: the server's are [d], those of a chunk's clients [m, d]."""


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat vector: name -> slice; the order is the model's."""

    slices: Mapping[str, slice]

    @property
    def dimension(self) -> int:
        return max((part.stop for part in self.slices.values()), default=0)


@dataclass(frozen=True, kw_only=True)
class LocalRule:
    """The local step: w <- w - lr * (scale * g + proximal * (w - anchor) + correction), beginning at `start`.

    `correction` and `start`: [d] or [m, d]; None stands for 0 and for the model. `anchor`: [d] or [m, d], None: the
    model. `candidates` [k, d]: the engine measures each client's mean loss with each of them before training and
    starts at the best one. `wants_gradient`: it also gives the mean gradient over all of the client's examples at
    the start.
    """

    scale: float = 1.0
    proximal: float = 0.0
    correction: Array | None = None
    start: Array | None = None
    anchor: Array | None = None
    candidates: Array | None = None
    wants_gradient: bool = False


PLAIN = LocalRule()


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """What the m clients have after their steps.

    `update` [m, d]: local parameters minus the start; `num_examples`, `num_steps` [m]; `learning_rate`: of the steps;
    `losses` [m, k] and `choice` [m]: of the candidates; `gradient` [m, d]: if it was wanted.
    """

    update: Array
    num_examples: Array
    num_steps: Array
    learning_rate: float
    losses: Array | None = None
    choice: Array | None = None
    gradient: Array | None = None


@dataclass(frozen=True)
class Report:
    """What the chunk's clients add to the sums, and what they keep for their next participation.

    `vectors`: name -> [m, d]; `numbers`: name -> [m]; both are summed over the clients. `kept`: [m, d] each.
    """

    vectors: Vectors
    numbers: Mapping[str, Array] = field(default_factory=dict)
    kept: Vectors = field(default_factory=dict)


@dataclass(frozen=True)
class Sums:
    """All that the server sees of a round. `vectors`: [d]; `numbers`: floats; `num_clients` took part out of
    `population`.
    """

    vectors: Vectors
    numbers: Mapping[str, float]
    num_clients: int
    population: int


Weights = Callable[[Array, Array], Mapping[str, Array]]
"""(num_examples [m], num_steps [m]) -> numbers to be summed; `weight` must be there."""


def by_examples(num_examples: Array, num_steps: Array) -> Mapping[str, Array]:
    """A client weighs as much as it has examples."""
    return {"weight": num_examples}


def equally(num_examples: Array, num_steps: Array) -> Mapping[str, Array]:
    """Every client weighs 1."""
    return {"weight": num_examples * 0 + 1}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    `begin(model, layout)`: the server's vectors. `client_begin(model)`: vectors [d] that every client starts with.
    `local(model, server, clients)`: one rule for each training that the client does in a round (nearly always one).
    `numbers`: what is known of a client before it trains; its `weight` is the factor of its update.
    `report(model, server, clients, results)`: None says that a client reports `weight * update` and `numbers`, and the
    engine then never needs to hold a client's own parameters. `server_update(model, server, sums)`: the next model and
    server's vectors, where `sums.vectors["update"]` is what was reported under that name.
    `combine(updates [n, d], weights [n])`: instead of the sum, of all n clients of a round: plain mode only.
    `evaluated(model, server, clients)`: parameters [m, d] that these clients would predict with; None: the model.
    """

    name: str
    server_update: Callable[[Array, Vectors, Sums], tuple[Array, Vectors]]
    begin: Callable[[Array, Layout], Vectors] = lambda model, layout: {}
    client_begin: Callable[[Array], Vectors] | None = None
    local: Callable[[Array, Vectors, Vectors], tuple[LocalRule, ...]] = (
        lambda model, server, clients: (PLAIN,)
    )
    numbers: Weights = by_examples
    report: Callable[[Array, Vectors, Vectors, tuple[LocalResult, ...]], Report] | None = None
    combine: Callable[[Array, Array], Array] | None = None
    evaluated: Callable[[Array, Vectors, Vectors], Array] | None = None


Builder = Callable[..., Method]
_registry: dict[str, tuple[Builder, dict[str, Any]]] = {}


def register(build: Builder, name: str, **defaults: Any) -> None:
    """Make a method known by name, with the settings that it takes."""
    _registry[name.lower()] = (build, defaults)


def names() -> tuple[str, ...]:
    """Names of all methods, for help and documentation."""
    return tuple(sorted(_registry))


def method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Build a method. Raises `InvalidConfig` for an unknown name or setting."""
    if name.lower() not in _registry:
        raise InvalidConfig(f"unknown method {name!r}", hint=f"one of: {', '.join(names())}")
    build, defaults = _registry[name.lower()]
    settings = settings or {}
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise InvalidConfig(
            f"{name} has no setting {unknown[0]!r}", hint=f"it takes: {', '.join(defaults)}"
        )
    return build(**{**defaults, **settings})
