"""`homespun device add`: what the device learns from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from homespun.cli.device.options import DirOption
from homespun.cli.output import out
from homespun.errors import InvalidConfig

if TYPE_CHECKING:
    from homespun.protocol.criteria import Fields


def add(
    texts: list[str] | None = typer.Argument(None, help="Texts to learn from."),
    directory: Path = DirOption,
    file: Path | None = typer.Option(
        None, help="A text file, a folder of them, a table or a chat export."
    ),
    collection: str = typer.Option("default", help="Where to put them."),
    field: list[str] | None = typer.Option(
        None, metavar="NAME=VALUE", help="A declared field of each example; may be repeated."
    ),
    declare: list[str] | None = typer.Option(
        None,
        metavar="NAME=TYPE",
        help="Declare a field of the collection: text, integer, number or boolean; may be repeated.",
    ),
) -> None:
    """Put examples into the device's private store."""
    from homespun.clock import SystemClock
    from homespun.device.examples import open_examples
    from homespun.device.home import Home
    from homespun.protocol.messages import ExampleQuery

    home = Home(directory)
    found = [*(texts or ()), *(_read(file) if file else ())]
    if not found and not declare:
        raise InvalidConfig("nothing to add", hint="give texts, or --file PATH")
    store = open_examples(home, home.settings())
    try:
        now = SystemClock().now()
        if declare:
            new = dict(_pair(each, "--declare") for each in declare)
            store.declare({**store.declared(collection), **new}, collection)
        more = _fields(field or (), store.declared(collection), collection)
        store.add_many(({"text": text, **more} for text in found), now, collection)
        holds = store.count(now, query=ExampleQuery(collection=collection))
        where = "the store" if collection == "default" else collection
        out.print(f"{len(found)} added; {where} holds {holds}", markup=False)
    finally:
        store.close()


def _fields(pairs: Iterable[str], declared: Fields, collection: str) -> dict[str, object]:
    """NAME=VALUEs, each value read as its field was declared."""
    from homespun.protocol.criteria import parse_value

    found: dict[str, object] = {}
    for pair in pairs:
        name, text = _pair(pair, "--field")
        if name not in declared:
            raise InvalidConfig(
                f"the field {name!r} of {collection!r} is not declared",
                hint=f"say what it is: --declare {name}=text, integer, number or boolean",
            )
        try:
            found[name] = parse_value(text, declared[name])
        except ValueError as error:
            raise InvalidConfig(f"{name} is {declared[name]}, not {text!r}") from error
    return found


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidConfig(f"{option} {text!r} is not NAME=VALUE")
    return name, value


def _read(path: Path) -> list[str]:
    """The texts of a file or folder; a plain text file gives one text per paragraph."""
    from homespun import corpora
    from homespun.corpora.sources import CHAT_LINE, read_text

    if path.suffix in (".txt", ".md", "") and path.is_file():
        text = read_text(path)
        if not CHAT_LINE.fullmatch(text.partition("\n")[0].rstrip("\r")):
            return [part.strip() for part in text.split("\n\n") if part.strip()]
    return [text for user in corpora.read(path) for text in user.texts]
