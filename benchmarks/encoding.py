"""What do few bits cost? The keyboard model trained with different encodings of what devices send.

The same devices, rounds, batches and seeds for every encoding; the text is the demo's (documentation strings of this
Python). Reported is the share of right suggestions on devices that never trained, and how far the last model is
from the one trained without rounding to integers, in units of the distance that all rounds moved. Noise: the same
with another seed of the rounding only changes the last digits; `float` is the peer.

Rows are `top3` and `top1` (shares, more is better), `distance` (ratio) and `upload` (bytes of one report's body).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import Options, Row, parse_options, report, rows
from homespun.cli.demo import ingredients
from homespun.cli.demo.story import OPTIMIZER
from homespun.learning.contribution import ContributionCodec
from homespun.learning.metrics import MetricSum
from homespun.learning.optimizers import ServerOptimizer, server_optimizer
from homespun.plan import features, run
from homespun.plan.engine import Trainer
from homespun.plan.initial import initial_checkpoint
from homespun.plan.package import Plan
from homespun.protocol.frame import masked_frame_size
from homespun.rng import derive_seed, stream
from homespun.tensors import tree as trees
from homespun.types import FloatArray

NUM_DEVICES, NUM_TESTERS, COHORT = 30, 8, 10
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Encoding:
    """`bits` None: floating point, added up without rounding; `group`: for how many there is room in the words."""

    name: str
    bits: int | None
    rotated: bool = False
    group: int = 100


ENCODINGS = (
    Encoding("float", None),
    Encoding("32 bits", 32),
    Encoding("16 bits rotated", 16, rotated=True),
    Encoding("14 bits rotated", 14, rotated=True),
    Encoding("12 bits rotated", 12, rotated=True),
    Encoding("16 bits", 16),
)


class Fleet:
    """The devices' rows, and one round of training for any encoding."""

    def __init__(self, seed: int, text: Path | None = None) -> None:
        self.seed = seed
        self.plan: Plan = ingredients.keyboard_plan(ingredients.public_texts(None))
        people = ingredients.gather(text, NUM_DEVICES).users
        order = stream(seed, "who").permutation(NUM_DEVICES)
        data = [[{"text": each} for each in people[index].texts] for index in order]
        encoded = [features.encode(self.plan.manifest, self.plan.assets, each) for each in data]
        self.testers, self.trainers = encoded[:NUM_TESTERS], encoded[NUM_TESTERS:]
        self.trainer = Trainer(self.plan.manifest, self.plan.graphs["train"])

    def train(self, encoding: Encoding, num_rounds: int) -> dict[str, FloatArray]:
        """The last checkpoint."""
        parameters = initial_checkpoint(self.plan.manifest, self.seed)
        optimizer: ServerOptimizer = server_optimizer(OPTIMIZER.name, OPTIMIZER.settings)
        state = optimizer.init(parameters)
        for number in range(num_rounds):
            mean = self._mean_update(encoding, parameters, number)
            moved, next_state = optimizer.apply(
                parameters, state, trees.unflatten(mean, self.plan.manifest.shapes)
            )
            parameters, state = trees.as_arrays(moved), trees.as_arrays(next_state)
        return parameters

    def _mean_update(
        self, encoding: Encoding, parameters: Mapping[str, FloatArray], number: int
    ) -> FloatArray:
        codec = self.codec(encoding, number)
        total, weights = codec.empty(), 0.0
        exact = np.zeros(codec.dimension)
        for index in stream(self.seed, number, "draw").permutation(len(self.trainers))[:COHORT]:
            device = derive_seed(self.seed, number, int(index))
            result = run.train(
                self.plan, parameters, self.trainers[index], device, trainer=self.trainer
            )
            update = trees.flatten(result.update, self.plan.manifest.shapes)
            if encoding.bits is None:
                weight = codec.weight(result.num_examples)
                length = float(np.linalg.norm(update))
                exact += update * (weight * min(1.0, codec.clip_norm / max(length, 1e-30)))
                weights += weight
            else:
                rounding = stream(device, "rounding")
                codec.add(total, codec.encode(update, result.num_examples, {}, rounding))
        if encoding.bits is None:
            return (exact / weights).astype(np.float32)
        return codec.decode(total).mean_update

    def codec(self, encoding: Encoding, number: int) -> ContributionCodec:
        manifest = self.plan.manifest
        return ContributionCodec(
            dimension=manifest.num_parameters,
            clip_norm=manifest.clip_norm,
            max_weight=manifest.max_weight,
            metrics=(),
            max_group=encoding.group,
            bits=encoding.bits or 32,
            rotation_seed=derive_seed(self.seed, number, "rotation") if encoding.rotated else None,
        )

    def test(self, parameters: Mapping[str, FloatArray]) -> dict[str, float]:
        """Shares of right suggestions over all testers."""
        totals: dict[str, MetricSum] = {}
        for device in self.testers:
            totals = run.add_sums(totals, run.evaluate(self.plan, parameters, device))
        return {name: value.mean for name, value in totals.items()}


def measure(options: Options) -> list[Row]:
    """All encodings, side by side, for each seed."""
    seeds, num_rounds = (SEEDS[:1], 3) if options.quick else (SEEDS, 20)
    encodings = [e for e in ENCODINGS if not options.quick or e.bits in (None, 16)]
    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        fleet = Fleet(seed)
        shapes = fleet.plan.manifest.shapes
        began = trees.flatten(initial_checkpoint(fleet.plan.manifest, seed), shapes)
        reference: FloatArray | None = None
        for encoding in encodings:
            last = fleet.train(encoding, num_rounds)
            flat = trees.flatten(last, shapes)
            reference = flat if reference is None else reference
            shares = fleet.test(last)
            size = masked_frame_size(encoding.bits or 32, 0, flat.size)
            moved = float(np.linalg.norm(reference - began))
            for row, value in (
                ("top3", shares["top3"]),
                ("top1", shares["top1"]),
                ("distance", float(np.linalg.norm(flat - reference)) / moved),
                ("upload", float(size)),
            ):
                found.setdefault(row, {}).setdefault(encoding.name, []).append(value)
    case = f"keyboard, {num_rounds} rounds of {COHORT}"
    units = {"top3": "share", "top1": "share", "distance": "ratio", "upload": "B"}
    return [
        each
        for row, sides in found.items()
        for each in rows(f"{case}, {row}", sides, unit=units[row])
    ]


if __name__ == "__main__":
    options = parse_options(__doc__)
    report(measure(options), options)
