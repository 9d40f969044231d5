"""The demo's story, step by step. Every step is repeatable, so that an interrupted run resumes.

    text -> server -> devices -> training -> testing on other devices -> release -> offline suggestions

The demo plays all parts and drives them from outside only: the operator's HTTP API, the device command,
and the status file that a device writes for its owner.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from homespun.cli.client import OperatorClient, connect
from homespun.cli.demo import ingredients
from homespun.cli.demo.devices import (
    MIN_GROUP,
    SCRIPTS,
    VANISHING,
    DemoDevice,
    cast,
    enrol,
    members,
    refusing,
    split,
    traffic,
)
from homespun.cli.demo.fleet import Process, stop_all
from homespun.cli.demo.screen import Screen
from homespun.cli.models import describe
from homespun.cli.tasks import finished, follow, share
from homespun.clock import Clock, SystemClock
from homespun.errors import HomespunError, InvalidConfig, StorageFailure
from homespun.plan.initial import initial_checkpoint
from homespun.plan.package import Plan
from homespun.protocol.messages import Bucket, Criteria, RetryWindow, TaskKind
from homespun.protocol.release import ReleaseState
from homespun.protocol.tasks import GroupSpec, OptimizerSpec, TaskSpec
from homespun.protocol.views import ReleaseView, RoundSummary, TaskView
from homespun.tensors import codec
from homespun.types import Hash, Tree

POPULATION = "keyboard"
SLOT = "default"
GOAL = 10
MINIMUM = 6
OVER_SELECTION = 1.2
SELECTION_S = 15.0
POOL_SHARE = 0.75
MIN_EXAMPLES = 20
TEST_SHARE = 0.27
RETRY = RetryWindow(earliest_s=1.0, latest_s=2.0)
GROUPS = GroupSpec(step_s=3.0)
OPTIMIZER = OptimizerSpec(name="FedAdam", settings={"learning_rate": 0.03})
OPENINGS = ("thank you for the", "this is the", "return a new", "if the file")
PATIENCE_S = 120.0
DEPLOYED = ReleaseState.DEPLOYED
POLL_S = 1.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. A run resumes only with the settings it began with."""

    text: str | None
    public_text: str | None
    devices: int
    rounds: int
    seed: int
    exact: bool


@dataclass(frozen=True)
class Stage:
    """Everything that is on stage while the server runs."""

    settings: Settings
    screen: Screen
    clock: Clock
    client: OperatorClient
    plan: Plan
    plan_hash: Hash
    devices: Sequence[DemoDevice]
    processes: Sequence[Process]

    def check(self) -> None:
        """Raise if one of the processes has ended."""
        for process in self.processes:
            process.check()


def play(settings: Settings, directory: Path, *, fresh: bool) -> int:
    """Run the demo; the exit code is 0 only if the model improved and every device serves it."""
    screen, clock = Screen(), SystemClock()
    resumed = prepare(settings, directory, fresh=fresh)
    screen.begin(settings.devices, directory, resumed=resumed)
    people = ingredients.gather(Path(settings.text) if settings.text else None, settings.devices)
    public = ingredients.public_texts(Path(settings.public_text) if settings.public_text else None)
    plan = ingredients.keyboard_plan(public)
    devices = cast(people.users, directory / "devices", settings.seed)
    train_bucket, test_bucket = split(devices, TEST_SHARE)
    trainers, testers = members(devices, train_bucket), members(devices, test_bucket)
    if not settings.exact:
        for device, script in zip(trainers, SCRIPTS, strict=False):
            device.script = script
        for device, step in zip(trainers[len(SCRIPTS) :], VANISHING, strict=False):
            device.vanish_after = step
    screen.people(people, ingredients.num_words_known(plan))
    with running_server(directory / "server") as (server, client):
        screen.say("server", client.url)
        plan_hash = client.push_plan(plan.to_bytes()).hash
        incumbent = push(client, plan_hash, initial_checkpoint(plan.manifest, settings.seed))
        with screen.waiting("enrolling devices"):
            client.create_population(POPULATION)
            token = client.create_token(POPULATION).token or ""
            enrol(devices, client.url, POPULATION, token, clock)
        processes = [server, *(device.process for device in devices)]
        stage = Stage(settings, screen, clock, client, plan, plan_hash, devices, processes)
        screen.cast(devices, trainers, testers)
        release(stage, incumbent, "initial")
        with running(devices):
            trained = train(stage, incumbent, train_bucket, trainers)
            baseline = push(client, plan_hash, ingredients.unigram_checkpoint(plan, trainers))
            tested = test(stage, (trained.head, incumbent, baseline), test_bucket, testers)
            shipped = release(stage, trained.head, "trained", tested.task_id)
            screen.say("release", describe(shipped))
            serving = wait_until_served(stage, trained.head) if shipped.state == DEPLOYED else 0
        rounds = [*client.rounds(trained.task_id), *client.rounds(tested.task_id)]
        (evaluation,) = [view for view in client.rounds(tested.task_id) if view.metrics]
    # The server is gone now: what follows happens on the devices, offline.
    screen.results(evaluation, trained.head)
    screen.groups(rounds)
    screen.traffic(devices)
    screen.suggestions(testers[:3], OPENINGS)
    return verdict(stage, evaluation, serving, directory)


