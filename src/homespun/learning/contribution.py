"""The contribution: everything a device says about its training, as integers that can only be added.

    main   [d]  words modulo 2^bits   weight * clipped update, rotated, fixed point
    aux    [a]  uint64 modulo 2^64    weight, 1, clipped?, and (sum, count) of every metric

Nothing else travels: no example count, no loss in clear. The same record encodes on the device and
decodes on the server, so that clip bound, weight, quantizer and layout cannot disagree. With secure
aggregation, exactly these two vectors are masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from homespun.errors import InvalidConfig, NumericFailure, ShapeMismatch
from homespun.learning.metrics import MetricSum
from homespun.tensors.fixed_point import FixedPoint
from homespun.tensors.packing import Words
from homespun.tensors.rotation import block_size, rotate, rotate_back
from homespun.types import FloatArray

Aux = npt.NDArray[np.uint64]

AUX_SCALE = 2.0**16
"""Steps per unit of an auxiliary value: 1.5e-5 apart."""
AUX_LIMIT = 2.0**31
"""Largest auxiliary value of one device."""
MAX_GROUP = 2**16 - 1
"""Largest group: so many auxiliary values at their limit cannot wrap."""
_LEADING = ("weight", "clients", "clipped")
_SPREAD = 6.0
"""Clip of a rotated entry in standard deviations: even in the worst update, at most 1 in 3e7 is beyond (Hoeffding)."""


@dataclass(frozen=True)
class Contribution:
    """`main`: words `[d]` modulo 2^`bits`; `aux`: uint64 `[a]`. One device's, or (by addition) a group's."""

    main: Words
    aux: Aux
    bits: int


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
    examples beyond which a device weighs no more (0: every device weighs 1); `metrics`: names, in order;
    `max_group`: most contributions in one sum; `rotation_seed`: public, None if updates are not rotated.
    """

    dimension: int
    clip_norm: float
    max_weight: int
    metrics: tuple[str, ...]
    max_group: int
    bits: int = 32
    rotation_seed: int | None = None

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
    def clip(self) -> float:
        """Bound of an entry of the main vector.

        |entry| <= |update|_2 <= clip_norm and weight <= 1, so the L2 bound is one. After a rotation the
        standard deviation of every entry is at most clip_norm / sqrt(B), B the rotation's block.
        """
        if self.rotation_seed is None:
            return self.clip_norm
        return min(self.clip_norm, _SPREAD * self.clip_norm / sqrt(block_size(self.dimension)))

    @property
    def schema(self) -> str:
        """What both ends must agree on besides bits, dimension, `clip` and `max_group`."""
        aux = f"{int(AUX_SCALE)}*{','.join(self.aux_names)}"
        return f"fixed-point-1;rotation={self.rotation_seed};max_weight={self.max_weight};aux={aux}"

    @property
    def fixed_point(self) -> FixedPoint:
        return FixedPoint(self.bits, self.clip, self.max_group)

    @property
    def aux_names(self) -> tuple[str, ...]:
        return (*_LEADING, *(f"{m}.{part}" for m in self.metrics for part in ("sum", "count")))

    def weight(self, num_examples: int, staleness: int = 0) -> float:
        """min(n, max_weight) / max_weight / sqrt(1 + staleness), in (0, 1].

        A whole number of auxiliary steps and at least one, so that the sum of the weights is exact. `staleness`:
        committed rounds between the checkpoint that was trained from and the one that the sum will move (FedBuff,
        Nguyen et al. 2022; the function is FedAsync's polynomial one with a = 1/2, Xie et al. 2019).
        """
        share = min(num_examples, self.max_weight) / self.max_weight if self.max_weight else 1.0
        return max(round(share / sqrt(1 + staleness) * AUX_SCALE), 1) / AUX_SCALE

    def encode(
        self,
        update: FloatArray,
        num_examples: int,
        metrics: Mapping[str, MetricSum],
        rng: np.random.Generator,
        staleness: int = 0,
    ) -> Contribution:
        """Clip the update `[d]` to `clip_norm`, weight it, rotate it, quantize it. `staleness`: as of `weight`.

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
        weight = self.weight(num_examples, staleness)
        factor = weight * min(1.0, self.clip_norm / length) if length > 0 else weight
        values = [weight, 1.0, float(length > self.clip_norm)]
        for name in self.metrics:
            values += [metrics[name].sum, metrics[name].count]
        weighted = update * np.float32(factor)
        if self.rotation_seed is not None:
            weighted = rotate(weighted, self.rotation_seed)
        main = self.fixed_point.encode(weighted, rng)
        return Contribution(main, _encode_aux(np.array(values, np.float64), rng), self.bits)

    def empty(self) -> Contribution:
        """The sum of no contributions."""
        main = self.fixed_point.empty_sum(self.dimension)
        return Contribution(main, np.zeros(len(self.aux_names), np.uint64), self.bits)

    def check(self, contribution: Contribution) -> None:
        """Raise `ShapeMismatch` or `NumericFailure` for a contribution that no honest device makes.

        Only possible in plain mode, where the server sees one device's contribution.
        """
        self._check_layout(contribution)
        values = self._aux_values(contribution)
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
        self._check_layout(contribution)
        self.fixed_point.add(total.main, contribution.main)
        np.add(total.aux, contribution.aux, out=total.aux)

    def total(self, contributions: Iterable[Contribution]) -> Contribution:
        """The sum of them all. Raises `ShapeMismatch`."""
        total = self.empty()
        for contribution in contributions:
            self.add(total, contribution)
        return total

    def _check_layout(self, contribution: Contribution) -> None:
        main, aux = contribution.main, contribution.aux
        words = (self.fixed_point.word, (self.dimension,), self.bits)
        if (main.dtype, main.shape, contribution.bits) != words:
            raise ShapeMismatch(
                "update has the wrong length or encoding",
                expected=f"{self.bits} bits [{self.dimension}]",
                got=f"{contribution.bits} bits {list(main.shape)}",
            )
        if aux.dtype != np.uint64 or aux.shape != (len(self.aux_names),):
            raise ShapeMismatch(
                "wrong number of metrics", expected=len(self.aux_names), got=aux.size
            )

    def _aux_values(self, *contributions: Contribution) -> dict[str, float]:
        # One sum fits 64 bits, several need not: they are added as Python's integers.
        signed = [contribution.aux.astype(np.int64).tolist() for contribution in contributions]
        sums = [sum(column) / AUX_SCALE for column in zip(*signed, strict=True)]
        return dict(zip(self.aux_names, sums, strict=True))

    def decode(self, *totals: Contribution) -> Aggregate:
        """Read the sums of one round together, each of at most `max_group` contributions.

        Raises `NumericFailure` when they hold no weight, `ShapeMismatch` when one is not of this encoding.
        """
        for total in totals:
            self._check_layout(total)
        values = self._aux_values(self.empty(), *totals)  # empty, so that no sums are no weight
        if values["weight"] <= 0.0 or values["clients"] < 1.0:
            raise NumericFailure(
                "the sum holds no weight", weight=values["weight"], clients=values["clients"]
            )
        mean = self.fixed_point.decode(*(total.main for total in totals))
        mean /= np.float32(values["weight"])
        if self.rotation_seed is not None:
            mean = rotate_back(mean, self.rotation_seed)
        return Aggregate(
            num_clients=round(values["clients"]),
            weight=values["weight"],
            clipped_share=values["clipped"] / values["clients"],
            mean_update=mean,
            metrics={m: MetricSum(values[f"{m}.sum"], values[f"{m}.count"]) for m in self.metrics},
        )


def _encode_aux(values: npt.NDArray[np.float64], rng: np.random.Generator) -> Aux:
    # Stochastic rounding, like the main vector: whole steps stay exact, and a value far below one step (the
    # square of a small difference) still has the right mean.
    if not np.isfinite(values).all() or (np.abs(values) > AUX_LIMIT).any():
        raise NumericFailure("a metric is not finite or out of range", limit=AUX_LIMIT)
    return np.floor(values * AUX_SCALE + rng.random(values.size)).astype(np.int64).astype(np.uint64)
