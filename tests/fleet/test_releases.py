"""Releases: other devices decide, a few serve it first, and whatever happens every device ends with one good model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import msgspec
import pytest

from homespun.cli.client import OperatorClient
from homespun.cli.releases import follow_evaluation, follow_release
from homespun.errors import Conflict, InvalidConfig, NotFound
from homespun.learning.evidence import Verdict
from homespun.learning.metrics import watched_names
from homespun.protocol.messages import Aggregation, Bucket, Criteria, ReleaseNotice, TaskKind
from homespun.protocol.release import (
    Reported,
)
from homespun.protocol.release_request import (
    EvaluationSpec,
    ReleaseRequest,
    Reports,
    Stage,
    WatchSpec,
)
from homespun.protocol.tasks import GroupSpec
from homespun.protocol.views import Event, ReleaseView, Stored, TaskView
from homespun.server.releases import ReleaseDesk
from tests.fleet.device import POPULATION
from tests.fleet.served import PATH, Model, Serving, fetch, follow, serve, show, take_part

GOOD, BETTER, WORSE = Model(0.5), Model(0.6), Model(0.4)
CRASHES, SLOW = Model(0.6, fails=True), Model(0.6, latency_s=0.09)
DAY_S = 86_400.0


def reports(goal: int, aggregation: Aggregation = Aggregation.PLAIN, **fields) -> Reports:
    return Reports(
        goal=goal,
        minimum=goal,
        min_group=3,
        groups=GroupSpec(size=10, step_s=30.0),
        over_selection=1.0,
        pool_target=1,
        criteria=Criteria(requires=(), **fields),
        aggregation=aggregation,
    )


def terms(aggregation: Aggregation = Aggregation.PLAIN, **fields):
    """A release among 40 devices: two stages, wide margins, since so few can tell so little."""
    return {
        "evaluation": EvaluationSpec(reports=reports(10, aggregation)),
        "stages": (Stage(fraction=0.25, soak_s=DAY_S), Stage(fraction=0.5, soak_s=DAY_S)),
        "watch": WatchSpec(
            primary=0.5, latency_s=0.06, failed=0.75, reports=reports(10, aggregation)
        ),
        **fields,
    }


@pytest.fixture
def shipped(make_world):
    """Devices that serve checkpoint 0; hashes of the plan and of checkpoints 0 to 4."""
    world = make_world(40)
    plan = world.push_plan().hash
    checkpoints = [world.push_checkpoint(plan, seed).hash for seed in range(5)]
    models = dict(zip(checkpoints, (GOOD, BETTER, WORSE, CRASHES, SLOW), strict=True))
    devices = serve(world, models)
    assert world.release(plan, checkpoints[0], "1").state == "deployed"
    fetch(world, devices)
    return world, plan, checkpoints, devices


def serving(devices: list[Serving]) -> set[str]:
    return {device.active.version for device in devices if device.active is not None}


def states(view: ReleaseView) -> list[str]:
    return [str(step.state) for step in view.steps]


def active_tasks(world) -> list[str]:
    return [
        t.spec.name for t in world.operate(list[TaskView], "GET", "/tasks") if t.state == "active"
    ]


# --- From a checkpoint to every device ----------------------------------------------------------------


def test_the_first_release_needs_no_evidence(shipped):
    world, plan, checkpoints, devices = shipped
    manifest = devices[0].manifest()
    assert (manifest.sequence, manifest.checkpoint, manifest.plan_hash) == (1, checkpoints[0], plan)
    assert (manifest.fraction, manifest.control) == (1.0, 0.0)
    assert devices[0].check_in().releases == (ReleaseNotice(slot="default", sequence=1),)
    (view,) = world.operate(list[ReleaseView], "GET", "/releases")
    assert view.reason == "the first release of its slot"
    assert states(show(world, view)) == ["checked", "evaluating", "passed", "deployed"]


def test_a_good_candidate_reaches_every_device_by_stages(shipped, aggregation):
    world, plan, (_, better, *_), devices = shipped
    release = world.release(plan, better, "2", **terms(aggregation))
    assert release.state == "evaluating"
    canary = follow(world, devices, release, {"canary"})
    assert canary.evidence is not None
    assert canary.evidence.difference.verdict is Verdict.PASS
    assert canary.evidence.difference.low > 0
    assert canary.evidence.wins > canary.evidence.num_devices / 2
    assert (canary.evidence.metric, canary.sequence, canary.fraction) == ("accuracy", 2, 0.25)
    assert serving(devices) == {"1", "2"}
    assert active_tasks(world) == [f"watch-{release.release_id}"]
    ramp = follow(world, devices, release, {"ramp"})
    assert ramp.since - canary.since >= DAY_S
    members = {device.index for device in devices if device.active.version == "2"}
    end = follow(world, devices, release, {"deployed"})
    assert serving(devices) == {"2"}
    assert 0 < len(members) < 40
    assert states(end)[-4:] == ["passed", "canary", "ramp", "deployed"]
    older = world.operate(list[ReleaseView], "GET", "/releases")[0]
    assert (older.state, active_tasks(world)) == ("superseded", [])
    # Every promotion points to its evidence.
    for step in end.steps:
        if step.state in ("passed", "ramp", "deployed"):
            assert {found.verdict for found in step.findings} == {Verdict.PASS}
    assert [found.name for found in end.steps[-1].findings] == ["primary", "latency", "failed"]


def test_a_worse_candidate_is_rejected_and_nothing_changes(shipped, aggregation):
    world, plan, (_, _, worse, *_), devices = shipped
    release = world.release(plan, worse, "2", **terms(aggregation))
    view = follow(world, devices, release, {"rejected", "passed", "canary"})
    assert (view.state, view.reason, view.sequence) == (
        "rejected",
        "worse than the incumbent",
        None,
    )
    assert view.evidence is not None
    assert view.evidence.difference.high < 0
    assert serving(devices) == {"1"}
    assert active_tasks(world) == []


def test_what_cannot_be_told_apart_is_rejected_in_the_end(shipped):
    world, plan, (good, *_), devices = shipped
    few = EvaluationSpec(most=20, reports=reports(10))
    release = world.release(plan, good, "2", **terms(evaluation=few))
    view = follow(world, devices, release, {"rejected", "canary"})
    assert (view.state, view.reason) == ("rejected", "not shown to be better, on 20 devices")
    lenient = EvaluationSpec(margin=0.08, most=40, reports=reports(10))
    again = world.release(plan, good, "3", **terms(evaluation=lenient))
    view = follow(world, devices, again, {"rejected", "canary"})
    assert (view.state, view.steps[2].reason) == ("canary", "at most 0.08 worse than the incumbent")


@pytest.mark.parametrize(("which", "name"), [(3, "failed"), (4, "latency")])
def test_a_candidate_that_fails_in_canary_is_taken_back_everywhere(shipped, which, name):
    world, plan, checkpoints, devices = shipped
    stages = (Stage(fraction=0.5, soak_s=DAY_S),)
    release = world.release(plan, checkpoints[which], "2", **terms(stages=stages))
    follow(world, devices, release, {"canary"})
    started = world.clock.now()
    view = follow(world, devices, release, {"rolled_back", "deployed"})
    assert (view.state, view.reason) == ("rolled_back", f"worse than the control band: {name}")
    assert world.clock.now() - started < DAY_S  # nobody waits for the soak
    assert serving(devices) == {"1"}
    newest = devices[0].manifest()
    assert (newest.sequence, newest.version, newest.fraction) == (3, "1", 1.0)
    rolled = [s for s in view.steps if s.state == "rolling_back"]
    assert Verdict.REJECT in {found.verdict for found in rolled[0].findings}
    assert active_tasks(world) == []
    # The slot is free again.
    assert world.release(plan, checkpoints[1], "3", **terms()).state == "evaluating"


def test_without_stages_it_is_deployed_at_once(shipped):
    world, plan, (_, better, *_), devices = shipped
    release = world.release(plan, better, "2", **terms(stages=()))
    view = follow(world, devices, release, {"deployed"})
    assert states(view)[-2:] == ["passed", "deployed"]
    assert serving(devices) == {"2"}


def test_a_device_that_joins_during_a_canary_serves_what_the_others_do(shipped):
    world, plan, (_, better, *_), devices = shipped
    release = world.release(plan, better, "2", **terms())
    follow(world, devices, release, {"canary"})
    late = [Serving(world, 100 + index, devices[0].models) for index in range(20)]
    token = world.token()
    for device in late:
        device.enroll(token)
        device.fetch()
    for device in late:
        assert device.newest is not None
        assert device.active is not None
        inside = device.place(device.newest) < 0.25
        assert device.active.version == ("2" if inside else "1")
    assert serving(late) == {"1", "2"}


def test_nothing_is_said_of_fewer_devices_than_are_ever_summed(shipped):
    world, plan, (_, better, *_), devices = shipped
    few = WatchSpec(reports=reports(4))
    stages = (Stage(fraction=0.5, soak_s=DAY_S),)
    release = world.release(plan, better, "2", **terms(watch=few, stages=stages))
    follow(world, devices, release, {"canary"})
    fetch(world, devices)
    task = world.operate(list[TaskView], "GET", "/tasks")[-1]
    for device in devices:
        device.watching = task.spec.watch
    stage = [d for d in devices if d.arm(task.spec.watch) == "stage"]
    control = [d for d in devices if d.arm(task.spec.watch) == "control"]
    world.report(task, world.gather(task, devices=[*stage[:3], control[0]]))
    (summary, *_) = world.rounds(task)
    assert summary.metrics.keys() == {name for name in watched_names() if name.startswith("stage")}
    assert summary.metrics["stage.primary"].count == 3
    for found in show(world, release).findings:
        assert (found.reported.num_devices, found.control) == (3, Reported())


def test_reports_that_cannot_be_hold_a_release_until_a_person_looks(shipped):
    world, plan, (_, better, *_), devices = shipped
    for device in devices:
        device.clips = False
        device.models[better] = Model(0.95)
    release = world.release(plan, better, "2", **terms())
    view = follow(world, devices, release, {"held", "canary"})
    assert (view.state, view.held_from, view.evidence) == ("held", "evaluating", None)
    assert "clipped" not in view.reason
    assert view.reason.startswith("its reports cannot be used: no reports within the bounds")
    assert operate(world, release, "roll-back").state == "rolled_back"


def test_what_another_plan_runs_cannot_be_compared(shipped):
    world, *_ = shipped
    other = world.plan.with_settings(clip_norm=1.0)
    stored = world.operate(Stored, "POST", "/plans", other.to_bytes()).hash
    newer = world.push_checkpoint(stored, 9).hash
    with pytest.raises(InvalidConfig, match="another plan"):
        world.release(stored, newer, "2", **terms())
    assert world.release(stored, newer, "1", slot="another").state == "deployed"


# --- What people do -----------------------------------------------------------------------------------


def operate(world, release: ReleaseView, verb: str) -> ReleaseView:
    view: ReleaseView = world.operate(ReleaseView, "POST", f"/releases/{release.release_id}/{verb}")
    return view


def test_a_person_holds_and_resumes(shipped):
    world, plan, (_, better, *_), devices = shipped
    release = world.release(plan, better, "2", **terms())
    assert operate(world, release, "hold").held_from == "evaluating"
    assert active_tasks(world) == []
    with pytest.raises(Conflict, match="on its way"):
        world.release(plan, better, "3", **terms())
    assert operate(world, release, "hold").state == "held"  # again: nothing happens
    assert operate(world, release, "resume").state == "evaluating"
    follow(world, devices, release, {"canary"})
    held = operate(world, release, "hold")
    assert (held.state, held.held_from, held.reason) == ("held", "canary", "a person held it")
    before = devices[0].manifest().sequence
    world.pass_time(10 * DAY_S)
    assert (show(world, release).state, active_tasks(world)) == ("held", [])
    resumed = operate(world, release, "resume")
    assert (resumed.state, resumed.since) == ("canary", world.clock.now())  # it soaks again
    assert devices[0].manifest().sequence == before
    assert follow(world, devices, release, {"deployed"}).state == "deployed"
    assert serving(devices) == {"2"}
    with pytest.raises(Conflict, match="not held"):
        operate(world, release, "resume")


def test_a_person_takes_a_release_back(shipped):
    world, plan, (_, better, *_), devices = shipped
    release = world.release(plan, better, "2", **terms())
    follow(world, devices, release, {"deployed"})
    view = operate(world, release, "roll-back")
    assert (view.state, view.reason) == ("rolled_back", "a person took it back")
    assert operate(world, release, "roll-back").state == "rolled_back"
    fetch(world, devices)
    assert serving(devices) == {"1"}
    assert world.operate(list[ReleaseView], "GET", "/releases")[0].state == "deployed"


def test_a_held_release_is_taken_back(shipped):
    world, plan, (_, better, *_), devices = shipped
    release = world.release(plan, better, "2", **terms())
    follow(world, devices, release, {"canary"})
    operate(world, release, "hold")
    assert operate(world, release, "roll-back").state == "rolled_back"
    fetch(world, devices)
    assert serving(devices) == {"1"}
    early = world.release(plan, better, "3", **terms())
    assert operate(world, early, "roll-back").state == "rolled_back"
    assert (
        devices[0].manifest().sequence == 3
    )  # it was never published, so nothing had to be taken back


@pytest.mark.parametrize("verb", ["hold", "roll-back"])
def test_a_watch_that_runs_meanwhile_is_cancelled_and_counts_for_nothing(
    shipped, aggregation, verb
):
    """Its devices hear that nobody waits for them; what some had reported is forgotten."""
    world, plan, (_, better, *_), devices = shipped
    release = world.release(plan, better, "2", **terms(aggregation))
    follow(world, devices, release, {"canary"})
    fetch(world, devices)
    (watch,) = (t for t in world.operate(list[TaskView], "GET", "/tasks") if t.spec.watch)
    pool = [device for device in devices if device.may_join(watch)]
    for device in pool:
        device.watching = watch.spec.watch
    cohort = world.gather(watch, 1, devices=pool)
    assert len(cohort) == 10
    if aggregation is Aggregation.PLAIN:
        world.report(watch, cohort[:9])  # one is missing
        assert world.rounds(watch)[0].num_reported == 9
    view = operate(world, release, verb)
    assert (view.state, active_tasks(world)) == ("held" if verb == "hold" else "rolled_back", [])
    assert [summary.state for summary in world.rounds(watch)] == ["cancelled"]
    for device, assigned in cohort:
        receipt = device.receipt(assigned)
        assert (receipt.state, receipt.reason) == ("void", "the task was stopped")
    assert all(found.reported.num_devices == 0 for found in view.findings)
    fetch(world, devices)
    if verb == "roll-back":
        assert serving(devices) == {"1"}
        return
    assert serving(devices) == {"1", "2"}
    assert operate(world, release, "resume").state == "canary"
    assert follow(world, devices, release, {"deployed"}).state == "deployed"
    assert serving(devices) == {"2"}


def test_a_release_draws_as_many_as_it_takes(shipped):
    """Its tasks need not say how many are drawn for a report: that is measured, as for any other task."""
    world, plan, (_, better, *_), devices = shipped
    asked = msgspec.structs.replace(reports(10, Aggregation.SECURE), over_selection=None)
    fields = terms() | {"evaluation": EvaluationSpec(reports=asked)}
    release = world.release(plan, better, "2", **fields)
    (task,) = (t for t in world.operate(list[TaskView], "GET", "/tasks") if t.state == "active")
    assert task.spec.over_selection is None
    assert take_part(world, devices)
    assert world.rounds(task)[0].num_assigned == 20  # as long as nothing is known
    assert world.rounds(task)[0].num_reported == 10
    assert follow(world, devices, release, {"canary"}).state == "canary"


def test_the_first_release_has_nothing_to_go_back_to(shipped):
    world, plan, (_, better, *_), devices = shipped
    (first,) = world.operate(list[ReleaseView], "GET", "/releases")
    view = operate(world, first, "roll-back")
    assert (view.state, view.held_from) == ("held", "deployed")
    assert "nothing to go back to" in view.reason
    assert devices[0].manifest(f"{PATH}/deployed").version == "1"
    assert operate(world, first, "resume").state == "deployed"
    release = world.release(plan, better, "2", **terms())
    for verb in ("hold", "roll-back"):
        with pytest.raises(Conflict, match="on its way"):
            operate(world, first, verb)
    assert release.state == "evaluating"


def test_a_release_whose_own_task_is_stopped_is_held(shipped):
    world, plan, (_, better, *_), devices = shipped
    release = world.release(plan, better, "2", **terms())
    follow(world, devices, release, {"canary"})
    (task,) = (t for t in world.operate(list[TaskView], "GET", "/tasks") if t.state == "active")
    world.operate(dict, "POST", f"/tasks/{task.task_id}/stop")
    world.settle()
    view = show(world, release)
    assert view.state == "held"
    assert view.reason == f"its task watch-{release.release_id} was stopped"


class Operator(OperatorClient):
    """The command line's client in this world, where devices live while it waits for events."""

    def __init__(self, world, devices):
        self.url, self._world, self._devices = "http://homespun", world, devices
        token = world.deployment.keys.operator_token
        self._http = httpx.Client(
            transport=world.transport,
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
        )

    def events(self, after: int, wait_s: float) -> list[Event]:
        if not take_part(self._world, self._devices):
            self._world.pass_time(6 * 3600.0)
        return super().events(after, 0.0)


