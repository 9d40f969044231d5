"""The demo's story, step by step. Every step is repeatable, so that an interrupted run resumes.

    text -> server -> devices -> training -> testing on other devices -> releases -> offline suggestions

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
from homespun.cli.demo.owners import Interruption, Typists, serving
from homespun.cli.demo.screen import Screen
from homespun.cli.releases import follow_release
from homespun.cli.tasks import finished, follow, share
from homespun.cli.trial import try_out
from homespun.clock import Clock, SystemClock
from homespun.errors import HomespunError, InvalidConfig, StorageFailure
from homespun.plan.initial import initial_checkpoint
from homespun.plan.package import Plan
from homespun.protocol.messages import Bucket, Criteria, RetryWindow, TaskKind, encode
from homespun.protocol.release import ReleaseState
from homespun.protocol.release_request import (
    EvaluationSpec,
    ReleaseRequest,
    Reports,
    WatchSpec,
)
from homespun.protocol.release_request import (
    Stage as ReleaseStage,
)
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
TEST_SHARE = 0.3
RETRY = RetryWindow(earliest_s=1.0, latest_s=2.0)
GROUPS = GroupSpec(step_s=3.0)
OPTIMIZER = OptimizerSpec(name="FedAdam", settings={"learning_rate": 0.03})
OPENINGS = ("thank you for the", "this is the", "return a new", "if the file")
PATIENCE_S = 120.0
POLL_S = 1.0
MAX_STALENESS = 1
ALPHA = 0.1
DIFFERENCE_CLIP = 0.02
STAGES = (ReleaseStage(fraction=0.5, soak_s=2.0),)
WATCH = WatchSpec(primary=0.4, latency_s=0.06, failed=0.6)
"""Margins as wide as so few devices need: with a dozen on each side only large differences show."""


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
        scenes = (False, True) if not stage.settings.exact else ()
        self._interruptions = [
            Interruption(trainers, stage.clock, stage.screen.say, until_late=late)
            for late in scenes
        ]

    def look(self) -> None:
        """One look at everything, between two at the server."""
        tick(self._stage)
        if self._interruptions:
            scene = self._interruptions[0]
            scene.look(self._stage.client.task(self._task_id).rounds_committed)
            if scene.is_over:
                self._interruptions.pop(0)
                self._tell_who_refuses()

    def _tell_who_refuses(self) -> None:
        while self._refusing:
            device = self._refusing.pop()
            self._stage.screen.say("refused", f"{device.name}: {device.why()}")

    def __enter__(self) -> Scenes:
        return self

    def __exit__(self, *_: object) -> None:
        for scene in self._interruptions[:1]:
            scene.end()
        self._tell_who_refuses()


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
        difference_clip=DIFFERENCE_CLIP,
        seed=stage.settings.seed,
    )
    task = once(stage.client, spec)
    with stage.screen.waiting("testing on devices that never trained"):
        for view in follow(stage.client, task.task_id, POLL_S, lambda: tick(stage)):
            stage.screen.say("test", f"{view.num_reported} of {view.num_assigned} reported")
    return finished(stage.client.task(task.task_id))


# --- releases -----------------------------------------------------------------------------------------


def ship(
    stage: Stage,
    trained: Hash,
    tested: TaskView,
    bucket: Bucket,
    testers: Sequence[DemoDevice],
) -> bool:
    """Three releases: one that fails in use only, the trained model, a worse one. Whether all went as they should."""
    client, plan, screen = stage.client, stage.plan, stage.screen
    model = codec.decode_tree(client.checkpoint(trained))
    word = ingredients.word_unknown_to(plan, testers)
    fragile = push(client, stage.plan_hash, ingredients.fragile_checkpoint(plan, model, word))
    worse = push(client, stage.plan_hash, ingredients.noisy_checkpoint(model, stage.settings.seed))
    typists = Typists(stage.devices, SLOT, word)

    screen.say("release", f"2-fragile: as good as the trained model, until somebody types {word!r}")
    view = release(stage, request(stage, fragile, "2-fragile", bucket), typists)
    if view.state is not ReleaseState.ROLLED_BACK:
        return failed(stage, view, "a release that fails in use was not rolled back")
    if not serve(stage, "1-initial"):
        return False

    screen.say("release", "3-trained: the model that the devices have trained")
    view = release(stage, request(stage, trained, "3-trained", bucket, tested.task_id), typists)
    if view.state is not ReleaseState.DEPLOYED:
        return failed(stage, view, "the trained model was not deployed")
    if not serve(stage, "3-trained"):
        return False

    screen.say("release", "4-noisy: the trained model with noise on its parameters")
    view = release(stage, request(stage, worse, "4-noisy", bucket), typists)
    if view.state is not ReleaseState.REJECTED:
        return failed(stage, view, "a worse model was not rejected")
    return True


def request(
    stage: Stage, checkpoint: Hash, version: str, bucket: Bucket, evidence: str | None = None
) -> ReleaseRequest:
    """What is asked for: evaluated by devices that did not train, then half of all devices, then all."""
    num_testers = len(members(stage.devices, bucket))
    num_devices = sum(device.script != NEVER_CHARGING for device in stage.devices)
    model = codec.decode_tree(stage.client.checkpoint(checkpoint))
    return ReleaseRequest(
        population=POPULATION,
        slot=SLOT,
        plan_hash=stage.plan_hash,
        checkpoint=checkpoint,
        version=version,
        evaluation_task_id=evidence,
        evaluation=EvaluationSpec(
            clip=DIFFERENCE_CLIP,
            most=num_testers,
            reports=reports(num_testers, Criteria(min_examples=1, bucket=bucket)),
        ),
        stages=STAGES,
        watch=msgspec.structs.replace(
            WATCH, most=num_devices, reports=reports(num_devices, Criteria(min_examples=1))
        ),
        alpha=ALPHA,
        trial=try_out(stage.plan, model),
    )


def reports(num_devices: int, criteria: Criteria) -> Reports:
    """A round of all these devices, or of nearly all if they do not come in time."""
    return Reports(
        goal=num_devices,
        minimum=round(0.75 * num_devices),
        min_group=MIN_GROUP,
        groups=GROUPS,
        over_selection=1.0,
        pool_target=num_devices,
        selection_s=SELECTION_S,
        deadline_s=PATIENCE_S,
        retry=RETRY,
        criteria=criteria,
    )


def release(stage: Stage, wanted: ReleaseRequest, typists: Typists | None = None) -> ReleaseView:
    """Ask for a release, unless an earlier run did, and follow it until it stays; a line for each step."""
    known = [view for view in stage.client.releases() if view.version == wanted.version]
    view = known[0] if known else stage.client.create_release(**plain(wanted))
    moved_at = stage.clock.now()

    def look() -> None:
        tick(stage)
        if typists is not None:
            typists.type(view.release_id)
        if stage.clock.now() > moved_at + PATIENCE_S:
            raise HomespunError(
                f"release {wanted.version} does not move", hint="homespun model show tells why"
            )

    with stage.screen.waiting(f"release {wanted.version}"):
        for latest, step in follow_release(stage.client, view.release_id, POLL_S, look):
            view, moved_at = latest, stage.clock.now()
            stage.screen.step(view, step)
    return view


def plain(wanted: ReleaseRequest) -> dict[str, object]:
    """A request as the client takes it."""
    fields: dict[str, object] = msgspec.json.decode(encode(wanted))
    return fields


def failed(stage: Stage, view: ReleaseView, what: str) -> bool:
    """Say what went wrong; False."""
    stage.screen.say("FAILED", f"{what}: {view.version} is {view.state}: {view.reason}")
    return False


def serve(stage: Stage, version: str) -> bool:
    """Wait until every device that is ever charged serves this release; False if patience ends before."""
    able = [device for device in stage.devices if device.script != NEVER_CHARGING]
    deadline = stage.clock.now() + PATIENCE_S
    with stage.screen.waiting(f"devices fetch release {version}"):
        while (num := serving(able, SLOT, version)) < len(able):
            tick(stage)
            if stage.clock.now() > deadline:
                stage.screen.say("FAILED", f"only {num} of {len(able)} devices serve {version}")
                return False
            stage.clock.sleep(0.5)
    away = ", ".join(device.name for device in stage.devices if device not in able)
    rest = f"; {away} was never charging and keeps out of everything" if away else ""
    stage.screen.say("serving", f"{version} on all {num} devices{rest}")
    return True
