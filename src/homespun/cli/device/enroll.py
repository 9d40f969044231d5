"""`homespun device enroll`: a directory becomes a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from homespun.cli.device.options import DirOption
from homespun.cli.output import out
from homespun.errors import InvalidConfig

if TYPE_CHECKING:
    from homespun.device.conditions import Span
    from homespun.protocol.messages import RetryWindow


def enroll(
    server: str = typer.Option(..., envvar="HOMESPUN_SERVER", help="URL of the server."),
    token: str = typer.Option(..., envvar="HOMESPUN_JOIN_TOKEN", help="Join token."),
    population: str = typer.Option(..., help="Population to join."),
    directory: Path = DirOption,
    seed: int | None = typer.Option(
        None, help="Make identity and training reproducible: for experiments only."
    ),
    allow_plain: bool = typer.Option(
        False, "--allow-plain", help="Accept tasks without secure aggregation."
    ),
    unknown_is_met: bool = typer.Option(
        False, "--unknown-is-met", help="Count conditions that cannot be told as met."
    ),
    min_group: int = typer.Option(
        10, min=1, help="Smallest group whose sum may be formed; never below 3 if secure."
    ),
    conditions: Path | None = typer.Option(
        None, help="JSON script of conditions, for experiments."
    ),
    retry_s: str | None = typer.Option(
        None, help="A,B: come back after A to B seconds when the server is away."
    ),
    poll_s: float = typer.Option(20.0, min=0, help="How long the server may hold an answer."),
) -> None:
    """Make a directory a device of a population; again: with new settings, the same device."""
    from homespun.clock import SystemClock
    from homespun.device.enrolment import enroll as enroll_device
    from homespun.device.home import Home, Settings
    from homespun.protocol.eligibility import Policy
    from homespun.protocol.pacing import TRANSIENT_ERROR

    settings = Settings(
        server=server.rstrip("/"),
        population=population,
        policy=Policy(allow_plain=allow_plain, unknown_is_met=unknown_is_met, min_group=min_group),
        conditions=_script(conditions) if conditions else None,
        transient_error=_window(retry_s) if retry_s else TRANSIENT_ERROR,
        poll_s=poll_s,
    )
    enrolled = enroll_device(Home(directory), settings, token, SystemClock(), seed)
    out.print(f"device {enrolled.device_id} of {population}, in {directory}", markup=False)


def _script(path: Path) -> tuple[Span, ...]:
    from homespun.device.conditions import parse_script

    try:
        return parse_script(path.read_bytes())
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error.strerror}") from error


def _window(text: str) -> RetryWindow:
    from homespun.protocol.messages import RetryWindow

    try:
        earliest, latest = (float(part) for part in text.split(","))
        if not 0 <= earliest <= latest < float("inf"):
            raise ValueError
    except ValueError as error:
        raise InvalidConfig(
            f"--retry-s {text!r} is not a window", hint="write it like 1,3"
        ) from error
    return RetryWindow(earliest_s=earliest, latest_s=latest)
