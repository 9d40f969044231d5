"""`homespun device policy`: the rules of this device, which no server can override."""

from __future__ import annotations

from pathlib import Path

import typer

from homespun.cli.device.options import DirOption, JsonOption
from homespun.cli.output import print_json, print_table


def policy(
    directory: Path = DirOption,
    assignments: list[str] | None = typer.Option(
        None, "--set", metavar="NAME=VALUE", help="Change a rule; may be repeated. All or none."
    ),
    as_json: bool = JsonOption,
) -> None:
    """Show the device's own rules, or change them; a running device follows within a second."""
    from homespun.device.home import Home
    from homespun.device.policy import in_words, set_policy

    home = Home(directory)
    found = set_policy(home, assignments) if assignments else home.settings().policy
    if as_json:
        return print_json(found)
    return print_table(("rule", "value", "so the device"), in_words(found), "")