def test_the_command_line_follows_a_release(shipped):
    world, plan, (_, better, *_), devices = shipped
    release = world.release(plan, better, "2", **terms())
    steps = [step for _, step in follow_release(Operator(world, devices), release.release_id)]
    assert [str(step.state) for step in steps] == [
        "checked", "evaluating", "passed", "canary", "ramp", "deployed",
    ]  # fmt: skip
    assert steps == list(show(world, release).steps)


def test_the_command_line_evaluates_until_it_is_decided(shipped):
    world, plan, (good, better, *_), devices = shipped
    asked = msgspec.convert(
        {"population": POPULATION, "slot": "default", "plan_hash": plan, "checkpoint": better,
         "version": "x", **terms()}, ReleaseRequest,
    )  # fmt: skip
    client = Operator(world, devices)
    task = client.create_task(asked.evaluation_task("compare", good))
    found = list(follow_evaluation(client, task.task_id, asked.evaluation, asked.alpha))
    assert [each.reported.num_devices for each in found] == [10, 20]
    assert [each.verdict for each in found] == [Verdict.CONTINUE, Verdict.PASS]
    assert client.task(task.task_id).state == "stopped"


# --- What must hold -----------------------------------------------------------------------------------


class KilledError(Exception):
    """The process is gone."""


