"""Devices that die in the middle of a group, as processes that are gone with SIGKILL's suddenness.

Eight real devices, each killed by itself right after one of its answers was taken. Whoever comes back in time is in the
sum, once, with what it had computed; whoever does not is lost, and the others go on without it. The sum is always
exactly that of the contributions that the server counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from homespun import zoo
from homespun.cli.demo.vanishing import EXIT_CODE as VANISHED
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import Contribution
from homespun.learning.optimizers import server_optimizer
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.group import GroupState
from homespun.protocol.messages import Assigned, RetryWindow, TaskKind
from homespun.protocol.tasks import GroupSpec, TaskSpec
from homespun.protocol.views import GroupSummary, RoundSummary, TaskView
from homespun.server.aggregation import contribution_codec, encoding, round_seed
from homespun.tensors.codec import digest, encode_tree
from tests.e2e.processes import MIN_GROUP, POPULATION, Device, Server, eventually
from tests.e2e.recomputed import contribution, examples_for
from tests.unit.device_server import images

NUM_DEVICES = 8
IMAGES = images(30 * NUM_DEVICES + 20)
EXAMPLES = [IMAGES[index : 30 * NUM_DEVICES : NUM_DEVICES] for index in range(NUM_DEVICES)]
OTHER_EXAMPLES = IMAGES[30 * NUM_DEVICES :]
PLAN = zoo.load("digits")
INITIAL = initial_checkpoint(PLAN.manifest, 0)
STEPS = ("advertise-keys", "share-keys", "mask-input", "agree", "unmask")
NEVER_S = 600.0
SHORT_S = 3.0
"""Longest that a step waits where somebody is to be lost: far longer than an answer takes."""


class Fleet:
    """A server and eight running devices."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root, self.server = root, Server(root / "server")
        stack.callback(self.server.kill)
        token = self.server.token()
        self.devices = [
            Device.enrolled(root / f"device-{i}", self.server.url, token, rows, seed=i)
            for i, rows in enumerate(EXAMPLES)
        ]
        for device in self.devices:
            device.start()
            stack.callback(device.kill)

    def vanish(self, after: Mapping[int, str]) -> None:
        """Start these devices anew so that each of them dies after this step of its next group."""
        self.examples = [examples_for(device, TaskKind.TRAIN) for device in self.devices]
        for index, step in after.items():
            self.devices[index].stop()
            self.devices[index].start("--vanish-after", step)

    def create_task(self, name: str, step_s: float) -> TaskView:
        """One round that all devices take part in."""
        client = self.server.client
        plan_hash = client.push_plan(PLAN.to_bytes()).hash
        checkpoint = client.push_checkpoint(encode_tree(INITIAL), plan_hash).hash
        return client.create_task(
            TaskSpec(
                name=name,
                population=POPULATION,
                kind=TaskKind.TRAIN,
                plan_hash=plan_hash,
                checkpoints=(checkpoint,),
                goal=NUM_DEVICES,
                minimum=MIN_GROUP,
                min_group=MIN_GROUP,
                over_selection=1.0,
                pool_target=NUM_DEVICES,
                selection_s=NEVER_S,
                deadline_s=NEVER_S,
                retry=RetryWindow(earliest_s=0.1, latest_s=0.2),
                groups=GroupSpec(step_s=step_s),
                seed=len(name),
            )
        )

    def died(self, index: int) -> Device:
        """The device, once it has vanished as it was meant to."""
        device = self.devices[index]
        assert device.process.end() == VANISHED, device.log.read_text()
        assert list(device.home.work.iterdir()), "its session is still there"
        return device

    def groups(self, task: TaskView) -> tuple[GroupSummary, ...]:
        return self.server.client.rounds(task.task_id)[0].groups

    def committed(self, task: TaskView) -> RoundSummary:
        """The task's only round, when it is."""
        client = self.server.client
        eventually(lambda: client.task(task.task_id).state != "active", f"{task.spec.name} ends")
        (summary,) = client.rounds(task.task_id)
        assert summary.checkpoint is not None, summary
        return summary

    def contribution(self, task: TaskView, index: int) -> Contribution:
        """What this device must have said in this task."""
        spec, seed = task.spec, round_seed(task.spec, 1, 1)
        assigned = Assigned(
            assignment_id="",
            kind=spec.kind,
            round_number=1,
            attempt=1,
            plan_hash=spec.plan_hash,
            checkpoints=spec.checkpoints,
            encoding=encoding(spec, PLAN.manifest, 1, 1),
            aggregation=spec.aggregation,
            seed=seed,
            deadline_s=spec.deadline_s,
        )
        scratch = self.root / f"{spec.name}-{index}"
        examples = self.examples[index]
        return contribution(self.devices[index], assigned, examples, self.server, scratch)

    def assert_sum_of(self, task: TaskView, indices: Collection[int]) -> None:
        """The round's checkpoint is that of the contributions of exactly these devices, each counted once."""
        codec = contribution_codec(task.spec, PLAN.manifest, 1, 1)
        algorithm = Algorithm(PLAN.manifest.shapes, codec, server_optimizer("FedAvg", {}))
        said = [self.contribution(task, index) for index in indices]
        moved, _, _ = algorithm.server_update(INITIAL, {}, *said)
        assert self.committed(task).checkpoint == digest(encode_tree(moved))

    def assert_outcomes(self, task: TaskView, lost: Collection[int] = ()) -> None:
        """Every device has taken part once and knows how it ended; nothing of it is left."""
        for index, device in enumerate(self.devices):
            expected = "late" if index in lost else "included"

            def ended(device: Device = device, expected: str = expected) -> bool:
                mine = [o for name, _, o in device.outcomes() if name == task.spec.name]
                return mine == [expected] and not list(device.home.work.iterdir())

            eventually(ended, f"device {index} knows that it is {expected}")
            assert device.log.read_text() == ""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path_factory.mktemp("drop-outs"), stack)


