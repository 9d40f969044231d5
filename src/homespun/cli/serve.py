"""`homespun serve`: one server process."""

from __future__ import annotations

from pathlib import Path

import typer

from homespun.cli.client import DEFAULT_DATA
from homespun.cli.lifeline import stop_with_stdin


def register(app: typer.Typer) -> None:
    """Add `serve` to the command line."""

    @app.command()
    def serve(
        data: Path = typer.Option(
            DEFAULT_DATA, "--data", envvar="HOMESPUN_DATA", help="Database, blobs and keys."
        ),
        host: str | None = typer.Option(None, help="Address to listen on."),
        port: int | None = typer.Option(None, min=0, max=65535, help="0: any free port."),
        until_eof: bool = typer.Option(False, help="Stop when standard input is closed."),
    ) -> None:
        """Run the server; everything it needs is created on first start."""
        from homespun.server.app import serve as run  # a web framework, only needed here
        from homespun.server.settings import load_settings

        if until_eof:
            stop_with_stdin()
        run(load_settings(data_dir=data, host=host, port=port))
