"""`model` and `plan`: what is trained, what is served; releases are in `cli.releases`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import typer

from homespun.cli import releases
from homespun.cli.client import DataOption, JsonOption, ServerOption, TokenOption, connect
from homespun.cli.output import out, print_json, print_table, size
from homespun.cli.releases import describe as describe  # noqa: PLC0414
from homespun.errors import InvalidConfig, InvalidInput
from homespun.plan.initial import initial_checkpoint
from homespun.plan.package import Plan
from homespun.tensors import codec

model = typer.Typer(help="Checkpoints and releases.")
plan = typer.Typer(help="Plans: what devices execute.")


@model.command("ls")
def list_models(
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """List checkpoints, newest last, and releases."""
    client = connect(server, operator_token, data)
    checkpoints, released = client.checkpoints(), client.releases()
    if json:
        print_json({"checkpoints": checkpoints, "releases": released})
        return
    served = {release.checkpoint: release for release in released}
    rows = [
        (
            view.hash[:12],
            f"{view.task_name} round {view.round_number}" if view.round_number else "pushed",
            size(view.size_bytes),
            datetime.fromtimestamp(view.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            f"{served[view.hash].version} {served[view.hash].state}" if view.hash in served else "",
        )
        for view in checkpoints
    ]
    columns = ("checkpoint", "from", "size", "created (UTC)", "release")
    print_table(columns, rows, "no checkpoints yet")


@model.command("push")
def push_model(
    plan_hash: str,
    checkpoint: Path | None = typer.Argument(None, help="safetensors file; none: fresh ones."),
    seed: int = typer.Option(0, help="Of the fresh parameters."),
    plan_file: Path | None = typer.Option(None, "--plan", help="The plan, for fresh parameters."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Push a checkpoint of a plan, or fresh initial parameters."""
    if checkpoint is not None:
        content = read_bytes(checkpoint)
    elif plan_file is not None:
        content = codec.encode_tree(initial_checkpoint(Plan.read(plan_file).manifest, seed))
    else:
        raise InvalidInput(
            "nothing to push", hint="give a checkpoint file, or --plan for fresh ones"
        )
    stored = connect(server, operator_token, data).push_checkpoint(content, plan_hash)
    print_json(stored) if json else out.print(stored.hash, markup=False)


@plan.command("push")
def push_plan(
    path: Path,
    asset: list[str] = typer.Option([], help="NAME=FILE, added before publishing."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Publish a plan (a directory or a zip); the server signs it with its publisher key."""
    content = Plan.read(path)
    if asset:
        content = content.with_assets(dict(_named_file(item) for item in asset))
    stored = connect(server, operator_token, data).push_plan(content.to_bytes())
    print_json(stored) if json else out.print(stored.hash, markup=False)


@plan.command("build")
def build_plan(
    model: str = typer.Argument(help="digits, keyboard, or keyboard_2018: the paper's size."),
    folder: Path = typer.Argument(help="Where to write the plan."),
) -> None:
    """Build the plan of a model that comes with Homespun; needs PyTorch."""
    try:
        from homespun.zoo.builders import BUILDERS
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            f"building a plan needs {error.name}", hint="pip install 'homespun[author]'"
        ) from error
    if model not in BUILDERS:
        raise InvalidInput(f"there is no model {model!r}", hint=f"one of: {', '.join(BUILDERS)}")
    built = BUILDERS[model]()
    built.write(folder)
    out.print(f"{built.manifest.num_parameters:,} parameters, plan in {folder}", markup=False)


@plan.command("show")
def show_plan(path: Path, json: bool = JsonOption) -> None:
    """What a plan does: its tensors, settings and files."""
    manifest = Plan.read(path).manifest
    if json:
        print_json(manifest)
        return
    out.print(f"plan {manifest.name}, format {manifest.format}", markup=False)
    rows = [(spec.name, list(spec.shape), spec.size) for spec in manifest.parameters]
    print_table(("parameter", "shape", "entries"), rows, "")
    total = sum(spec.size for spec in manifest.parameters)
    out.print(f"{total:,} parameters, metrics: {', '.join(manifest.metrics)}", markup=False)


def _named_file(item: str) -> tuple[str, bytes]:
    name, _, path = item.partition("=")
    if not path:
        raise InvalidInput(f"--asset {item!r} is not NAME=FILE")
    return name, read_bytes(Path(path))


def read_bytes(path: Path) -> bytes:
    """A file a person named. Raises `InvalidInput` when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error


def register(app: typer.Typer) -> None:
    """Add `model` and `plan` to the command line."""
    releases.register(model)
    app.add_typer(model, name="model")
    app.add_typer(plan, name="plan")
