"""The release desk: takes a checkpoint to what devices serve, every step with its reason and its evidence.

    TRAINED -> CHECKED -> EVALUATING -> PASSED -> CANARY -> RAMP -> DEPLOYED (its predecessor SUPERSEDED)

It creates the tasks that ask the devices, looks at the sums after every round, and does what `protocol.release.due`
says, one transaction a step; so it can be killed anywhere and goes on from there. The first release of a slot has
nothing to be compared with: it is checked and deployed.
"""

from __future__ import annotations

import secrets

import msgspec
import structlog

from homespun.errors import (
    Conflict,
    HomespunError,
    InvalidConfig,
    NumericFailure,
    PlanError,
    ShapeMismatch,
    TooLarge,
)
from homespun.learning.evidence import Verdict
from homespun.protocol.messages import TaskKind, encode
from homespun.protocol.release import (
    RELEASE,
    Finding,
    ReleaseEvent,
    ReleaseState,
    Situation,
    due,
    evaluation_gate,
    guardrail_gates,
    judge_evaluation,
    judge_stage,
)
from homespun.protocol.release_request import (
    ReleaseRequest,
    disjoint,
    left_out,
)
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import Evidence, ReleaseView, TaskState
from homespun.server.aggregation import chain, contribution_codec
from homespun.server.keys import Keys
from homespun.server.library import Library
from homespun.server.notify import population_topic, round_topic
from homespun.server.store import Store
from homespun.server.store.records import NewTask, ReleaseRecord, TaskRecord
from homespun.server.store.releases import resuming

log = structlog.get_logger()

S, E = ReleaseState, ReleaseEvent
_UNFIT = (PlanError, ShapeMismatch, NumericFailure, TooLarge)


