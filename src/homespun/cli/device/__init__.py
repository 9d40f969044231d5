"""`homespun device`: be a device. Every command works on one directory, `--dir`.

What a command needs of homespun.device is imported inside it: `--help` should not load an HTTP client.
"""

from __future__ import annotations

import typer

from homespun.cli.device import add, data, enroll, explain, policy, predict, remains, run, service

app = typer.Typer(no_args_is_help=True)
app.command()(enroll.enroll)
app.command()(add.add)
app.add_typer(data.app, name="data")
app.command()(run.run)
app.command()(explain.status)
app.command()(explain.why)
app.command("conditions")(explain.show_conditions)
app.command()(policy.policy)
app.command()(predict.predict)
app.command()(remains.verify)
app.command()(remains.forget)
app.command("install-service")(service.install_service)
app.command("uninstall-service")(service.uninstall_service)
