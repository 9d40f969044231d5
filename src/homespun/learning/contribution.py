"""The contribution: everything a device says about its training, as integers that can only be added.

    main   [d]  words modulo 2^bits   weight * clipped update, fixed point
    aux    [a]  uint64 modulo 2^64    weight, 1, clipped?, and (sum, count) of every metric

Nothing else travels: no example count, no loss in clear. The same record encodes on the device and
decodes on the server, so that clip bound, weight, quantizer and layout cannot disagree. With secure
aggregation, exactly these two vectors are masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homespun.errors import InvalidConfig, NumericFailure, ShapeMismatch
from homespun.learning.metrics import MetricSum
from homespun.tensors.fixed_point import FixedPoint, Words
from homespun.types import FloatArray

Aux = npt.NDArray[np.uint64]

AUX_SCALE = 2.0**16
"""Steps per unit of an auxiliary value: 1.5e-5 apart."""
AUX_LIMIT = 2.0**31
"""Largest auxiliary value of one device."""
MAX_GROUP = 2**16 - 1
"""Largest group: so many auxiliary values at their limit cannot wrap."""
_LEADING = ("weight", "clients", "clipped")


@dataclass(frozen=True)
class Contribution:
    """`main`: words `[d]`; `aux`: uint64 `[a]`. One device's, or (by addition) a group's."""

    main: Words
    aux: Aux


@dataclass(frozen=True)
class Aggregate:
    """What a sum says. `mean_update`: float32 `[d]`, the weighted mean; `metrics`: group totals."""

    num_clients: int
    weight: float
    clipped_share: float
    mean_update: FloatArray
    metrics: Mapping[str, MetricSum]


@dataclass(frozen=True)
class ContributionCodec:
    """Device half: `encode`. Server half: `empty`, `add`, `decode`.

    `dimension`: entries of an update (0 for evaluation); `clip_norm`: L2 bound of an update; `max_weight`:
    examples beyond which a device weighs no more (0: every device weighs 1); `metrics`: names, in order.
    """

    dimension: int
    clip_norm: float
    max_weight: int
    metrics: tuple[str, ...]
    max_group: int
    bits: int = 32

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for a clip bound and group size that do not fit the words."""
        if self.max_group > MAX_GROUP:
            raise InvalidConfig(
                "the group is too large for one sum", expected=f"<= {MAX_GROUP}", got=self.max_group
            )
        if self.dimension < 0 or self.max_weight < 0:
            raise InvalidConfig(
                "dimension and max_weight are counts",
                dimension=self.dimension,
                max_weight=self.max_weight,
            )
        _ = self.fixed_point  # checks the others

    @property
    def fixed_point(self) -> FixedPoint:
        # |entry| <= |update|_2 <= clip_norm and weight <= 1, so the L2 bound is also the bound of every entry.
        return FixedPoint(self.bits, self.clip_norm, self.max_group)

    @property
    def aux_names(self) -> tuple[str, ...]:
        return (*_LEADING, *(f"{m}.{part}" for m in self.metrics for part in ("sum", "count")))

    def weight(self, num_examples: int) -> float:
        """min(n, max_weight) / max_weight, in (0, 1], a whole number of auxiliary steps and at least one."""
        if self.max_weight == 0:
            return 1.0
        steps = round(min(num_examples, self.max_weight) / self.max_weight * AUX_SCALE)
        return max(steps, 1) / AUX_SCALE

    def encode(
        self,
        update: FloatArray,
        num_examples: int,
        metrics: Mapping[str, MetricSum],
        rng: np.random.Generator,
    ) -> Contribution:
        """Clip the update `[d]` to `clip_norm`, weight it, quantize it.

        Raises `NumericFailure` for non-finite or absurd values, `ShapeMismatch` for a wrong length or a
        missing metric: such a contribution never leaves the device.
        """
        if update.shape != (self.dimension,):
            raise ShapeMismatch(
                "update has the wrong length", expected=self.dimension, got=update.size
            )
        if absent := [name for name in self.metrics if name not in metrics]:
            raise ShapeMismatch(
                f"metric {absent[0]!r} is missing", expected=len(self.metrics), got=len(metrics)
            )
        length = float(np.sqrt(np.square(update, dtype=np.float64).sum()))
        if not np.isfinite(length):
            raise NumericFailure(
                "the update is not finite", hint="nothing was sent; lower the learning rate"
            )
        weight = self.weight(num_examples)
        factor = weight * min(1.0, self.clip_norm / length) if length > 0 else weight
        values = [weight, 1.0, float(length > self.clip_norm)]
        for name in self.metrics:
            values += [metrics[name].sum, metrics[name].count]
        main = self.fixed_point.encode(update * np.float32(factor), rng)
        return Contribution(main, _encode_aux(np.array(values, np.float64), rng))

    def empty(self) -> Contribution:
        """The sum of no contributions."""
        return Contribution(
            self.fixed_point.empty_sum(self.dimension), np.zeros(len(self.aux_names), np.uint64)
        )

    def check(self, contribution: Contribution) -> None:
        """Raise `ShapeMismatch` or `NumericFailure` for a contribution that no honest device makes.

        Only possible in plain mode, where the server sees one device's contribution.
        """
        empty = self.empty()
        if (
            contribution.main.shape != empty.main.shape
            or contribution.main.dtype != empty.main.dtype
        ):
            raise ShapeMismatch(
                "update has the wrong length", expected=self.dimension, got=contribution.main.size
            )
        self._check_aux_shape(contribution)
        values = dict(zip(self.aux_names, _decode_aux(contribution.aux), strict=True))
        lightest = self.weight(0)
        if (
            not lightest <= values["weight"] <= 1.0
            or values["clients"] != 1.0
            or values["clipped"] not in (0.0, 1.0)
        ):
            raise NumericFailure("weight or client count is out of range")
        self.fixed_point.check(contribution.main, self.clip_norm * values["weight"])
        if any(abs(value) > AUX_LIMIT for value in values.values()):
            raise NumericFailure("a metric is out of range", limit=AUX_LIMIT)
        if any(values[f"{name}.count"] < 0.0 for name in self.metrics):
            raise NumericFailure("a metric has a negative count")

    def add(self, total: Contribution, contribution: Contribution) -> None:
        """`total += contribution`, in place; integers, so any order gives the same sum.

        Raises `ShapeMismatch`, and then `total` is as it was.
        """
        self._check_aux_shape(contribution)
        self.fixed_point.add(total.main, contribution.main)
        np.add(total.aux, contribution.aux, out=total.aux)

    def _check_aux_shape(self, contribution: Contribution) -> None:
        expected = (len(self.aux_names),)
        if contribution.aux.shape != expected or contribution.aux.dtype != np.uint64:
            raise ShapeMismatch(
                "wrong number of metrics", expected=expected[0], got=contribution.aux.size
            )

    def decode(self, total: Contribution) -> Aggregate:
        """Read a sum. Raises `NumericFailure` when it holds no weight."""
        values = dict(zip(self.aux_names, _decode_aux(total.aux), strict=True))
        if values["weight"] <= 0.0 or values["clients"] < 1.0:
            raise NumericFailure(
                "the sum holds no weight", weight=values["weight"], clients=values["clients"]
            )
        mean = self.fixed_point.decode(total.main) / np.float32(values["weight"])
        return Aggregate(
            num_clients=round(values["clients"]),
            weight=values["weight"],
            clipped_share=values["clipped"] / values["clients"],
            mean_update=mean.astype(np.float32),
            metrics={m: MetricSum(values[f"{m}.sum"], values[f"{m}.count"]) for m in self.metrics},
        )


def _encode_aux(values: npt.NDArray[np.float64], rng: np.random.Generator) -> Aux:
    # Stochastic rounding, like the main vector: whole steps stay exact, and a value far below one step (the
    # square of a small difference) still has the right mean.
    if not np.isfinite(values).all() or (np.abs(values) > AUX_LIMIT).any():
        raise NumericFailure("a metric is not finite or out of range", limit=AUX_LIMIT)
    return np.floor(values * AUX_SCALE + rng.random(values.size)).astype(np.int64).astype(np.uint64)


def _decode_aux(aux: Aux) -> list[float]:
    return [float(value) / AUX_SCALE for value in aux.astype(np.int64)]