def test_the_server_dies_after_every_step(shipped, monkeypatch):
    world, plan, (_, better, *_), devices = shipped
    step, deaths = ReleaseDesk.step, []

    def dying(desk, release, now):
        moved = step(desk, release, now)
        if moved is not None:
            deaths.append(moved.state)
            raise KilledError
        return moved

    def live():
        """Until nothing is due any more, each life long enough for one step."""
        while True:
            try:
                return world.settle()
            except KilledError:
                world.crash()
                with suppress(KilledError):
                    world.start()

    monkeypatch.setattr(ReleaseDesk, "step", dying)
    request = msgspec.convert(
        {"population": POPULATION, "slot": "default", "plan_hash": plan, "checkpoint": better,
         "version": "2", **terms()}, ReleaseRequest,
    )  # fmt: skip
    with pytest.raises(KilledError):
        world.deployment.desk.create(request, world.clock.now())
    live()
    for _ in range(40):
        with suppress(KilledError):
            if not take_part(world, devices):
                world.clock.advance(6 * 3600.0)
        live()
        if deaths[-1] == "deployed":
            break
    assert deaths == ["checked", "evaluating", "passed", "canary", "ramp", "deployed"]
    release = world.operate(list[ReleaseView], "GET", "/releases")[-1]
    assert states(show(world, release)) == [*deaths]
    assert (release.sequence, release.fraction) == (4, 1.0)  # 2 and 3 were the stages
    fetch(world, devices)
    assert serving(devices) == {"2"}
    assert active_tasks(world) == []


