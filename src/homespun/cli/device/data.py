"""`homespun device data`: what is stored, shown, exported and deleted; also while the device runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer

from homespun.cli.device.options import DirOption, JsonOption
from homespun.cli.output import out, print_json, print_table, size
from homespun.errors import InvalidConfig, NotFound

if TYPE_CHECKING:
    from homespun.device.examples import ExampleStore

app = typer.Typer(invoke_without_command=True)


@app.callback()
def data(
    context: typer.Context,
    directory: Path | None = typer.Option(
        None, "--dir", envvar="HOMESPUN_DEVICE", help="The device's directory."
    ),
    num_shown: int = typer.Option(0, "--examples", min=0, help="Print so many, newest first."),
    as_json: bool = JsonOption,
) -> None:
    """What the device's private store holds; it is not sent anywhere."""
    from homespun.clock import SystemClock
    from homespun.protocol.eligibility import duration

    if context.invoked_subcommand is not None:
        return None
    if directory is None:
        raise InvalidConfig("which device?", hint="give its directory: --dir DIR")
    now = SystemClock().now()
    with _store(directory) as store:
        collections = store.collections()
        stored = store.stored()
        shown = [each for each, _ in zip(stored, range(num_shown), strict=False)]
    if as_json:
        return print_json({"collections": collections, "examples": shown})
    rows = [
        (
            each.name,
            each.num_examples,
            each.num_held_out,
            size(each.size_bytes),
            duration(now - each.oldest_at) if each.oldest_at is not None else None,
            duration(now - each.newest_at) if each.newest_at is not None else None,
            ", ".join(f"{name}: {kind}" for name, kind in each.fields.items()),
        )
        for each in collections
    ]
    columns = ("collection", "examples", "held out", "size", "oldest", "newest", "declared fields")
    print_table(columns, rows, "")
    for each in shown:
        out.print(msgspec.json.encode(each).decode(), markup=False)
    return None


@app.command("export")
def export(
    file: Path = typer.Argument(..., help="Where to write them; it must not exist. -: print them."),
    directory: Path = DirOption,
    collection: str | None = typer.Option(None, help="Only this one."),
) -> None:
    """Write every example as a line of JSON, in clear."""
    with _store(directory) as store:
        _known(store, collection)
        lines = (msgspec.json.encode(each) + b"\n" for each in store.stored(collection))
        if str(file) == "-":
            sys.stdout.writelines(line.decode() for line in lines)
            return
        try:
            with open(file, "xb", opener=_private) as target:
                target.writelines(lines)
        except OSError as error:
            raise InvalidConfig(f"{file} cannot be written: {error.strerror}") from error
    out.print(f"written to {file}, which is not encrypted", markup=False)


@app.command("delete")
def delete(
    directory: Path = DirOption,
    everything: bool = typer.Option(False, "--all", help="Every example."),
    collection: str | None = typer.Option(None, help="Those of this one."),
    older_than_s: float | None = typer.Option(
        None, min=0, help="Those older than so many seconds."
    ),
    ids: list[int] | None = typer.Option(None, "--id", help="This one; may be repeated."),
    yes: bool = typer.Option(False, "--yes", help="Do not ask."),
) -> None:
    """Delete examples: those for which everything that is given holds."""
    from homespun.clock import SystemClock

    chosen = (collection, older_than_s, ids or None)
    if everything == any(each is not None for each in chosen):
        raise InvalidConfig(
            "which examples?", hint="give --all, or --collection, --older-than-s, --id"
        )
    with _store(directory) as store:
        _known(store, collection)
        confirm("Delete the examples for good?", yes)
        before = None if older_than_s is None else SystemClock().now() - older_than_s
        deleted = store.delete(collection=collection, before=before, ids=ids or None)
    out.print(f"{deleted} deleted", markup=False)


def confirm(question: str, yes: bool) -> None:
    """Ask, unless the person said yes already. Raises `InvalidConfig` where there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidConfig("this cannot be undone", hint="say --yes")
    typer.confirm(question, abort=True)


def _known(store: ExampleStore, collection: str | None) -> None:
    names = [each.name for each in store.collections()]
    if collection is not None and collection not in names:
        raise NotFound(f"there is no collection {collection!r}", hint="one of: " + ", ".join(names))


def _private(path: str, flags: int) -> int:
    import os

    return os.open(path, flags, 0o600)


@contextmanager
def _store(directory: Path) -> Iterator[ExampleStore]:
    from homespun.device.examples import open_examples
    from homespun.device.home import Home

    home = Home(directory)
    store = open_examples(home, home.settings())
    try:
        yield store
    finally:
        store.close()