class ReleaseDesk:
    """Takes requests and moves releases as far as they can go now."""

    def __init__(self, store: Store, library: Library, keys: Keys) -> None:
        self._store = store
        self._library = library
        self._keys = keys

    # --- what people ask --------------------------------------------------------------------------

    def create(self, request: ReleaseRequest, now: float) -> ReleaseRecord:
        """Begin a release and take it as far as it goes.

        Raises `NotFound`, `Conflict`, or `InvalidConfig` when it could never be compared with what is served.
        """
        request.validate()
        request = self._with_bucket(request)
        if not self._store.releases.has(request.population, request.slot, request.version):
            self._check_questions(request)
        release = self._store.releases.add(request, secrets.token_hex(16), now)
        return self._advance(release, now)

    def hold(self, release_id: str, now: float, reason: str = "") -> ReleaseRecord:
        """Stop a release where it is; devices keep what they serve. Idempotent."""
        release = self._store.releases.get(release_id)
        if release.state is S.HELD:
            return release
        return self._move(release, E.HOLD, now, reason or "a person held it")

    def resume(self, release_id: str, now: float) -> ReleaseRecord:
        """Go on where it was held; its soak time begins again. Raises `Conflict` when it is not held."""
        release = self._store.releases.get(release_id)
        moved = self._move(release, resuming(release), now, "a person resumed it")
        return self._advance(moved, now)

    def roll_back(self, release_id: str, now: float, reason: str = "") -> ReleaseRecord:
        """Take a release back: devices return to what they served before. Idempotent.

        The first release of a slot has nothing before it: it is held instead, and says so.
        """
        release = self._store.releases.get(release_id)
        if release.state in (S.ROLLING_BACK, S.ROLLED_BACK):
            return self._advance(release, now)
        if release.sequence is not None and release.incumbent_id is None:
            why = "there is nothing to go back to: it is the first release of its slot"
            return self.hold(release_id, now, why)
        reason = reason or "a person took it back"
        if release.state in (S.CHECKED, S.EVALUATING, S.PASSED):  # no device serves it yet
            release = self._move(release, E.HOLD, now, reason)
        moved = self._move(release, E.ROLL_BACK, now, reason)
        return self._advance(moved, now)

    def view(self, release_id: str) -> ReleaseView:
        """A release with all that is known about it."""
        release, steps = self._store.releases.history(release_id)
        view = msgspec.structs.replace(release.view, steps=steps)
        try:
            evidence, findings = self._evidence(release), self._guardrails(release)
        except NumericFailure:  # which is why it is held
            return view
        return msgspec.structs.replace(view, evidence=evidence, findings=findings)

    # --- what is due ------------------------------------------------------------------------------

    def advance(self, now: float) -> list[ReleaseRecord]:
        """Move every release that is on its way; those that moved."""
        moved = []
        for release in self._store.releases.on_the_way():
            try:
                after = self._advance(release, now)
            except HomespunError as error:  # the others go on
                log.warning("a release cannot go on", id=release.release_id, reason=str(error))
                continue
            if after != release:
                moved.append(after)
        return moved

    def _advance(self, release: ReleaseRecord, now: float) -> ReleaseRecord:
        while True:
            try:
                moved = self.step(release, now)
            except Conflict:
                latest = self._store.releases.get(release.release_id)
                if latest == release:
                    raise
                release = latest  # the scheduler and a request look at once: go on from there
                continue
            if moved is None:
                return release
            release = moved

    def step(self, release: ReleaseRecord, now: float) -> ReleaseRecord | None:
        """One row of the release table, or None: it waits, or is at an end."""
        if release.state is S.TRAINED:
            reason = self._unfit(release.request)
            return self._move(release, E.REJECT if reason else E.CHECK, now, reason)
        try:
            findings = self._findings(release)
        except NumericFailure as error:
            return self._move(release, E.HOLD, now, f"its reports cannot be used: {error.message}")
        situation = Situation(
            state=release.state,
            request=release.request,
            has_incumbent=release.incumbent_id is not None,
            stage=release.stage,
            since=release.since,
            findings=findings,
        )
        event = due(situation, now)
        if event is not None:
            return self._move(release, event, now, _reason(event, release, findings), findings)
        return self._without_task(release, findings, now)

    def _move(
        self,
        release: ReleaseRecord,
        event: ReleaseEvent,
        now: float,
        reason: str = "",
        findings: tuple[Finding, ...] = (),
    ) -> ReleaseRecord:
        spec, task = release.task(RELEASE.next(release.state, event)), None
        if spec is not None:
            task = NewTask(secrets.token_hex(16), spec, chain(None, spec.checkpoints[0], 0))
        moved = self._store.releases.move(
            release,
            event,
            now,
            self._keys.sign_release,
            reason=reason,
            findings=findings,
            task=task,
        )
        log.info(
            "release",
            population=moved.request.population,
            slot=moved.request.slot,
            version=moved.request.version,
            state=str(moved.state),
            fraction=moved.fraction,
            reason=reason,
        )
        return moved

    def _without_task(
        self, release: ReleaseRecord, findings: tuple[Finding, ...], now: float
    ) -> ReleaseRecord | None:
        """What becomes of a release whose question is open when nobody is asked any more."""
        asking = self._asking(release)
        if not asking or asking[-1].state is TaskState.ACTIVE:
            return None
        task = asking[-1]
        if task.state is not TaskState.FINISHED:
            reason = f"its task {task.spec.name} was {task.state}"
            reason += f": {task.reason}" if task.reason else ""
            own = release.request.evaluation_task_id != task.task_id
            return self._move(release, E.HOLD if own else E.REJECT, now, reason)
        if findings and all(found.verdict is Verdict.PASS for found in findings):
            return None  # it soaks
        event = E.REJECT if release.state is S.EVALUATING else E.ROLL_BACK
        return self._move(release, event, now, _reason(event, release, findings), findings)

    def topics(self, release: ReleaseRecord) -> set[str]:
        """Who waits for what a release does: its population, and those who were to take part in its tasks."""
        return {
            population_topic(release.request.population),
            *(
                round_topic(task.task_id, task.rounds_committed + 1)
                for task in self._store.releases.tasks(release)
            ),
        }

    # --- what is known ----------------------------------------------------------------------------

    def _asking(self, release: ReleaseRecord) -> list[TaskRecord]:
        """The tasks that put the question of the state it is in, the last one last."""
        match release.state:
            case S.EVALUATING:
                return self._evaluations(release)
            case S.CANARY | S.RAMP:
                return self._store.releases.tasks(release, release.watch_name)
            case _:
                return []

    def _findings(self, release: ReleaseRecord) -> tuple[Finding, ...]:
        """The answers to the question of the state it is in. Raises `NumericFailure`."""
        asking = self._asking(release)
        if release.state is S.EVALUATING and asking:
            named = release.request.evaluation_task_id is not None
            if named and asking[0].state is TaskState.ACTIVE:
                return ()  # an operator's task is judged when it is over
            evidence = self._evidence(release)
            return () if evidence is None else (evidence.difference,)
        return self._guardrails(release) if asking else ()

    def _evaluations(self, release: ReleaseRecord) -> list[TaskRecord]:
        named = release.request.evaluation_task_id
        if named is not None:
            return [self._store.tasks.get(named)]
        return self._store.releases.tasks(release, release.evaluation_name)

    def _guardrails(self, release: ReleaseRecord) -> tuple[Finding, ...]:
        tasks = self._store.releases.tasks(release, release.watch_name)
        if not tasks:
            return ()
        metrics = self._store.releases.metrics(task.task_id for task in tasks)
        return judge_stage(guardrail_gates(release.request), metrics)

    def _evidence(self, release: ReleaseRecord) -> Evidence | None:
        tasks = self._evaluations(release)
        if not tasks:
            return None
        metrics = self._store.releases.metrics(task.task_id for task in tasks)
        if not metrics:
            return None
        spec = msgspec.structs.replace(
            release.request.evaluation, clip=tasks[-1].spec.difference_clip
        )
        primary = self._library.manifest(release.request.plan_hash).metrics[0]
        difference = judge_evaluation(evaluation_gate(spec, release.request.alpha), metrics)
        return Evidence(
            task_id=tasks[-1].task_id,
            metric=primary,
            num_devices=difference.reported.num_devices,
            wins=round(metrics["wins"].sum),
            candidate=metrics[f"0.{primary}"].mean,
            incumbent=metrics[f"1.{primary}"].mean,
            difference=difference,
        )

    # --- what is checked before anybody is asked ------------------------------------------------------

    def _unfit(self, request: ReleaseRequest) -> str:
        """Why this model could not be served anywhere; empty if it could."""
        try:
            size = self._library.check(request.plan_hash, request.checkpoint)
        except _UNFIT as error:
            return error.message
        limits, trial = request.limits, request.trial
        if size > limits.max_size_bytes:
            return f"plan and checkpoint have {size} bytes, {limits.max_size_bytes} are allowed"
        if trial is not None and trial.latency_s > limits.max_latency_s:
            return (
                f"a prediction took {1000 * trial.latency_s:.1f} ms with {trial.runtime}, "
                f"{1000 * limits.max_latency_s:.1f} ms are allowed"
            )
        return ""

    def _with_bucket(self, request: ReleaseRequest) -> ReleaseRequest:
        """Evaluate on the devices that the training left out, if nothing else is said and they are one bucket."""
        criteria = request.evaluation.reports.criteria
        trained = {task.criteria.bucket for task in self._trainings(request)}
        if criteria.bucket is not None or len(trained) != 1:
            return request
        replace = msgspec.structs.replace
        rest = replace(criteria, bucket=left_out(*trained))
        reports = replace(request.evaluation.reports, criteria=rest)
        return replace(request, evaluation=replace(request.evaluation, reports=reports))

    def _trainings(self, request: ReleaseRequest) -> list[TaskSpec]:
        return self._store.catalogue.trained_by(request.checkpoint)

    def _check_questions(self, request: ReleaseRequest) -> None:
        """Raise `InvalidConfig` unless the devices can be asked all that this release will want to know."""
        manifest = self._library.manifest(request.plan_hash)
        incumbent = self._store.releases.deployed(request.population, request.slot)
        if incumbent is None:
            return
        compared = request.evaluation_task("evaluation", incumbent.request.checkpoint)
        if request.evaluation_task_id is not None:
            compared = self._store.tasks.get(request.evaluation_task_id).spec
            _check_named(compared, request, incumbent)
        for spec in (compared, request.watch_task("watch", "0")):
            spec.validate()
            contribution_codec(spec, manifest, 1, 1)
        evaluation_gate(request.evaluation, request.alpha)
        guardrail_gates(request)
        for training in self._trainings(request):
            if not disjoint(training.criteria.bucket, compared.criteria.bucket):
                raise InvalidConfig(
                    f"devices that trained the candidate in {training.name} would judge it",
                    hint="train and evaluate on disjoint buckets of one salt (criteria.bucket)",
                    expected="disjoint buckets",
                    got=encode((training.criteria.bucket, compared.criteria.bucket)).decode(),
                )