def test_no_device_reports_twice_and_none_that_trained_judges(make_world):
    world = make_world(12)
    plan = world.push_plan().hash
    first = world.push_checkpoint(plan).hash
    assert world.release(plan, first, "1").state == "deployed"
    low, high = Bucket(salt="s", high=0.5), Bucket(salt="s", low=0.5)
    task = world.create_task(criteria=Criteria(requires=(), bucket=low), goal=3)
    world.run_round(task)
    head = world.task(task).head
    judged = EvaluationSpec(reports=reports(3, bucket=low))
    with pytest.raises(InvalidConfig, match="would judge it"):
        world.release(plan, head, "2", **terms(evaluation=judged))
    release = world.release(plan, head, "2", **terms(evaluation=EvaluationSpec(reports=reports(3))))
    assert release.request.evaluation.reports.criteria.bucket == high
    (evaluation,) = (
        t for t in world.operate(list[TaskView], "GET", "/tasks") if t.spec.kind == "evaluate"
    )
    assert evaluation.spec.criteria.min_separation_rounds == evaluation.spec.num_rounds
    assert evaluation.spec.difference_clip == 0.1


def test_an_evaluation_of_the_operators_own_is_judged_by_the_same_gate(shipped):
    world, plan, (good, better, worse, *_), _ = shipped
    names = iter("abcd")

    def evaluated(*checkpoints):
        task = world.create_task(
            TaskKind.EVALUATE, plan_hash=plan, checkpoints=checkpoints, goal=40, name=next(names)
        )
        return task, {"evaluation_task_id": task.task_id, **terms(stages=())}

    task, fields = evaluated(better, good)
    release = world.release(plan, better, "2", **fields)
    assert release.state == "evaluating"
    assert world.release(plan, better, "2", **fields).release_id == release.release_id
    world.run_round(task)
    assert show(world, release).state == "deployed"
    task, fields = evaluated(worse, better)
    world.run_round(task)
    view = world.release(plan, worse, "3", **fields)
    assert (view.state, view.reason) == ("rejected", "worse than the incumbent")
    task, fields = evaluated(worse, better)
    stopped = world.release(plan, worse, "4", **fields)
    world.operate(dict, "POST", f"/tasks/{task.task_id}/stop")
    world.settle()
    view = show(world, stopped)
    assert (view.state, view.reason) == ("rejected", f"its task {task.spec.name} was stopped")
    _, fields = evaluated(worse, good)
    with pytest.raises(InvalidConfig, match="another model than the one that is served"):
        world.release(plan, worse, "5", **fields)