def verdict(stage: Stage, evaluation: RoundSummary, serving: int, directory: Path) -> int:
    """The exit code: 0 only if the model is better than both others and every device serves it."""
    rates = [share(evaluation, f"{index}.top3") or 0.0 for index in range(3)]
    if rates[0] <= max(rates[1:]):
        stage.screen.say("FAILED", "the model did not get better; try more --rounds")
        return 1
    if serving < len(stage.devices):
        stage.screen.say(
            "FAILED", f"only {serving} of {len(stage.devices)} devices serve the model"
        )
        return 1
    (directory / "complete").touch()
    stage.screen.done(stage.devices)
    return 0


# --- the steps ----------------------------------------------------------------------------------------


def prepare(settings: Settings, directory: Path, *, fresh: bool) -> bool:
    """Make `directory` ready; True if an interrupted run is there to resume.

    Raises `InvalidConfig` when the run that is there began with other settings, or the directory holds
    something else.
    """
    file = directory / "demo.json"
    if directory.exists() and any(directory.iterdir()) and not file.exists():
        raise InvalidConfig(f"{directory} holds something else", hint="choose another --dir")
    if file.exists() and not fresh and not (directory / "complete").exists():
        if msgspec.json.decode(file.read_bytes(), type=Settings) != settings:
            raise InvalidConfig(
                f"an unfinished demo with other settings is in {directory}",
                hint="give the same settings to resume it, or --fresh to start clean",
            )
        return True
    try:
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        file.write_bytes(msgspec.json.encode(settings))
    except OSError as error:
        raise StorageFailure(f"cannot write to {directory}: {error.strerror}") from error
    return False


@contextmanager
def running_server(data: Path) -> Iterator[tuple[Process, OperatorClient]]:
    """A server process, ready; stopped when the block ends."""
    data.mkdir(exist_ok=True)
    (data / "server.json").unlink(missing_ok=True)  # a server that was killed leaves it behind
    command = ("serve", "--data", str(data), "--port", "0", "--until-eof")
    process = Process("the server", command, data / "server.log")
    process.start()
    try:
        clock = SystemClock()
        deadline = clock.now() + PATIENCE_S
        while not (data / "server.json").exists():
            process.check()
            if clock.now() > deadline:
                raise HomespunError("the server does not start", hint=f"see {process.log}")
            clock.sleep(0.1)
        yield process, connect(None, None, data)
    finally:
        stop_all([process])


@contextmanager
def running(devices: Sequence[DemoDevice]) -> Iterator[None]:
    """Every device's process; stopped when the block ends."""
    try:
        for device in devices:
            device.start()
        yield
    finally:
        stop_all([device.process for device in devices])


def push(client: OperatorClient, plan_hash: Hash, checkpoint: Tree) -> Hash:
    """Give the server a checkpoint."""
    return client.push_checkpoint(codec.encode_tree(checkpoint), plan_hash).hash


def once(client: OperatorClient, spec: TaskSpec) -> TaskView:
    """The task of this name; created unless an earlier run did."""
    for view in client.tasks():
        if view.spec.name == spec.name:
            return view
    return client.create_task(spec)