def _check_named(spec: TaskSpec, request: ReleaseRequest, incumbent: ReleaseRecord) -> None:
    """Raise `InvalidConfig` unless an operator's task compares this candidate with this incumbent."""
    if spec.kind is not TaskKind.EVALUATE or spec.population != request.population:
        raise InvalidConfig(f"task {spec.name} is no evaluation on population {request.population}")
    if spec.plan_hash != request.plan_hash or spec.checkpoints[0] != request.checkpoint:
        raise InvalidConfig(
            f"task {spec.name} did not evaluate this checkpoint first",
            expected=request.checkpoint,
            got=spec.checkpoints[0],
        )
    if len(spec.checkpoints) < 2:
        raise InvalidConfig(
            f"task {spec.name} compares with nothing", hint="evaluate (candidate, incumbent)"
        )
    if spec.checkpoints[1] != incumbent.request.checkpoint:
        raise InvalidConfig(
            f"task {spec.name} compares with another model than the one that is served",
            expected=incumbent.request.checkpoint,
            got=spec.checkpoints[1],
        )


def _reason(event: ReleaseEvent, release: ReleaseRecord, findings: tuple[Finding, ...]) -> str:
    """Why this step, in one sentence."""
    margin = release.request.evaluation.margin
    aim = f"at most {margin:g} worse" if margin else "better"
    asked = max((found.reported.num_devices for found in findings), default=0)
    worse = [found.name for found in findings if found.is_worse]
    unknown = [f.name for f in findings if f.verdict is not Verdict.PASS and not f.is_worse]
    match event:
        case E.PASS | E.DEPLOY if release.incumbent_id is None:
            return "the first release of its slot"
        case E.PASS:
            return f"{aim} than the incumbent"
        case E.REJECT if worse:
            return "worse than the incumbent"
        case E.REJECT:
            return f"not shown to be {aim}, on {asked} devices"
        case E.ROLL_BACK if worse:
            return f"worse than the control band: {', '.join(worse)}"
        case E.ROLL_BACK:
            return f"not shown to be as good, on {asked} devices: {', '.join(unknown)}"
        case E.START_RAMP | E.DEPLOY if findings:
            return "soaked, all guardrails hold"
        case E.DEPLOY:
            return "without stages"
        case E.ROLLED_BACK:
            return release.reason
        case _:
            return ""