def counts(groups: Sequence[GroupSummary]) -> list[tuple[str, int, int, int, int]]:
    """Of every group: how it is, and who joined, shared, masked, agreed."""
    return [(str(g.state), g.num_devices, g.num_shared, g.num_masked, g.num_agreed) for g in groups]


def test_whoever_comes_back_in_time_is_in_the_sum_once(fleet: Fleet):
    fleet.vanish(dict(enumerate(STEPS)))
    task = fleet.create_task("back", NEVER_S)
    for index in range(len(STEPS)):
        device = fleet.died(index)
        # If it trained again, it would now say something else.
        device.add(OTHER_EXAMPLES)
        device.start()
    summary = fleet.committed(task)
    assert counts(summary.groups) == [("opened", *[NUM_DEVICES] * 4)]
    assert (summary.attempt, summary.num_reported, summary.num_late) == (1, NUM_DEVICES, 0)
    fleet.assert_sum_of(task, range(NUM_DEVICES))
    fleet.assert_outcomes(task)


@pytest.mark.parametrize(
    ("lost_after", "away_after", "expected"),
    [
        ("advertise-keys", "mask-input", (8, 7, 7, 6)),
        ("share-keys", "agree", (8, 8, 7, 7)),
    ],
)
def test_whoever_stays_away_is_lost_unless_it_has_reported(
    fleet: Fleet, lost_after: str, away_after: str, expected: tuple[int, ...]
):
    lost, away = 5, 6
    fleet.vanish({lost: lost_after, away: away_after})
    task = fleet.create_task(f"away-{away_after}", SHORT_S)
    fleet.died(lost)
    fleet.died(away)
    before = (GroupState.ADVERTISE_KEYS, STEPS[STEPS.index(lost_after) + 1].replace("-", "_"))
    eventually(
        lambda: [group.state not in before for group in fleet.groups(task)] == [True],
        "the group goes on without the one that is lost",
    )
    fleet.devices[lost].start()
    summary = fleet.committed(task)
    fleet.devices[away].start()
    assert counts(summary.groups) == [("opened", *expected)]
    assert (summary.attempt, summary.num_reported) == (1, NUM_DEVICES - 1)
    fleet.assert_sum_of(task, set(range(NUM_DEVICES)) - {lost})
    fleet.assert_outcomes(task, {lost})


def test_when_too_many_are_gone_the_others_wait_for_them_in_another_group(fleet: Fleet):
    gone = (0, 3, 7)
    fleet.vanish(dict.fromkeys(gone, "share-keys"))
    task = fleet.create_task("too-many", SHORT_S)
    for index in gone:
        fleet.died(index)
    eventually(
        lambda: [group.state for group in fleet.groups(task)][:1] == [GroupState.VOID],
        "the group comes to nothing",
    )
    for index in gone:
        fleet.devices[index].add(OTHER_EXAMPLES)
        fleet.devices[index].start()
    summary = fleet.committed(task)
    void, opened = summary.groups
    assert counts([void, opened]) == [("void", 8, 8, 5, 0), ("opened", *[NUM_DEVICES] * 4)]
    assert void.reason == "too few devices sent masked input"
    assert (summary.attempt, summary.num_reported) == (1, NUM_DEVICES)
    fleet.assert_sum_of(task, range(NUM_DEVICES))
    fleet.assert_outcomes(task)