def train(stage: Stage, initial: Hash, bucket: Bucket, trainers: Sequence[DemoDevice]) -> TaskView:
    """All training rounds, a line for each."""
    settings, screen = stage.settings, stage.screen
    spec = TaskSpec(
        name="train",
        population=POPULATION,
        kind=TaskKind.TRAIN,
        plan_hash=stage.plan_hash,
        checkpoints=(initial,),
        num_rounds=settings.rounds,
        goal=GOAL,
        minimum=MINIMUM,
        over_selection=1.0 if settings.exact else OVER_SELECTION,
        pool_target=len(trainers) if settings.exact else round(POOL_SHARE * len(trainers)),
        selection_s=PATIENCE_S if settings.exact else SELECTION_S,
        deadline_s=PATIENCE_S,
        retry=RETRY,
        min_group=MIN_GROUP,
        groups=GROUPS,
        criteria=Criteria(min_examples=MIN_EXAMPLES, bucket=bucket),
        optimizer=OPTIMIZER,
        seed=settings.seed,
    )
    task = once(stage.client, spec)
    began, before, done = stage.clock.now(), None, 0
    screen.say("train", f"{GOAL} reports a round; top-3 as the devices measure it while they train")
    with screen.waiting("waiting for devices to check in"):
        for view in follow(stage.client, task.task_id, POLL_S, lambda: tick(stage)):
            done += (view.committed_at or 0) >= began
            left = settings.rounds - view.round_number
            eta_s = (stage.clock.now() - began) / done * left if done and left else None
            away, moved = refusing(trainers), traffic(stage.devices)
            screen.round(view, settings.rounds, before, away, moved, eta_s)
            before = share(view, "top3") if view.checkpoint else before
    return finished(stage.client.task(task.task_id))


def tick(stage: Stage) -> None:
    """Between two looks at the server: are all alive, who is doing what."""
    for device in stage.devices:
        device.come_back(stage.clock.now())
    stage.check()
    stage.screen.live(stage.devices)


def test(
    stage: Stage, checkpoints: tuple[Hash, ...], bucket: Bucket, testers: Sequence[DemoDevice]
) -> TaskView:
    """One evaluation round: candidate, incumbent and baseline on devices that never trained."""
    spec = TaskSpec(
        name="test",
        population=POPULATION,
        kind=TaskKind.EVALUATE,
        plan_hash=stage.plan_hash,
        checkpoints=checkpoints,
        goal=len(testers),
        minimum=min(MINIMUM, len(testers)),
        over_selection=1.0,
        pool_target=len(testers),
        selection_s=30.0,
        deadline_s=PATIENCE_S,
        retry=RETRY,
        min_group=MIN_GROUP,
        groups=GROUPS,
        criteria=Criteria(min_examples=1, bucket=bucket),
        seed=stage.settings.seed,
    )
    task = once(stage.client, spec)
    with stage.screen.waiting("testing on devices that never trained"):
        for view in follow(stage.client, task.task_id, POLL_S, lambda: tick(stage)):
            stage.screen.say("test", f"{view.num_reported} of {view.num_assigned} reported")
    return finished(stage.client.task(task.task_id))


def release(
    stage: Stage, checkpoint: Hash, version: str, evidence: str | None = None
) -> ReleaseView:
    """Release a checkpoint, unless an earlier run did."""
    for view in stage.client.releases():
        if view.version == version and view.checkpoint == checkpoint:
            return view
    return stage.client.create_release(
        population=POPULATION,
        slot=SLOT,
        plan_hash=stage.plan_hash,
        checkpoint=checkpoint,
        version=version,
        evaluation_task_id=evidence,
    )


def wait_until_served(stage: Stage, checkpoint: Hash) -> int:
    """How many devices serve `checkpoint`; waits until all do, or patience ends."""
    deadline = stage.clock.now() + PATIENCE_S
    with stage.screen.waiting("devices fetch the release"):
        while True:
            tick(stage)
            serving = sum(device.serves(checkpoint) for device in stage.devices)
            if serving == len(stage.devices) or stage.clock.now() > deadline:
                stage.screen.say("serving", f"{serving} of {len(stage.devices)} devices")
                return serving
            stage.clock.sleep(0.5)
