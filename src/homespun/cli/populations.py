"""`population` and `token`: who may join."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import typer

from homespun.cli.client import DataOption, JsonOption, ServerOption, TokenOption, connect
from homespun.cli.output import out, print_json, print_table

population = typer.Typer(help="Groups of devices that check in under one name.")
token = typer.Typer(help="Join tokens: what a device needs to enrol.")


@population.command("create")
def create_population(
    name: str,
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Create a population; repeating it changes nothing."""
    view = connect(server, operator_token, data).create_population(name)
    print_json(view) if json else out.print(f"population {view.name}", markup=False)


@population.command("ls")
def list_populations(
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """List populations with the number of their devices."""
    views = connect(server, operator_token, data).populations()
    if json:
        print_json(views)
    else:
        rows = [(view.name, view.num_devices) for view in views]
        print_table(("population", "devices"), rows, "no populations yet")


@token.command("create")
def create_token(
    population: str,
    max_uses: int | None = typer.Option(None, min=1, help="Devices that may enrol with it."),
    expires_s: float | None = typer.Option(None, min=1, help="Seconds until it expires."),
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
    json: bool = JsonOption,
) -> None:
    """Create a join token. It is shown once."""
    view = connect(server, operator_token, data).create_token(population, max_uses, expires_s)
    if json:
        print_json(view)
        return
    out.print(view.token or "", markup=False)
    until = view.expires_at and datetime.fromtimestamp(view.expires_at, UTC).isoformat(
        " ", "minutes"
    )
    out.print(f"  id {view.token_id}, for {view.max_uses or 'any number of'} devices", markup=False)
    out.print(f"  expires {until or 'never'}", markup=False)


@token.command("revoke")
def revoke_token(
    population: str,
    token_id: str,
    server: str | None = ServerOption,
    operator_token: str | None = TokenOption,
    data: Path = DataOption,
) -> None:
    """Revoke a join token; devices that already enrolled stay."""
    connect(server, operator_token, data).revoke_token(population, token_id)
    out.print(f"token {token_id} is revoked", markup=False)


def register(app: typer.Typer) -> None:
    """Add `population` and `token` to the command line."""
    app.add_typer(population, name="population")
    app.add_typer(token, name="token")
