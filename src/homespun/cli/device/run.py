"""`homespun device run`: be a device."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path

import typer

from homespun.cli.device.options import DirOption
from homespun.cli.lifeline import stop_with_stdin
from homespun.errors import Conflict

TURN_S = 2.0
"""How often a device that waits for its turn looks whether it has come."""


def run(
    directory: Path = DirOption,
    max_sessions: int | None = typer.Option(None, min=1, help="End after so many sessions."),
    until_eof: bool = typer.Option(False, help="Stop when standard input is closed."),
    wait: bool = typer.Option(
        False, "--wait", help="While another process runs this device, wait for its turn."
    ),
    vanish_after: str = typer.Option(
        "", hidden=True, help="A drill: die after this step of secure aggregation."
    ),
) -> None:
    """Be a device until stopped: take part, fetch releases, keep clean."""
    import logging

    from homespun.clock import SystemClock
    from homespun.device.connection import Connection, http_client
    from homespun.device.current import CurrentScript
    from homespun.device.home import Home
    from homespun.device.identity import Identity
    from homespun.device.measured import measured
    from homespun.device.memory import give_back_large_blocks
    from homespun.device.runtime import Runtime
    from homespun.device.stopping import Stop, Stopped

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    give_back_large_blocks()
    stop, clock, home = Stop(), SystemClock(), Home(directory)
    stop.on_signals()
    if until_eof:
        stop_with_stdin()
    settings = home.settings()
    identity = Identity.load(home.identity_file)
    conditions = (
        measured(home.root)
        if settings.conditions is None
        else nullcontext(CurrentScript(home, settings, clock.now()))
    )
    with http_client(settings.server) as client, conditions as source:
        connection = Connection(client, identity, clock, stop)
        if vanish_after:
            from homespun.cli.demo.vanishing import VanishingConnection

            connection = VanishingConnection(client, identity, clock, stop)
            connection.vanish_after = vanish_after
        while not stop.requested:
            try:
                runtime = Runtime(home, connection, source, clock, stop)
            except Conflict:
                if not wait:
                    raise
                with suppress(Stopped), stop.interruptible():
                    clock.sleep(TURN_S)
            else:
                runtime.run(max_sessions)
                break
