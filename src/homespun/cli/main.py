"""`homespun`: the commands, put together."""

from __future__ import annotations

import sys

import typer

from homespun import __version__
from homespun.cli import demo, device, doctor, models, populations, serve, simulate, tasks
from homespun.cli.output import print_crash, print_failure
from homespun.errors import HomespunError

app = typer.Typer(
    name="homespun",
    help="Federated learning for real devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
demo.register(app)
serve.register(app)
tasks.register(app)
models.register(app)
populations.register(app)
simulate.register(app)
doctor.register(app)
app.add_typer(device.app, name="device", help="Be a device: enrol, run, predict.")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def homespun(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Federated learning for real devices."""


def main() -> None:
    """Run a command; every failure ends as one clear line and a non-zero exit code."""
    try:
        app()  # exits by itself, with 2 for wrong usage and 130 for Ctrl-C
    except HomespunError as error:
        print_failure(error)
    except BrokenPipeError:
        pass  # whoever read our output has gone
    except Exception as error:
        print_crash(error)
    sys.exit(1)


if __name__ == "__main__":
    main()
