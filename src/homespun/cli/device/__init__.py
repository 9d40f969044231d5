"""`homespun device`: be a device. Every command works on one directory, `--dir`.

What a command needs of homespun.device is imported inside it: `--help` should not load an HTTP client.
"""

from __future__ import annotations

import typer

from homespun.cli.device import data, enroll, explain, predict, run

app = typer.Typer(no_args_is_help=True)
app.command()(enroll.enroll)
app.command()(data.add)
app.command()(run.run)
app.command()(explain.status)
app.command("conditions")(explain.show_conditions)
app.command()(predict.predict)
