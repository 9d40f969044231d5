"""`homespun device add`, `data`: what the device learns from."""

from __future__ import annotations

from pathlib import Path

import typer

from homespun.cli.device.options import DirOption
from homespun.cli.output import out
from homespun.errors import InvalidConfig


def add(
    texts: list[str] | None = typer.Argument(None, help="Texts to learn from."),
    directory: Path = DirOption,
    file: Path | None = typer.Option(
        None, help="A text file, a folder of them, a table or a chat export."
    ),
) -> None:
    """Put examples into the device's private store."""
    from homespun.clock import SystemClock
    from homespun.device.examples import open_examples
    from homespun.device.home import Home

    home = Home(directory)
    found = [*(texts or ()), *(_read(file) if file else ())]
    if not found:
        raise InvalidConfig("nothing to add", hint="give texts, or --file PATH")
    store = open_examples(home, home.settings())
    try:
        now = SystemClock().now()
        store.add_many(({"text": text} for text in found), now)
        out.print(f"{len(found)} added; the store holds {store.count(now)}", markup=False)
    finally:
        store.close()


def _read(path: Path) -> list[str]:
    """The texts of a file or folder; a plain text file gives one text per paragraph."""
    from homespun import corpora
    from homespun.corpora.sources import CHAT_LINE, read_text

    if path.suffix in (".txt", ".md", "") and path.is_file():
        text = read_text(path)
        if not CHAT_LINE.fullmatch(text.partition("\n")[0].rstrip("\r")):
            return [part.strip() for part in text.split("\n\n") if part.strip()]
    return [text for user in corpora.read(path) for text in user.texts]
