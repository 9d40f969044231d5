"""`homespun device enroll`: a directory becomes a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
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
    allow_plain: bool | None = typer.Option(
        None, "--allow-plain", help="Accept tasks without secure aggregation."
    ),
    unknown_is_met: bool | None = typer.Option(
        None, "--unknown-is-met", help="Count conditions that cannot be told as met."
    ),
    min_group: int | None = typer.Option(
        None,
        min=1,
        help="Smallest group whose sum may be formed, 10 at first; never below 3 if secure.",
    ),
    conditions: Path | None = typer.Option(
        None, help="JSON script of conditions, for experiments."
    ),
    retry_s: str | None = typer.Option(
        None, help="A,B: come back after A to B seconds when the server is away."
    ),
    poll_s: float = typer.Option(20.0, min=0, help="How long the server may hold an answer."),
) -> None:
    """Make a directory a device of a population; again: the same device with new settings, but its policy."""
    from homespun.clock import SystemClock
    from homespun.device.enrolment import enroll as enroll_device
    from homespun.device.home import Home, Settings
    from homespun.device.policy import policy_of
    from homespun.protocol.pacing import TRANSIENT_ERROR

    home = Home(directory)
    told = {
        "allow_plain": allow_plain,
        "unknown_is_met": unknown_is_met,
        "min_group": min_group,
    }
    policy = msgspec.structs.replace(
        policy_of(home), **{name: value for name, value in told.items() if value is not None}
    )
    settings = Settings(
        server=server.rstrip("/"),
        population=population,
        policy=policy,
        conditions=_script(conditions) if conditions else None,
        transient_error=_window(retry_s) if retry_s else TRANSIENT_ERROR,
        poll_s=poll_s,
    )
    enrolled = enroll_device(home, settings, token, SystemClock(), seed)
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
