"""`model evaluate`, `release`, `show`, `hold`, `resume`, `rollback`, `check`: a model on its way to the devices."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import typer

from homespun.cli.client import (
    DataOption,
    JsonOption,
    OperatorClient,
    ServerOption,
    TokenOption,
    connect,
)
from homespun.cli.output import out, percent, print_json
from homespun.cli.trial import compare, try_out
from homespun.errors import InvalidConfig, InvalidInput, NotFound
from homespun.learning.evidence import Verdict
from homespun.learning.metrics import MetricSum
from homespun.plan.package import Plan
from homespun.protocol.messages import encode
from homespun.protocol.release import (
    Finding,
    ReleaseState,
    evaluation_gate,
    judge_evaluation,
)
from homespun.protocol.release_request import (
    EvaluationSpec,
    ReleaseRequest,
    Trial,
)
from homespun.protocol.views import Evidence, ReleaseStep, ReleaseView, TaskState
from homespun.tensors import codec

POLL_S = 20.0
STOPPED = (
    ReleaseState.REJECTED,
    ReleaseState.DEPLOYED,
    ReleaseState.SUPERSEDED,
    ReleaseState.ROLLED_BACK,
    ReleaseState.HELD,
)
"""Where a release stays until a person does something."""
WENT_WRONG = (ReleaseState.REJECTED, ReleaseState.ROLLED_BACK, ReleaseState.HELD)

_LESS_IS_BETTER = ("latency", "failed")

TermsOption = typer.Option(
    None,
    "--terms",
    help="TOML file: evaluation, stages, watch, limits, alpha; see docs/releases.md.",
)
SlotOption = typer.Option("default", help="What the model is for.")


# --- In words -------------------------------------------------------------------------------------------


def describe(view: ReleaseView) -> str:
    """A release in one line."""
    text = f"release {view.version} of {view.checkpoint[:12]}: {view.state}"
    if view.fraction is not None and view.fraction < 1:
        text += f" on {percent(view.fraction)}"
    if view.evidence is not None:
        text += f" ({describe_evidence(view.evidence)})"
    return text + (f": {view.reason}" if view.reason else "")


def describe_evidence(evidence: Evidence) -> str:
    """Evidence in one line."""
    return (
        f"{evidence.metric} {percent(evidence.incumbent)} -> {percent(evidence.candidate)} on "
        f"{evidence.num_devices} other devices, better on {evidence.wins}, paired "
        f"{describe_finding(evidence.difference)}"
    )


def describe_finding(found: Finding) -> str:
    """What is known about one question: mean, interval, what it must be, how it stands.

    Seconds and failures are shown as they are, more being worse.
    """
    scale, unit = (1000, "ms") if found.name == "latency" else (100, "points")
    worse = found.name in _LESS_IS_BETTER
    sign = -1 if worse else 1
    low, high = sorted((sign * found.low, sign * found.high))
    limit = scale * sign * found.gate.at_least
    mean = "nothing yet" if found.mean is None else f"{sign * scale * found.mean:+.1f} {unit}"
    bound = f"{'below' if worse else 'above'} {limit:+.1f}".replace("-0.0", "0.0")
    stands = {Verdict.PASS: "pass", Verdict.CONTINUE: "open", Verdict.REJECT: "fail"}[found.verdict]
    return (
        f"{found.name} {mean} ({scale * low:+.1f} to {scale * high:+.1f}, wanted {bound}): {stands}"
    )


def describe_devices(found: Finding) -> str:
    """Whose reports a finding rests on."""
    if found.control is None:
        return f"{found.reported.num_devices} devices"
    return f"{found.reported.num_devices} devices, {found.control.num_devices} in control"


def describe_step(step: ReleaseStep) -> str:
    """One step in one line, without its findings."""
    at = datetime.fromtimestamp(step.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    reason = f": {step.reason}" if step.reason else ""
    return f"{at}  {step.state}{reason}"


def waits_for(view: ReleaseView) -> str:
    """What a release needs before it goes on; empty where it stays."""
    match view.state:
        case ReleaseState.EVALUATING:
            return "reports of devices that did not train it"
        case ReleaseState.CANARY | ReleaseState.RAMP:
            soaked = view.since + view.request.stages[view.stage].soak_s
            until = datetime.fromtimestamp(soaked, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            unsure = [found.name for found in view.findings if found.verdict is Verdict.CONTINUE]
            return f"its soak time, until {until}" + (
                f", and reports about {', '.join(unsure)}" if unsure else ""
            )
        case ReleaseState.HELD:
            return "a person: homespun model resume, or rollback"
        case _:
            return ""


def print_release(view: ReleaseView) -> None:
    """A release, how it came where it is, and what the devices say."""
    out.print(describe(view), markup=False)
    out.print(f"  {view.release_id} for slot {view.slot} of {view.population}", markup=False)
    for step in view.steps:
        print_step(step)
    if view.findings and view.state in (ReleaseState.CANARY, ReleaseState.RAMP):
        out.print("  now", markup=False)
        print_findings(view.findings)
    if wants := waits_for(view):
        out.print(f"  waits for {wants}", markup=False)


def print_step(step: ReleaseStep) -> None:
    """One step with what was known then."""
    out.print(f"  {describe_step(step)}", markup=False)
    print_findings(step.findings)


def print_findings(findings: tuple[Finding, ...]) -> None:
    """A line for each."""
    for found in findings:
        out.print(f"      {describe_finding(found)}, {describe_devices(found)}", markup=False)


# --- Watching -------------------------------------------------------------------------------------------


def follow_release(
    client: OperatorClient,
    release_id: str,
    poll_s: float = POLL_S,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[ReleaseView, ReleaseStep]]:
    """Every step of a release as it happens, with the release as it is then; ends where the release stays.

    `tick` is called between two looks, at most `poll_s` apart.
    """
    num_seen = sequence = 0
    while True:
        view = client.release(release_id)
        for step in view.steps[num_seen:]:
            yield view, step
        num_seen = len(view.steps)
        if view.state in STOPPED:
            return
        tick()
        events = client.events(after=sequence, wait_s=poll_s)
        sequence = max([sequence, *(event.sequence for event in events)])


def find_release(client: OperatorClient, name: str) -> ReleaseView:
    """The release with this id (its beginning is enough) or version. Raises `NotFound`, `InvalidInput`."""
    views = client.releases()
    found = [v for v in views if v.version == name] or [
        v for v in views if v.release_id.startswith(name)
    ]
    if not found:
        raise NotFound(f"there is no release {name}", hint="list them: homespun model ls")
    if len(found) > 1:
        raise InvalidInput(
            f"{len(found)} releases are called {name}",
            hint="give the release's id: model ls --json",
        )
    return client.release(found[0].release_id)


def read_terms(path: Path | None) -> dict[str, Any]:
    """Fields of a release from a TOML file."""
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} is not TOML: {error}") from error


def read_request(terms: dict[str, Any], **fields: Any) -> ReleaseRequest:
    """A release request. Raises `InvalidConfig` naming the field that is wrong."""
    try:
        request = msgspec.convert({**terms, **fields}, ReleaseRequest)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"release: {error}", hint="see docs/releases.md") from error
    request.validate()
    return request


def try_model(client: OperatorClient, plan_hash: str, checkpoint: str) -> Trial:
    """Run a stored model on this machine."""
    parameters = codec.decode_tree(client.checkpoint(checkpoint))
    return try_out(Plan.read(client.plan(plan_hash)), parameters)


# --- The commands ---------------------------------------------------------------------------------------


def register(model: typer.Typer) -> None:
    """Add them to `model`."""
    model.command("check")(check)
    model.command("evaluate")(evaluate)
    model.command("release")(release)
    model.command("show")(show)
    model.command("hold")(hold)
    model.command("resume")(resume)
    model.command("rollback")(rollback)


def check(
    name: str = typer.Argument(metavar="RELEASE", help="Its version, or the beginning of its id."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Run a release on this machine and compare with the golden predictions that were recorded with it."""
    client = connect(server, operator_token, data)
    view = find_release(client, name)
    trial = try_model(client, view.plan_hash, view.checkpoint)
    golden = view.request.trial
    if golden is not None:
        compare(trial, golden)
    if json:
        print_json(trial)
        return
    same = "no golden predictions were recorded" if golden is None else "predictions as recorded"
    out.print(f"{same}; {1000 * trial.latency_s:.2f} ms with {trial.runtime}", markup=False)


