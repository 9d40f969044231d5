"""The demo's story, step by step. Every step is repeatable, so that an interrupted run resumes.

    text -> server -> devices -> training -> testing on other devices -> releases -> offline suggestions

The demo plays all parts and drives them from outside only: the operator's HTTP API, the device command,
and the status file that a device writes for its owner.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from homespun.cli.client import OperatorClient, connect
from homespun.cli.demo import ingredients
from homespun.cli.demo.devices import (
    MIN_GROUP,
    NEVER_CHARGING,
    DemoDevice,
    cast,
    enrol,
    give_roles,
    members,
    refusing,
    split,
    traffic,
)
from homespun.cli.demo.fleet import Process, stop_all
from homespun.cli.demo.owners import Interruption
from homespun.cli.demo.screen import Screen
from homespun.cli.demo.shipping import DIFFERENCE_CLIP, release, request, ship
from homespun.cli.demo.stage import (
    GROUPS,
    PATIENCE_S,
    POLL_S,
    POPULATION,
    RETRY,
    SELECTION_S,
    Settings,
    Stage,
    push,
    tick,
)
from homespun.cli.tasks import finished, follow, share
from homespun.clock import SystemClock
from homespun.errors import HomespunError, InvalidConfig, StorageFailure
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.messages import Bucket, Criteria, TaskKind
from homespun.protocol.tasks import OptimizerSpec, TaskSpec
from homespun.protocol.views import RoundSummary, TaskView
from homespun.types import Hash

GOAL = 10
MINIMUM = 6
OVER_SELECTION = 1.2
POOL_SHARE = 0.75
MIN_EXAMPLES = 20
TEST_SHARE = 0.3
OPTIMIZER = OptimizerSpec(name="FedAdam", settings={"learning_rate": 0.03})
OPENINGS = ("thank you for the", "this is the", "return a new", "if the file")
MAX_STALENESS = 1


def play(settings: Settings, directory: Path, *, fresh: bool) -> int:
    """Run the demo; the exit code is 0 only if the model improved and every device that can serves it."""
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
        give_roles(trainers)
    screen.people(people, ingredients.num_words_known(plan))
    with running_server(directory / "server") as (server, client):
        screen.say("server", client.url)
        plan_hash = client.push_plan(plan.to_bytes()).hash
        initial = push(client, plan_hash, initial_checkpoint(plan.manifest, settings.seed))
        with screen.waiting("enrolling devices"):
            client.create_population(POPULATION)
            token = client.create_token(POPULATION).token or ""
            enrol(devices, client.url, POPULATION, token, clock)
        processes = [server, *(device.process for device in devices)]
        stage = Stage(settings, screen, clock, client, plan, plan_hash, devices, processes)
        screen.cast(devices, trainers, testers)
        with running(devices):
            release(stage, request(stage, initial, "1-initial", test_bucket))
            trained = train(stage, initial, train_bucket, trainers)
            baseline = push(client, plan_hash, ingredients.unigram_checkpoint(plan, trainers))
            tested = test(stage, (trained.head, initial, baseline), test_bucket, testers)
            shipped = ship(stage, trained.head, tested, test_bucket, testers)
        rounds = [view for task in client.tasks() for view in client.rounds(task.task_id)]
        (evaluation,) = [view for view in client.rounds(tested.task_id) if view.metrics]
    # The server is gone now: what follows happens on the devices, offline.
    screen.results(evaluation, trained.head)
    screen.groups(rounds)
    screen.traffic(devices)
    screen.cleanliness(devices, clock)
    screen.suggestions(testers[:3], OPENINGS)
    return verdict(stage, evaluation, shipped, directory)


def verdict(stage: Stage, evaluation: RoundSummary, shipped: bool, directory: Path) -> int:
    """The exit code: 0 only if the model is better than both others and the releases went as they should."""
    rates = [share(evaluation, f"{index}.top3") or 0.0 for index in range(3)]
    if rates[0] <= max(rates[1:]):
        stage.screen.say("FAILED", "the model did not get better; try more --rounds")
        return 1
    if not shipped:
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
        max_staleness=0 if settings.exact else MAX_STALENESS,
        criteria=Criteria(min_examples=MIN_EXAMPLES, bucket=bucket),
        optimizer=OPTIMIZER,
        seed=settings.seed,
    )
    task = once(stage.client, spec)
    began, before, done = stage.clock.now(), None, 0
    screen.say("train", f"{GOAL} reports a round; top-3 as the devices measure it while they train")
    scenes = Scenes(stage, task.task_id, trainers)
    with screen.waiting("waiting for devices to check in"), scenes:
        for view in follow(stage.client, task.task_id, POLL_S, scenes.look):
            done += (view.committed_at or 0) >= began
            left = settings.rounds - view.round_number
            eta_s = (stage.clock.now() - began) / done * left if done and left else None
            away, moved = refusing(trainers), traffic(stage.devices)
            screen.round(view, settings.rounds, before, away, moved, eta_s)
            before = share(view, "top3") if view.checkpoint else before
    return finished(stage.client.task(task.task_id))


class Scenes:
    """What happens to single devices while the model learns; each is told once, with the device's own words."""

    def __init__(self, stage: Stage, task_id: str, trainers: Sequence[DemoDevice]) -> None:
        self._stage, self._task_id = stage, task_id
        self._refusing = [d for d in trainers if d.is_newcomer or d.script == NEVER_CHARGING]
        self._interruptions: list[Interruption] = []
        if not stage.settings.exact:
            who = trainers, set[str](), stage.clock, stage.screen.say
            self._interruptions = [
                Interruption(*who),
                Interruption(*who, after=2, until_late=True),
            ]

    def look(self) -> None:
        """One look at everything, between two at the server."""
        tick(self._stage)
        rounds_committed = self._stage.client.task(self._task_id).rounds_committed
        for scene in tuple(self._interruptions):
            scene.look(rounds_committed)
            if scene.is_over:
                self._interruptions.remove(scene)
                self._tell_who_refuses()

    def _tell_who_refuses(self) -> None:
        while self._refusing:
            device = self._refusing.pop()
            self._stage.screen.say("refused", f"{device.name}: {device.why()}")

    def __enter__(self) -> Scenes:
        return self

    def __exit__(self, *_: object) -> None:
        for scene in self._interruptions:
            scene.end()
        self._tell_who_refuses()


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
        difference_clip=DIFFERENCE_CLIP,
        seed=stage.settings.seed,
    )
    task = once(stage.client, spec)
    with stage.screen.waiting("testing on devices that never trained"):
        for view in follow(stage.client, task.task_id, POLL_S, lambda: tick(stage)):
            stage.screen.say("test", f"{view.num_reported} of {view.num_assigned} reported")
    return finished(stage.client.task(task.task_id))
