"""A simulated plan and a deployment of it make the same checkpoints, bit for bit.

The deployment is the real HTTP application with the real device runtime; the simulation knows of it only the task,
the seeds and what each device's own store gives to train on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from homespun import zoo
from homespun.clock import ManualClock
from homespun.device.examples import open_examples
from homespun.device.home import Home
from homespun.learning.optimizers import server_optimizer
from homespun.plan import features
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.messages import Aggregation
from homespun.simulation.arena import Arena
from homespun.simulation.plans import PlanRounds
from homespun.tensors.codec import digest, encode_tree
from tests.parity.test_parity import NUM_DEVICES, NUM_ROUNDS, History, in_process, task

SEED = 5


def arena_of(root: Path) -> Arena:
    """The rows that the devices of `in_process` train on."""
    plan, parts = zoo.load("digits"), []
    for index in range(NUM_DEVICES):
        home = Home(root / f"device-{index}")
        store = open_examples(home, home.settings())
        parts.append(
            features.encode(plan.manifest, plan.assets, store.training(ManualClock().now() + 3600))
        )
        store.close()
    inputs = {name: np.concatenate([part[name] for part in parts]) for name in ("x", "y")}
    return Arena(inputs, np.cumsum([0, *(len(part["y"]) for part in parts)]))


def simulated(arena: Arena, seed: int = SEED, secure: bool = False) -> list[str]:
    plan = zoo.load("digits")
    optimizer = task()["optimizer"]
    rounds = PlanRounds(
        plan=plan,
        arena=arena,
        optimizer=server_optimizer(optimizer.name, optimizer.settings),
        max_group=NUM_DEVICES,
        seed=seed,
        secure=secure,
    )
    state = rounds.begin(initial_checkpoint(plan.manifest, 0))
    hashes = []
    for number in range(1, NUM_ROUNDS + 1):
        state, _ = rounds.round(state, number, np.arange(NUM_DEVICES))
        hashes.append(digest(encode_tree(state.model)))
    return hashes


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, History]:
    root = tmp_path_factory.mktemp("deployed")
    return root, in_process(root, seed=SEED, aggregation=Aggregation.PLAIN)


def test_a_simulated_plan_makes_the_checkpoints_of_a_deployment(deployed: tuple[Path, History]):
    root, history = deployed
    arena = arena_of(root)
    hashes = [checkpoint for _, checkpoint, _ in history]
    assert len(set(hashes)) == NUM_ROUNDS
    assert simulated(arena) == hashes
    assert simulated(arena, secure=True) == hashes
    assert simulated(arena, seed=SEED + 1)[0] != hashes[0]
