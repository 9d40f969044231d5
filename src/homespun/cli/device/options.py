"""Options that every command of a device has."""

from __future__ import annotations

import typer

DirOption = typer.Option(..., "--dir", envvar="HOMESPUN_DEVICE", help="The device's directory.")
JsonOption = typer.Option(False, "--json", help="Print JSON.")
