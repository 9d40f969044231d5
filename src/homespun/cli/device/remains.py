"""`homespun device verify`, `forget`: nothing of past sessions is left; nothing at all is left."""

from __future__ import annotations

from pathlib import Path

import typer

from homespun.cli.device.data import confirm
from homespun.cli.device.options import DirOption, JsonOption
from homespun.cli.output import out, print_json, print_table, size


def verify(directory: Path = DirOption, as_json: bool = JsonOption) -> None:
    """Prove that nothing of past sessions is left; exit code 1 and the paths if something is."""
    from homespun.clock import SystemClock
    from homespun.device.home import Home
    from homespun.device.proof import verify as prove

    found = prove(Home(directory), SystemClock())
    if as_json:
        print_json(found)
    else:
        out.print(
            f"looked at {found.num_files} files ({size(found.size_bytes)}), and in databases at "
            f"{found.num_rows} rows and {found.num_free_pages} unused pages",
            markup=False,
        )
        if found.under_way:
            out.print(
                f"session {found.under_way} is under way; its {found.num_files_under_way} files "
                "were left out",
                markup=False,
            )
        rows = [(each.path, each.what) for each in found.left]
        print_table(("left", ""), rows, "nothing of past sessions is left")
    if found.left:
        raise typer.Exit(1)


def forget(
    directory: Path = DirOption,
    yes: bool = typer.Option(False, "--yes", help="Do not ask."),
) -> None:
    """Destroy the store's key and all examples; the device stays enrolled, and its store is empty."""
    from homespun.device import cleaning
    from homespun.device.home import Home

    home = Home(directory)
    home.settings()
    confirm("Destroy everything that the device has stored?", yes)
    cleaning.forget(home)
    out.print(
        "forgotten: key, examples, and what an interrupted session left. Flash memory may keep the old key "
        "where it lay, until it needs the place; only an encrypted disk helps against that",
        markup=False,
    )