def test_named_evidence_must_be_about_this_release(shipped):
    world, plan, (good, better, worse, *_), _ = shipped

    def named(kind, *checkpoints):
        fields = {"plan_hash": plan, "checkpoints": checkpoints, "goal": 5}
        return {
            "evaluation_task_id": world.create_task(
                kind, **fields, name=f"t{len(checkpoints)}-{kind}"
            ).task_id
        }

    with pytest.raises(InvalidConfig, match="did not evaluate"):
        world.release(plan, worse, "2", **named(TaskKind.EVALUATE, better, good))
    with pytest.raises(InvalidConfig, match="compares with nothing"):
        world.release(plan, better, "2", **named(TaskKind.EVALUATE, better))
    with pytest.raises(InvalidConfig, match="no evaluation"):
        world.release(plan, better, "2", **named(TaskKind.TRAIN, better))
    with pytest.raises(NotFound):
        world.release(plan, better, "2", evaluation_task_id="0" * 32)


def test_what_does_not_fit_a_device_is_rejected_before_anybody_is_asked(shipped):
    world, plan, (_, better, *_), _ = shipped
    view = world.release(plan, better, "2", limits={"max_size_bytes": 100})
    assert view.state == "rejected"
    assert "100 are allowed" in view.reason
    slow = {"runtime": "test", "latency_s": 0.2}
    view = world.release(plan, better, "3", trial=slow)
    assert (view.state, "200.0 ms with test" in view.reason) == ("rejected", True)


