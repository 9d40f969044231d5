"""A thousand devices in one masked sum: a ring instead of a complete graph, and a hundred of them drop out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from random import Random

import numpy as np

from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.learning.metrics import MetricSum
from homespun.learning.optimizers import server_optimizer
from homespun.protocol.messages import Aggregation
from homespun.protocol.tasks import GroupSpec
from homespun.rng import stream
from homespun.secagg.device import Demands
from homespun.tensors import codec as tensors
from tests.fleet.device import POPULATION, Device
from tests.fleet.member import STEP_S, STEPS, Member
from tests.fleet.world import synthetic_plan

NUM_DEVICES = 1000
NUM_LOST = 100
DIMENSION = 100_000
NOT_IN = ("share-keys", "mask-input")
"""Who leaves before one of these is in no sum."""


@lru_cache(maxsize=1)
def model_contribution(codec: ContributionCodec) -> Contribution:
    rng = stream(3)
    update = rng.normal(0.0, 1e-3, DIMENSION).astype(np.float32)
    return codec.encode(update, 20, {name: MetricSum(1.0, 2.0) for name in codec.metrics}, rng)


class Light(Member):
    """Its update is that of all others, moved on by one place for each device."""

    @property
    def contribution(self) -> Contribution:
        same = model_contribution(self.device.codec(self.assigned))
        return Contribution(np.roll(same.main, self.device.index), same.aux, same.bits)


def everybody(pool: ThreadPoolExecutor, members: list[Light]) -> None:
    """One exchange each, many at the same time, as a server sees it."""
    for _ in pool.map(Light.step, [member for member in members if not member.through]):
        pass


def test_a_thousand_devices_are_one_sum(make_world):
    world = make_world(0, plan=synthetic_plan((DIMENSION,)), batch_s=0.005)
    rng = Random(1)
    with ThreadPoolExecutor(32) as pool:
        devices, token = [Device(world, index) for index in range(NUM_DEVICES)], world.token()
        store, now = world.deployment.store, world.clock.now()
        for device in devices:  # many requests that others test
            store.enrolment.enroll(POPULATION, token, device.device_id, device.public, now)
        task = world.create_task(
            aggregation=Aggregation.SECURE,
            goal=NUM_DEVICES,
            minimum=NUM_DEVICES - NUM_LOST,
            min_group=NUM_DEVICES - NUM_LOST,
            groups=GroupSpec(size=NUM_DEVICES, corrupt_fraction=0.05, drop_out_fraction=0.1),
        )
        for device in devices:
            store.claims.claim(task.task_id, 1, 1, device.device_id, now, now + 60.0)
        world.settle()
        cohort = list(pool.map(lambda device: device.claim(task, 1), devices))
        members = [
            Light(device, assigned, task.spec.name, demands=Demands(NUM_DEVICES - NUM_LOST))
            for device, assigned in zip(devices, cohort, strict=True)
        ]
        for member in rng.sample(members, NUM_LOST):
            member.leaves_at = rng.choice(STEPS[1:])
        while not all(member.through for member in members):
            everybody(pool, members)
            if not any(member.asked for member in members if not member.gone):
                world.pass_time(STEP_S)
    world.settle()
    summary = world.rounds(task)[0]
    (group,) = summary.groups
    counted = [member for member in members if member.leaves_at not in NOT_IN]
    assert (summary.state, group.state) == ("scrubbed", "opened")
    assert (group.num_devices, group.num_masked) == (NUM_DEVICES, len(counted))
    assert summary.num_reported == len(counted) < NUM_DEVICES
    for member in members:
        ticket, device_id = member.assigned.assignment_id, member.device.device_id
        receipt = store.reports.expectation(ticket, device_id).receipt
        assert receipt.state == ("late" if member.leaves_at in NOT_IN else "included")
    codec = counted[0].device.codec(counted[0].assigned)
    total = codec.empty()
    for member in counted:
        codec.add(total, member.contribution)
    rule = server_optimizer("FedAvg", {})
    base = world.deployment.library.checkpoint(summary.base_checkpoint)
    algorithm = Algorithm(world.plan.manifest.shapes, codec, rule)
    moved, _, _ = algorithm.server_update(base, rule.init(base), total)
    assert summary.checkpoint == tensors.digest(tensors.encode_tree(moved))
