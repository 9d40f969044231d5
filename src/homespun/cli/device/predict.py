"""`homespun device predict`: the model that the device serves."""

from __future__ import annotations

from pathlib import Path

import typer

from homespun.cli.device.options import DirOption, JsonOption
from homespun.cli.output import print_json, print_table


def predict(
    text: str = typer.Argument(..., help='For example "thank you for the".'),
    directory: Path = DirOption,
    k: int = typer.Option(3, "-k", min=1, help="How many words."),
    slot: str | None = typer.Option(None, help="Which model, if there are several."),
    as_json: bool = JsonOption,
) -> None:
    """The next word, from the model that the device serves; needs no server."""
    from homespun.device.home import Home
    from homespun.device.models import open_models

    home = Home(directory)
    found = open_models(home, home.settings()).predict(text, k, slot)
    if as_json:
        return print_json([{"word": s.word, "probability": s.probability} for s in found])
    rows = [(s.word, f"{100 * s.probability:.1f} %") for s in found]
    return print_table(("word", "probability"), rows, "no suggestion")