def test_a_version_means_one_thing(shipped):
    world, plan, (good, better, *_), _ = shipped
    assert world.release(plan, good, "1").sequence == 1  # repeating it changes nothing
    again = [world.release(plan, better, "2", **terms()) for _ in range(2)]
    assert again[0] == again[1]
    operate(world, again[0], "roll-back")
    assert world.release(plan, better, "2", **terms()).state == "rolled_back"
    with pytest.raises(Conflict, match="version 1"):
        world.release(plan, better, "1")
    with pytest.raises(NotFound, match="checkpoint"):
        world.release(plan, "9" * 64, "3", slot="fresh")


def test_requests_and_the_scheduler_may_look_at_once(make_world):
    world = make_world(0)
    plan = world.push_plan().hash
    checkpoint = world.push_checkpoint(plan, 0).hash
    desk, start = world.deployment.desk, threading.Barrier(4)

    def ask(slot):
        start.wait()
        return desk.create(
            ReleaseRequest(
                population=POPULATION, slot=slot, version="1", plan_hash=plan, checkpoint=checkpoint
            ),
            world.clock.now(),
        ).state

    with ThreadPoolExecutor(4) as pool:
        for number in range(10):
            assert list(pool.map(ask, [f"slot{number}"] * 4)) == ["deployed"] * 4


def test_nothing_released_yet(make_world):
    world = make_world(1)
    (device,) = serve(world, {})
    for path in (PATH, f"{PATH}/deployed"):
        with pytest.raises(NotFound):
            device.manifest(path)