def evaluate(
    population: str,
    plan_hash: str,
    checkpoint: str,
    incumbent: str | None = typer.Option(None, help="Compare with this; default: what is served."),
    slot: str = SlotOption,
    terms: Path | None = TermsOption,
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Compare a candidate with what is served, on devices, until it is decided; nothing is released."""
    client = connect(server, operator_token, data)
    if incumbent is None:
        served = [
            view.checkpoint
            for view in client.releases()
            if (view.population, view.slot) == (population, slot)
            and view.state is ReleaseState.DEPLOYED
        ]
        if not served:
            raise NotFound(f"slot {slot} serves nothing", hint="name another model: --incumbent")
        (incumbent,) = served
    fields = {
        "population": population,
        "slot": slot,
        "plan_hash": plan_hash,
        "version": "candidate",
    }
    request = read_request(read_terms(terms), **fields, checkpoint=checkpoint)
    name = f"evaluate-{checkpoint[:12]}-{incumbent[:12]}"
    task_id = client.create_task(request.evaluation_task(name, incumbent)).task_id
    found = None
    for found in follow_evaluation(client, task_id, request.evaluation, request.alpha):
        if not json:
            out.print(f"{describe_finding(found)}, {describe_devices(found)}", markup=False)
    if json and found is not None:
        print_json({"task_id": task_id, "difference": found})
    if found is None or found.verdict is not Verdict.PASS:
        raise typer.Exit(1)


def follow_evaluation(
    client: OperatorClient, task_id: str, spec: EvaluationSpec, alpha: float
) -> Iterator[Finding]:
    """What is known after every round; the task is stopped when it is decided."""
    gate, seen, sequence = evaluation_gate(spec, alpha), 0, 0
    while True:
        state, totals = client.task(task_id).state, dict[str, MetricSum]()
        committed = [summary for summary in client.rounds(task_id) if summary.metrics]
        for summary in committed:
            for name, value in summary.metrics.items():
                more = MetricSum(value.sum, value.count)
                totals[name] = totals.get(name, MetricSum(0.0, 0.0)) + more
        if len(committed) > seen:
            seen, found = len(committed), judge_evaluation(gate, totals)
            yield found
            if found.verdict is not Verdict.CONTINUE:
                client.stop_task(task_id)
                return
        if state is not TaskState.ACTIVE:
            return
        events = client.events(after=sequence, wait_s=POLL_S)
        sequence = max([sequence, *(event.sequence for event in events)])


def release(
    population: str,
    plan_hash: str,
    checkpoint: str,
    version: str = typer.Option(..., help="A name for people, such as 1.4."),
    slot: str = SlotOption,
    evaluation: str | None = typer.Option(
        None, help="Your own task that compared it with the incumbent; default: the server asks."
    ),
    margin: float | None = typer.Option(
        None, min=0.0, help="How much worse it may be; 0: it must be better."
    ),
    terms: Path | None = TermsOption,
    trial: bool = typer.Option(True, help="Run it on this machine first."),
    follow: bool = typer.Option(False, "--follow", help="Show every step until it stays."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Release a checkpoint: evaluated on devices, then by stages; exit code 1 if it is rejected or taken back."""
    client = connect(server, operator_token, data)
    fields = read_terms(terms)
    if margin is not None:
        fields["evaluation"] = {**fields.get("evaluation", {}), "margin": margin}
    names = {"population": population, "slot": slot, "plan_hash": plan_hash, "version": version}
    request = read_request(fields, **names, checkpoint=checkpoint, evaluation_task_id=evaluation)
    if trial:
        tried = try_model(client, plan_hash, checkpoint)
        request = msgspec.structs.replace(request, trial=tried)
    view = client.create_release(**msgspec.json.decode(encode(request)))
    for seen, step in follow_release(client, view.release_id) if follow else ():
        view = seen
        if not json:
            print_step(step)
    if json:
        print_json(view)
    else:
        out.print(describe(view), markup=False)
    _exit(view)


def show(
    name: str = typer.Argument(metavar="RELEASE", help="Its version, or the beginning of its id."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Show a release: where it is, how it came there, what the devices say, and what it waits for."""
    view = find_release(connect(server, operator_token, data), name)
    print_json(view) if json else print_release(view)


def hold(
    name: str = typer.Argument(metavar="RELEASE", help="Its version, or the beginning of its id."),
    reason: str = typer.Option("", help="Why, for people."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Stop a release where it is; devices keep what they serve."""
    client = connect(server, operator_token, data)
    view = client.hold_release(find_release(client, name).release_id, reason)
    print_json(view) if json else out.print(describe(view), markup=False)


def resume(
    name: str = typer.Argument(metavar="RELEASE", help="Its version, or the beginning of its id."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Go on with a release where it was held; its soak time begins again."""
    client = connect(server, operator_token, data)
    view = client.resume_release(find_release(client, name).release_id)
    print_json(view) if json else out.print(describe(view), markup=False)


def rollback(
    name: str = typer.Argument(metavar="RELEASE", help="Its version, or the beginning of its id."),
    reason: str = typer.Option("", help="Why, for people."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Take a release back: every device returns to the one before."""
    client = connect(server, operator_token, data)
    view = client.roll_back_release(find_release(client, name).release_id, reason)
    print_json(view) if json else out.print(describe(view), markup=False)
    if view.state is not ReleaseState.ROLLED_BACK:  # there was nothing to go back to
        raise typer.Exit(1)


def _exit(view: ReleaseView) -> None:
    if view.state in WENT_WRONG:
        raise typer.Exit(1)
