"""`task`, `run` and `rounds`: what is asked of a population, and how far it is."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from homespun.cli.client import (
    DataOption,
    JsonOption,
    OperatorClient,
    ServerOption,
    TokenOption,
    connect,
)
from homespun.cli.models import read_bytes
from homespun.cli.output import out, percent, print_json, print_table
from homespun.errors import Conflict, InvalidConfig
from homespun.protocol.group import GroupState
from homespun.protocol.round import RoundState
from homespun.protocol.tasks import TaskSpec, parse
from homespun.protocol.views import RoundSummary, TaskState, TaskView

POLL_S = 20.0
ENDED = (RoundState.COMMITTED, RoundState.SCRUBBED, RoundState.ABANDONED, RoundState.CANCELLED)

task = typer.Typer(help="Computations for a population.")


def read_spec(path: Path) -> TaskSpec:
    """A task description from a TOML file."""
    try:
        return parse(tomllib.loads(read_bytes(path).decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} is not TOML: {error}") from error


@task.command("create")
def create_task(
    spec: Path = typer.Argument(help="Task description, a TOML file."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Create a task; its rounds begin when devices check in."""
    view = connect(server, operator_token, data).create_task(read_spec(spec))
    print_json(view) if json else out.print(view.task_id, markup=False)


@task.command("ls")
def list_tasks(
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """List tasks."""
    views = connect(server, operator_token, data).tasks()
    if json:
        print_json(views)
        return
    rows = [
        (
            view.task_id,
            view.spec.name,
            view.spec.kind,
            view.state,
            f"{view.rounds_committed}/{view.spec.num_rounds}",
            view.reason,
        )
        for view in views
    ]
    print_table(("task", "name", "kind", "state", "rounds", "reason"), rows, "no tasks yet")


@task.command("show")
def show_task(
    task_id: str,
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Show a task and its rounds."""
    client = connect(server, operator_token, data)
    view, rounds = client.task(task_id), client.rounds(task_id)
    if json:
        print_json({"task": view, "rounds": rounds})
        return
    out.print(f"{view.spec.name} ({view.spec.kind}): {view.state} {view.reason}", markup=False)
    out.print(f"{view.rounds_committed} of {view.spec.num_rounds} rounds; head {view.head[:12]}")
    print_rounds(rounds)


@task.command("stop")
def stop_task(
    task_id: str,
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Stop a task for good; what its devices sent for the open round is void."""
    view = connect(server, operator_token, data).stop_task(task_id)
    print_json(view) if json else out.print(f"{view.spec.name}: {view.state}", markup=False)


def print_rounds(rounds: list[RoundSummary]) -> None:
    """Rounds as a table."""
    rows = [
        (
            view.task_name,
            f"{view.round_number}.{view.attempt}",
            view.state,
            f"{view.num_reported}/{view.num_assigned}" + stragglers(view, "+{}"),
            ", ".join(
                f"{name} {metric(view, name)}"
                for name in view.metrics
                if not name.endswith("_squared")  # for the gates, not for people
            ),
            view.reason or (view.checkpoint or "")[:12],
        )
        for view in rounds
    ]
    columns = ("task", "round", "state", "reports", "metrics", "checkpoint or reason")
    print_table(columns, rows, "no rounds yet")


def stragglers(view: RoundSummary, text: str) -> str:
    """`text` with the number of devices of earlier rounds that may report in this one; nothing if there are none."""
    return text.format(view.num_carried) if view.num_carried else ""


def dropped_out(view: RoundSummary) -> tuple[int, int, int]:
    """Devices lost from the opened groups of a round: before sharing keys, before masking, after it."""
    opened = [group for group in view.groups if group.state is GroupState.OPENED]
    return (
        sum(group.num_devices - group.num_shared for group in opened),
        sum(group.num_shared - group.num_masked for group in opened),
        sum(group.num_masked - group.num_agreed for group in opened),
    )


def summed(view: RoundSummary) -> str:
    """How the reports of a round were added up."""
    if not view.groups:
        return f"{view.num_reported} of {view.num_assigned} reported"
    expected = f"{view.num_assigned}" + stragglers(view, " and {} of earlier rounds")
    opened = sum(group.state is GroupState.OPENED for group in view.groups)
    lost = sum(dropped_out(view))
    return (
        f"{view.num_reported} of {expected} reported in {opened} secure "
        + ("sum" if opened == 1 else "sums")
        + (f", {lost} dropped out" if lost else "")
    )


def metric(view: RoundSummary, name: str) -> str:
    """One metric of a round: a loss as a number, a latency in milliseconds, a rate as a percentage."""
    mean = share(view, name)
    if mean is None or not name.endswith(("loss", "latency")):
        return percent(mean)
    return f"{mean:.3f}" if name.endswith("loss") else f"{1000 * mean:.1f} ms"


def share(view: RoundSummary, name: str) -> float | None:
    """A metric's sum over its count; None where there is none."""
    value = view.metrics.get(name)
    return value.sum / value.count if value and value.count else None


def follow(
    client: OperatorClient,
    task_id: str,
    poll_s: float = POLL_S,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[RoundSummary]:
    """Every round attempt of a task, once, as it ends; ends when the task does.

    `tick` is called between two looks, at most `poll_s` apart.
    """
    seen: set[tuple[int, int]] = set()
    sequence = 0
    while True:
        view = client.task(task_id)
        for summary in client.rounds(task_id):
            key = (summary.round_number, summary.attempt)
            if summary.state in ENDED and key not in seen:
                seen.add(key)
                yield summary
        if view.state is not TaskState.ACTIVE:
            return
        tick()
        events = client.events(after=sequence, wait_s=poll_s)
        sequence = max([sequence, *(event.sequence for event in events)])


def finished(view: TaskView) -> TaskView:
    """`view`, if its task is finished. Raises `Conflict` naming why it is not."""
    if view.state is not TaskState.FINISHED:
        raise Conflict(f"task {view.spec.name} is {view.state}: {view.reason}")
    return view


def register(app: typer.Typer) -> None:
    """Add `task`, `run` and `rounds` to the command line."""
    app.add_typer(task, name="task")

    @app.command()
    def run(
        spec: Path = typer.Argument(help="Task description, a TOML file."),
        server: str | None = ServerOption,
        operator_token: str | None = TokenOption,
        data: Path = DataOption,
        json: bool = JsonOption,
    ) -> None:
        """Create a task and follow it to its end; exit code 1 unless it finishes."""
        client = connect(server, operator_token, data)
        view = client.create_task(read_spec(spec))
        if not json:
            out.print(f"task {view.task_id}", markup=False)
        for summary in follow(client, view.task_id):
            if json:
                print_json(summary)
            else:
                values = ", ".join(f"{name} {metric(summary, name)}" for name in summary.metrics)
                out.print(
                    f"round {summary.round_number}.{summary.attempt} {summary.state}: "
                    f"{summed(summary)}, {values} {summary.reason}",
                    markup=False,
                )
        view = finished(client.task(view.task_id))
        if not json:
            out.print(f"finished; checkpoint {view.head}", markup=False)

    @app.command()
    def rounds(
        limit: int = typer.Option(20, min=1, max=1000, help="Newest rounds to show."),
        server: str | None = ServerOption,
        operator_token: str | None = TokenOption,
        data: Path = DataOption,
        json: bool = JsonOption,
    ) -> None:
        """List the newest rounds of all tasks."""
        views = connect(server, operator_token, data).recent_rounds(limit)
        print_json(views) if json else print_rounds(views)
