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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from numbers import Real
from typing import Any

from homespun.errors import InvalidConfig, NumericFailure

Array = Any
"""A NumPy array or a PyTorch tensor: [d], [m], or [m, d]."""
Vectors = dict[str, Array]
"""Named vectors: the server's are [d], those of a chunk's clients [m, d]."""


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat vector: name -> slice; the order is the model's."""

    slices: Mapping[str, slice]

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Sequence[int]]]) -> Layout:
        """Of parameters of these names and shapes, in order."""
        slices, begin = {}, 0
        for name, shape in shapes:
            slices[name] = slice(begin, begin + prod(shape))
            begin += prod(shape)
        return cls(slices)

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

    `update` [m, d]: local parameters minus the start; `num_examples`, `num_steps` [m]: of the model's floating type
    and at least 1, for who has no example takes no part; `learning_rate`: of the steps; `losses` [m, k] and `choice`
    [m]: of the candidates; `gradient` [m, d]: if it was wanted.
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

    `vectors`: name -> [m, d]; `numbers`: name -> [m]; both are summed over the clients. `kept`: [m, ...] each, under
    the names and of the shapes of `client_begin`.
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


def weighting(name: str) -> Weights:
    """`examples` or `equal`, as settings say it. Raises `InvalidConfig` for anything else."""
    known = {"examples": by_examples, "equal": equally}
    if name not in known:
        raise InvalidConfig(f"unknown weighting {name!r}", hint=f"one of: {', '.join(known)}")
    return known[name]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    `begin(model, layout)`: the server's vectors. `client_begin(model, layout)`: vectors that every client starts
    with, as short as can be: each that takes part keeps its own.
    `local(model, server, clients)`: one rule for each training that the client does in a round (nearly always one).
    `numbers`: what is known of a client before it trains; its `weight` is the factor of its update.
    `report(model, server, clients, results)`: None says that a client reports `weight * update` and `numbers`, and the
    engine then never needs to hold a client's own parameters. `server_update(model, server, sums)`: the next model and
    server's vectors, where `sums.vectors["update"]` is what was reported under that name.
    `combine(updates [n, d], weights [n])`: of all n clients of a round, instead of the weighted mean, so in plain mode
    only. The server gets the result as if it were the sum of one client: `update`, with 1 as `weight`.
    `evaluated(model, server, clients)`: parameters [m, d] that these clients would predict with; None: the model.
    `terms`: of the clients' optimizer, those that what the method makes of their updates holds for, by name: nobody
    else's `momentum`, say. Others are free.
    """

    name: str
    server_update: Callable[[Array, Vectors, Sums], tuple[Array, Vectors]]
    begin: Callable[[Array, Layout], Vectors] = lambda model, layout: {}
    client_begin: Callable[[Array, Layout], Vectors] | None = None
    local: Callable[[Array, Vectors, Vectors], tuple[LocalRule, ...]] = (
        lambda model, server, clients: (PLAIN,)
    )
    numbers: Weights = by_examples
    report: Callable[[Array, Vectors, Vectors, tuple[LocalResult, ...]], Report] | None = None
    combine: Callable[[Array, Array], Array] | None = None
    evaluated: Callable[[Array, Vectors, Vectors], Array] | None = None
    terms: Mapping[str, float] = field(default_factory=dict)

    def check_terms(self, optimizer: Any) -> None:
        """Raises `InvalidConfig` for a clients' optimizer that the method is not derived for."""
        for term, expected in self.terms.items():
            got = getattr(optimizer, term) or 0.0
            if got != expected:
                raise InvalidConfig(
                    f"{self.name} does not hold for this {term} of the clients' optimizer",
                    hint="change the task's optimizer, or the method's setting of that name if it has one",
                    expected=expected,
                    got=got,
                )


def reported(
    method: Method,
    model: Array,
    server: Vectors,
    clients: Vectors,
    results: tuple[LocalResult, ...],
) -> Report:
    """What these clients add to the sums: by the method's `report`, or what its absence says."""
    if method.report:
        return method.report(model, server, clients, results)
    numbers = method.numbers(results[0].num_examples, results[0].num_steps)
    return Report({"update": numbers["weight"][:, None] * results[0].update}, numbers)


def mean_update(sums: Sums) -> Array:
    """[d], the weighted mean of what was reported as `update`. Raises `NumericFailure` if nothing was."""
    weight = sums.numbers["weight"]
    if weight <= 0:
        raise NumericFailure("the sum holds no weight", weight=weight, clients=sums.num_clients)
    return sums.vectors["update"] / weight


Builder = Callable[..., Method]
_registry: dict[str, tuple[str, Builder, dict[str, Any]]] = {}


def register(build: Builder, name: str, **defaults: Any) -> None:
    """Make a method known by name, with the settings that it takes."""
    _registry[name.lower()] = (name, build, defaults)


def names() -> tuple[str, ...]:
    """Names of all methods, for help and documentation."""
    return tuple(sorted(name for name, _, _ in _registry.values()))


def defaults(name: str) -> dict[str, Any]:
    """The settings that a method takes. Raises `InvalidConfig` for an unknown name."""
    return dict(_known(name)[2])


def method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Build a method. Raises `InvalidConfig` for an unknown name, or a setting that is unknown or makes no sense."""
    name, build, default = _known(name)
    return build(**checked(name, default, settings or {}))


def checked(name: str, default: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of `name`, those that are not given as by `default`. Raises `InvalidConfig` for one that is
    unknown or of another kind than its default."""
    if unknown := sorted(settings.keys() - default.keys()):
        raise InvalidConfig(
            f"{name} has no setting {unknown[0]!r}", hint=f"it takes: {', '.join(default)}"
        )
    for key, value in settings.items():
        _check_kind(name, key, default[key], value)
    return {**default, **settings}


def require(fits: bool, name: str, setting: str, expected: str, got: Any) -> None:
    """For builders. Raises `InvalidConfig` unless a setting `fits`."""
    if not fits:
        raise InvalidConfig(f"{name}: {setting} is out of range", expected=expected, got=str(got))


def _known(name: str) -> tuple[str, Builder, dict[str, Any]]:
    if name.lower() not in _registry:
        raise InvalidConfig(f"unknown method {name!r}", hint=f"one of: {', '.join(names())}")
    return _registry[name.lower()]


def _check_kind(name: str, setting: str, default: Any, value: Any) -> None:
    """A setting is of its default's kind, so that builders need to look at the range only."""
    boolean = isinstance(value, bool)
    if isinstance(default, bool):
        fits, kind = boolean, "true or false"
    elif isinstance(default, int):
        fits, kind = isinstance(value, int) and not boolean, "a whole number"
    elif isinstance(default, float):
        fits, kind = isinstance(value, Real) and not boolean and isfinite(value), "a finite number"
    elif isinstance(default, str):
        fits, kind = isinstance(value, str), "text"
    else:
        fits, kind = isinstance(value, Mapping), "settings by name"
    if not fits:
        raise InvalidConfig(f"{name}: {setting} must be {kind}", got=repr(value))
