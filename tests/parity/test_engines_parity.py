"""The cohort engine and devices' ONNX Runtime train the same task to the same model, up to the last digits of float32.

Same rows, same batches (`batches.device_batches` takes the devices' seeds), same sums: what differs is who computes.
Stated tolerance: after 4 rounds of FedAvg no parameter differs by more than 1e-5 of the largest one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import homespun
from homespun.learning.method import method
from homespun.learning.optimizers import server_optimizer
from homespun.plan.build import build_plan, checkpoint_of
from homespun.plan.manifest import ClientOptimizer, TensorFeature
from homespun.plan.package import Plan
from homespun.plan.seeds import participation_seed, training_seed
from homespun.simulation.arena import Arena
from homespun.simulation.batches import device_batches
from homespun.simulation.cohort.engine import CohortEngine
from homespun.simulation.cohort_rounds import CohortRounds
from homespun.simulation.plans import PlanRounds
from homespun.simulation.shards import Adding, Aggregation, ShardTrainer
from homespun.simulation.state import round_seed
from homespun.simulation.task import Task
from tests.unit.simulated import loss, top1

TOLERANCE = 1e-5
SEED, ROUNDS, CLIENTS = 3, 4, 6
OPTIMIZERS = {
    "plain": ClientOptimizer(learning_rate=0.1),
    "every term": ClientOptimizer(
        learning_rate=0.1, momentum=0.5, weight_decay=0.01, proximal=0.1, max_grad_norm=1.0
    ),
}


class Small(nn.Module):
    """A convolution and two layers, one of them worth factoring: float32 [B, 6, 6] -> [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, 4, 3)
        self.wide = nn.Linear(64, 160)
        self.output = nn.Linear(160, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        filtered = torch.tanh(self.filters(x.unsqueeze(1))).flatten(1)
        result: torch.Tensor = self.output(torch.tanh(self.wide(filtered)))
        return result


def clients() -> Arena:
    """Of 1 to 11 rows of pixels, some with more than `max_rows`."""
    draw = np.random.default_rng(0)
    counts = np.array([1, 4, 11, 7, 5, 9])
    x = draw.integers(0, 256, (counts.sum(), 6, 6)).astype(np.uint8)
    y = (x.reshape(len(x), -1)[:, :3].argmax(1)).astype(np.int32)
    return Arena({"x": x, "y": y}, np.concatenate([[0], np.cumsum(counts)]))


def task(optimizer: ClientOptimizer) -> Task:
    torch.manual_seed(0)
    return Task(
        model=Small(), loss=loss, metrics={"top1": top1}, optimizer=optimizer, batch_size=4,
        local_epochs=2, max_rows=8, scales={"x": 1 / 255},
    )  # fmt: skip


def plan_of(made: Task) -> Plan:
    draw = torch.Generator().manual_seed(0)
    examples = {
        "x": torch.rand(8, 6, 6, generator=draw),
        "y": torch.randint(0, 3, (8,), generator=draw).int(),
    }
    return build_plan(
        made.model, name="small", examples=examples, loss=made.loss, metrics=made.metrics,
        features=[
            TensorFeature(field="x", input="x", dtype="uint8", shape=(6, 6), scale=1 / 255),
            TensorFeature(field="y", input="y", dtype="int32"),
        ],
        optimizer=made.optimizer, batch_size=4, local_epochs=2, max_rows=8, clip_norm=1.0,
        max_weight=8,
    )  # fmt: skip


def on_devices(made: Task, on: Arena) -> tuple[np.ndarray, list[float]]:
    rounds = PlanRounds(
        plan=plan_of(made), arena=on, optimizer=server_optimizer("FedAvg", {}),
        max_group=CLIENTS, seed=SEED, bits=32,
    )  # fmt: skip
    state, losses = rounds.begin(checkpoint_of(made.model)), []
    for number in range(1, ROUNDS + 1):
        state, trained = rounds.round(state, number, np.arange(CLIENTS))
        losses.append(trained.metrics["loss"].mean)
    return np.concatenate([array.reshape(-1) for array in state.model.values()]), losses


def in_cohorts(made: Task, on: Arena, strategy: str) -> tuple[np.ndarray, list[float]]:
    def drawn(number, who):
        seeds = [training_seed(participation_seed(round_seed(SEED, number), c)) for c in who]
        return device_batches(
            on.offsets, who, seeds, batch_size=4, local_epochs=2, max_rows=made.max_rows
        )

    adding = Adding(
        aggregation=Aggregation.FIXED_POINT, clip_norm=1.0, max_weight=8, bits=32, max_group=CLIENTS
    )
    built = method("FedAvg")
    rounds = CohortRounds(
        method=built,
        pool=ShardTrainer(
            engine=CohortEngine(made, on, strategy=strategy), method=built, batches=drawn,
            adding=adding,
        ),
        split=lambda clients, _: [clients],
        num_shards=1,
        adding=adding,
        shapes=[(n, tuple(p.shape)) for n, p in made.model.named_parameters()],
        own=checkpoint_of(made.model),
        population=CLIENTS,
        seed=SEED,
        evaluator=None,
    )  # fmt: skip
    state, losses = rounds.begin(None), []
    for number in range(1, ROUNDS + 1):
        state, trained = rounds.round(state, number, np.arange(CLIENTS))
        losses.append(trained.metrics["loss"].mean)
    return state.model.numpy(), losses


@pytest.mark.parametrize("terms", OPTIMIZERS)
def test_the_cohort_engine_trains_what_devices_train(terms):
    made, on = task(OPTIMIZERS[terms]), clients()
    devices, losses = on_devices(made, on)
    moved = np.abs(devices - in_flat(made)).max()
    assert moved > 1000 * TOLERANCE
    for strategy in (
        ("reference", "stacked", "factored") if terms == "plain" else ("reference", "stacked")
    ):
        cohorts, also = in_cohorts(made, on, strategy)
        assert np.abs(cohorts - devices).max() <= TOLERANCE * np.abs(devices).max()
        np.testing.assert_allclose(also, losses, rtol=1e-4)


def in_flat(made: Task) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in checkpoint_of(made.model).values()])


def test_simulate_takes_a_plan_and_evaluates_it(tmp_path):
    made, on = task(OPTIMIZERS["plain"]), clients()
    words = {
        "rounds": 3, "cohort": 4, "aggregation": "fixed-point", "evaluate_on": on, "progress": False,
        "initial": checkpoint_of(made.model), "seed": SEED,
    }  # fmt: skip
    plan = plan_of(made)
    whole = homespun.simulate(plan, on, **words)
    assert [record.num_clients for record in whole.history] == [4, 4, 4]
    losses = [record.evaluation["loss"] for record in whole.history]
    assert losses[0] > losses[-1]
    homespun.simulate(plan, on, **{**words, "rounds": 2}, directory=tmp_path)
    resumed = homespun.simulate(plan, on, **words, directory=tmp_path, resume=True)
    assert {n: a.tobytes() for n, a in resumed.parameters.items()} == {
        n: a.tobytes() for n, a in whole.parameters.items()
    }
