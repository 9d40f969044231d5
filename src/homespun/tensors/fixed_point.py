"""Fixed point: floats as integers modulo 2^bits, so that a sum is exact and has no order.

Devices multiply by `scale`, round stochastically (unbiased) and take the two's complement. The server
adds machine words and lets them wrap; only the low `bits` of a sum mean anything. It decodes exactly because the
scale is chosen so that even `max_group` contributions at the clip bound cannot leave the signed range:

    max_group * (scale * clip + 1) < 2^(bits - 1)

Larger sums are several of these, decoded together. Clip bound, scale and modulus are therefore one record and
cannot disagree. Source: Bonawitz et al. 2019, "Federated learning with autotuned communication-efficient secure
aggregation", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from homespun.errors import InvalidConfig, NumericFailure, ShapeMismatch
from homespun.tensors.packing import Words, word
from homespun.types import FloatArray

_SEGMENT = 1 << 18  # entries at a time, so that a large model needs no float64 copy of itself


@dataclass(frozen=True)
class FixedPoint:
    """`bits`: of a word (8 to 32); `clip`: largest absolute entry; `max_group`: most contributions in one sum."""

    bits: int
    clip: float
    max_group: int

    def __post_init__(self) -> None:
        if self.bits not in range(8, 33):
            raise InvalidConfig("fixed point needs 8 to 32 bits", expected="8..32", got=self.bits)
        if not (
            self.clip > 0
            and np.isfinite(self.clip)
            and self.max_group >= 1
            and 0 < self.scale < np.inf
        ):
            raise InvalidConfig(
                "this clip bound and group size leave no room in the word",
                hint="use more bits or smaller groups",
                bits=self.bits,
                clip=self.clip,
                max_group=self.max_group,
            )

    @property
    def word(self) -> np.dtype[Any]:
        return word(self.bits)

    @property
    def largest(self) -> int:
        """The largest absolute value of one contribution's entry: `max_group` of them cannot wrap."""
        return int((2 ** (self.bits - 1) - 1) // self.max_group)

    @property
    def scale(self) -> float:
        """Integer steps per unit; stochastic rounding may add one step to the clip bound."""
        return float((self.largest - 1) / self.clip)

    def encode(self, values: FloatArray, rng: np.random.Generator) -> Words:
        """Device half: float32 `[d]` to words `[d]` below 2^bits; unbiased, `E[decode(encode(x))] = x` inside the clip.

        Raises `NumericFailure` for a NaN or an infinity: such a contribution never leaves the device.
        """
        if not np.isfinite(values).all():
            raise NumericFailure(
                "the update is not finite", hint="nothing was sent; lower the learning rate"
            )
        words = np.empty(values.shape, self.word)
        for start in range(0, values.size, _SEGMENT):
            part = values[start : start + _SEGMENT].astype(np.float64)
            steps = np.floor(
                np.clip(part, -self.clip, self.clip) * self.scale + rng.random(part.size)
            )
            words[start : start + _SEGMENT] = steps.astype(np.int64) & (2**self.bits - 1)
        return words

    def empty_sum(self, size: int) -> Words:
        return np.zeros(size, self.word)

    def add(self, total: Words, words: Words) -> None:
        """Server half: `total += words` modulo the machine word, in place."""
        if words.shape != total.shape or words.dtype != total.dtype:
            raise ShapeMismatch(
                "contribution and sum differ in shape",
                expected=f"{total.dtype}{list(total.shape)}",
                got=f"{words.dtype}{list(words.shape)}",
            )
        np.add(total, words, out=total)

    def check(self, words: Words, norm: float) -> None:
        """Raise `NumericFailure` for one contribution, seen in clear, that no honest device sends.

        That is: an entry that could make the sum wrap, or an L2 norm above `norm` (plain mode only).
        """
        square = 0.0
        for start in range(0, words.size, _SEGMENT):
            part = self._signed(words[start : start + _SEGMENT]).astype(np.float64)
            if np.abs(part).max() > self.largest:
                raise NumericFailure("an entry exceeds the clip bound", clip=self.clip)
            square += float(part @ part)
        # Honest values come in float32, and rounding moves each by less than one step.
        allowed = norm * self.scale * (1 + 1e-6) + words.size**0.5
        if square**0.5 > allowed:
            raise NumericFailure(
                "the update is longer than the clip bound",
                expected=norm,
                got=square**0.5 / self.scale,
            )

    def decode(self, *totals: Words) -> FloatArray:
        """Server half: the sum of all values in `totals`, each of at most `max_group`, words `[d]`; float32 `[d]`.

        At least one total. Exact up to the last division: they are added as 64-bit integers.
        """
        decoded = np.empty(totals[0].shape, np.float32)
        for start in range(0, decoded.size, _SEGMENT):
            stop = start + _SEGMENT
            steps = np.sum([self._signed(total[start:stop]) for total in totals], 0, np.int64)
            decoded[start:stop] = steps / self.scale
        return decoded

    def _signed(self, words: Words) -> npt.NDArray[Any]:
        """Words modulo 2^bits as the signed integers of least size; what lies above `bits` is dropped."""
        unused = 8 * words.itemsize - self.bits
        return (words << unused).view(f"<i{words.itemsize}") >> unused
