"""`simulate`, `plot`, `report`: train over simulated clients on this machine, and look at what came of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from homespun.cli.output import out, print_json
from homespun.errors import InvalidConfig, StorageFailure

if TYPE_CHECKING:
    from homespun.simulation.config import Config
    from homespun.simulation.history import RoundRecord

DirectoryArgument = typer.Argument(help="Directory of a simulation.")


def register(app: typer.Typer) -> None:
    """Add `simulate`, `plot` and `report` to the command line."""
    app.command()(simulate)
    app.command()(plot)
    app.command()(report)


def simulate(
    config: Path = typer.Argument(help="What to simulate, a TOML file."),
    change: list[str] = typer.Option(
        [], "--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the file."
    ),
    directory: Path | None = typer.Option(
        None, help="Where history and checkpoints go; by default beside the file, named after it."
    ),
    resume: bool = typer.Option(False, help="Go on from the newest checkpoint there."),
    json: bool = typer.Option(False, "--json", help="One JSON object per round on stdout."),
) -> None:
    """Train a model over simulated clients."""
    from homespun.simulation.config import read_config

    settings = read_config(config, change)
    where = directory or config.parent / (settings.simulation.directory or f"{config.stem}-run")
    sys.path.insert(0, str(config.parent.resolve()))  # so that a task can be a file beside it
    _run(settings, where, resume, json)


def _run(settings: Config, where: Path, resume: bool, json: bool) -> None:
    try:
        from homespun.simulation.api import simulate as run
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            f"simulations need the package {error.name}", hint="pip install 'homespun[author]'"
        ) from error
    from homespun.plan.package import Plan
    from homespun.simulation.asynchronous import Durations
    from homespun.simulation.history import text
    from homespun.simulation.ray import Cluster
    from homespun.simulation.stopping import EarlyStopping, Target

    words = {
        name: getattr(settings.simulation, name) for name in settings.simulation.__struct_fields__
    }
    del words["directory"]
    task = _task(settings)
    words["aggregation"] = words["aggregation"] or (
        "fixed-point" if isinstance(task, Plan) else "float"
    )
    data, evaluate_on = _data(settings)
    method = settings.method
    if not json:
        out.print(
            f"{method.name}: {words['rounds']} rounds of {words['cohort']} of {data.num_clients} clients",
            markup=False,
        )
    say = _Says(words["rounds"], json)
    result = run(
        task,
        data,
        evaluate_on=evaluate_on,
        method=method.name,
        method_settings=method.settings,
        directory=where,
        resume=resume,
        early_stopping=_same(settings.early_stopping, EarlyStopping),
        target=_same(settings.target, Target),
        durations=_same(settings.durations, Durations),
        cluster=_same(settings.cluster, Cluster),
        progress=not json,
        callbacks=(say,),
        **words,
    )
    if json:
        return
    rounds = len(result.history)
    seconds = sum(record.seconds for record in result.history)
    out.print(
        f"finished after {rounds} rounds, {seconds:.1f} s: {text(result.metrics)}", markup=False
    )
    if result.reason:
        out.print(f"stopped early: {result.reason}", markup=False)
    checkpoint = where / "checkpoints" / f"round-{rounds:06d}" / "model.safetensors"
    out.print(f"model      {checkpoint}", markup=False)
    out.print(f"history    {where / 'history.jsonl'}", markup=False)
    out.print(f"look at it with: homespun plot {where}", markup=False)


class _Says:
    """A round in one line: of each as JSON, else of some where no progress bar can be shown."""

    def __init__(self, num_rounds: int, json: bool) -> None:
        self._every, self._json = max(1, num_rounds // 10), json

    def __call__(self, record: RoundRecord) -> None:
        import msgspec

        from homespun.simulation.history import text

        if self._json:
            sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
        elif not sys.stderr.isatty() and record.round % self._every == 0:
            line = f"round {record.round}: {text(record.training)}"
            line += f"; evaluation: {text(record.evaluation)}" if record.evaluation else ""
            out.print(line, markup=False)


def _task(settings: Config) -> Any:
    from homespun import zoo

    model = settings.task.model
    if ":" not in model:
        if settings.task.settings:
            raise InvalidConfig("a model of the zoo takes no settings", got=model)
        return zoo.load(model)
    make = _function("task.model", model)
    if not settings.simulation.workers:
        return _called("task.model", make, settings.task.settings)
    from functools import partial

    return partial(make, **settings.task.settings)  # each worker makes its own


def _data(settings: Config) -> tuple[Any, Any]:
    """What to train on, and what to evaluate on, if there is anything."""
    from homespun.simulation.arena import Arena

    make = _function("data.source", settings.data.source)
    made = _called("data.source", make, settings.data.settings)
    data, evaluate_on = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(data, Arena) or not isinstance(evaluate_on, Arena | None):
        raise InvalidConfig(
            f"data.source {settings.data.source} gave {type(made).__name__}",
            hint="it must give an Arena, or a pair of them: to train on, to evaluate on",
        )
    return data, evaluate_on


def _function(key: str, name: str) -> Any:
    """What `package.module:function` names. Raises `InvalidConfig` if it is not there."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InvalidConfig(
            f"{key} = {name!r} names no function", hint='as in "package.module:function"'
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            f"{key}: {error}", hint="modules are looked for beside the file and where Python does"
        ) from error
    except AttributeError as error:
        raise InvalidConfig(f"{key}: {module} has no {attribute!r}") from error


def _called(key: str, make: Any, settings: dict[str, Any]) -> Any:
    import inspect

    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        raise InvalidConfig(
            f"{key}: {error}", hint=f"the function is {inspect.signature(make)}"
        ) from error
    return make(**settings)


def _same(section: Any, kind: Any) -> Any:
    """The section as the record of the same fields; None stays None."""
    if section is None:
        return None
    return kind(**{name: getattr(section, name) for name in section.__struct_fields__})


def plot(
    directory: Path = DirectoryArgument,
    output: Path | None = typer.Option(None, "--output", "-o", help="SVG file to write."),
) -> None:
    """Draw loss and metrics of a simulation as an SVG file."""
    from homespun.simulation.history import read_history
    from homespun.simulation.report import plot as draw

    _write(output or directory / "plot.svg", draw(read_history(directory / "history.jsonl")))


def report(
    directory: Path = DirectoryArgument,
    output: Path | None = typer.Option(None, "--output", "-o", help="Markdown file to write."),
    json: bool = typer.Option(False, "--json", help="All rounds as JSON on stdout instead."),
) -> None:
    """Summarise a simulation as a Markdown file."""
    from homespun.simulation.history import read_history
    from homespun.simulation.report import summary

    records = read_history(directory / "history.jsonl")
    if json:
        print_json(records)
        return
    _write(output or directory / "report.md", summary(records, directory.resolve().name))


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise StorageFailure(f"{path} cannot be written: {error.strerror}") from error
    out.print(f"wrote {path}", markup=False)
