"""Simulation of a plan: every client does what a device does, to the last bit.

ONNX Runtime trains, the device's own codec encodes with the device's own seeds, integers are added. So a checkpoint
has the hash that a deployment's has after the same rounds of the same devices: this is the reference that shows what
will happen on devices, and what the faster cohort engine is held to. It trains one client after another.

    round     state.round_seed(seed, round)     as the server derives it   server.aggregation
    device    plan.seeds                        the device's own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homespun.errors import InvalidConfig, NumericFailure, ShapeMismatch
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.learning.optimizers import ServerOptimizer
from homespun.plan import run
from homespun.plan.engine import Trainer
from homespun.plan.features import Rows
from homespun.plan.initial import initial_checkpoint
from homespun.plan.manifest import Manifest, TensorFeature
from homespun.plan.package import Plan
from homespun.plan.seeds import participation_seed, rounding, training_seed
from homespun.rng import derive_seed
from homespun.simulation.arena import Arena
from homespun.simulation.checkpoints import Snapshot
from homespun.simulation.secure import secure_sum
from homespun.simulation.state import Trained, failure_of, round_seed
from homespun.tensors import tree as trees
from homespun.types import Tree


def contribute(
    plan: Plan,
    checkpoint: Tree,
    rows: Rows,
    codec: ContributionCodec,
    *,
    round_seed: int,
    device_seed: int,
    trainer: Trainer | None = None,
) -> tuple[Contribution, run.TrainingResult]:
    """What a device whose seed is `device_seed` reports in a round whose seed is `round_seed`, and its training.

    Raises as `plan.run.train` and `ContributionCodec.encode`.
    """
    seed = participation_seed(round_seed, device_seed)
    result = run.train(plan, checkpoint, rows, training_seed(seed), trainer=trainer)
    update = trees.flatten(result.update, plan.manifest.shapes)
    return codec.encode(update, result.num_examples, result.metrics, rounding(seed)), result


def rows_of(manifest: Manifest, arena: Arena, client: int) -> Rows:
    """A client's rows as the plan's inputs take them; what is stored narrow (pixels) is widened and scaled.

    Raises `ShapeMismatch` for an arena whose inputs are not the plan's.
    """
    scales = {f.input: f.scale for f in manifest.features if isinstance(f, TensorFeature)}
    stored, rows = arena.rows(client), {}
    for spec in manifest.inputs:
        if spec.name not in stored or stored[spec.name].shape[1:] != spec.shape[1:]:
            raise ShapeMismatch(
                f"the data do not have the plan's input {spec.name!r}",
                expected=str(list(spec.shape[1:])),
                got=str({name: list(array.shape[1:]) for name, array in stored.items()}),
            )
        array = np.asarray(stored[spec.name])
        if array.dtype != spec.dtype and spec.dtype == "float32":
            array = array * np.asarray(scales.get(spec.name, 1.0), spec.dtype)
        rows[spec.name] = np.asarray(array, spec.dtype)
    return rows


@dataclass(frozen=True, kw_only=True)
class PlanRounds:
    """The rounds of a plan (see `state.Rounds`). `bits`, `rotate`, `max_group`: as of the deployment's task;
    `device_seeds` [num_clients]: None gives client c the seed c; `secure`: sums are masked and unmasked, too.
    """

    plan: Plan
    arena: Arena
    optimizer: ServerOptimizer
    max_group: int
    seed: int = 0
    bits: int = 16
    rotate: bool = True
    secure: bool = False
    device_seeds: Sequence[int] | None = None
    evaluate_on: Arena | None = None

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` or `ShapeMismatch` for data that do not fit the plan."""
        if self.device_seeds is not None and len(self.device_seeds) != self.arena.num_clients:
            raise InvalidConfig(
                "not one device seed per client",
                expected=self.arena.num_clients,
                got=len(self.device_seeds),
            )
        if self.arena.num_clients:
            rows_of(self.plan.manifest, self.arena, 0)
        self.codec(1)  # refuses a clip bound and group size that do not fit the words

    def begin(self, initial: Tree | None) -> Snapshot:
        """Round 0: from `initial`, or as the plan says that parameters start."""
        model = initial or initial_checkpoint(self.plan.manifest, self.seed)
        self.plan.manifest.check_checkpoint(model)
        return Snapshot(0, dict(model), self.optimizer.init(model))

    def restore(self, snapshot: Snapshot) -> Snapshot:
        self.plan.manifest.check_checkpoint(snapshot.model)
        return snapshot

    def snapshot(self, state: Snapshot) -> Snapshot:
        return state

    def codec(self, number: int) -> ContributionCodec:
        """How the clients of a round encode."""
        manifest = self.plan.manifest
        rotation = derive_seed(round_seed(self.seed, number), "rotation")
        return ContributionCodec(
            dimension=manifest.num_parameters,
            clip_norm=manifest.clip_norm,
            max_weight=manifest.max_weight,
            metrics=("loss", *manifest.metrics),
            max_group=self.max_group,
            bits=self.bits,
            rotation_seed=rotation if self.rotate else None,
        )

    def round(
        self, state: Snapshot, number: int, cohort: npt.NDArray[np.int64]
    ) -> tuple[Snapshot, Trained]:
        """One round of these clients. Raises `NumericFailure` naming the round."""
        codec = self.codec(number)
        trainer = Trainer(self.plan.manifest, self.plan.graphs["train"])
        contributions, num_examples, num_steps = [], 0, 0
        for client in cohort.tolist():
            device_seed = client if self.device_seeds is None else self.device_seeds[client]
            contribution, result = contribute(
                self.plan,
                state.model,
                rows_of(self.plan.manifest, self.arena, client),
                codec,
                round_seed=round_seed(self.seed, number),
                device_seed=device_seed,
                trainer=trainer,
            )
            contributions.append(contribution)
            num_examples += result.num_examples
            num_steps += result.num_steps
        total = (
            secure_sum(codec, contributions, number) if self.secure else codec.total(contributions)
        )
        algorithm = Algorithm(self.plan.manifest.shapes, codec, self.optimizer)
        try:
            moved, moments, seen = algorithm.server_update(state.model, dict(state.server), total)
        except NumericFailure as error:
            raise failure_of(number, error.message) from error
        return Snapshot(number, moved, moments), Trained(
            metrics=dict(seen.metrics),
            num_clients=seen.num_clients,
            num_examples=num_examples,
            num_steps=num_steps,
            weight=seen.weight,
            clipped=seen.clipped_share,
        )

    def evaluate(self, state: Snapshot) -> dict[str, float]:
        """Loss and metrics over all rows of all clients of `evaluate_on` together."""
        arena = self.evaluate_on
        if arena is None:
            return {}
        whole = Arena(arena.inputs, np.array([0, arena.offsets[-1]]))
        sums = run.evaluate(self.plan, state.model, rows_of(self.plan.manifest, whole, 0))
        return {name: value.mean for name, value in sums.items()}

    def parameters(self, state: Snapshot) -> Tree:
        return state.model
