"""What commands print: tables for people, JSON for programs, one line for a failure."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from homespun.errors import HomespunError

# What goes to a file or a pipe has no width to fit into.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """`value` (records, lists, plain data) as indented JSON on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """A table on stdout, or the sentence `empty`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    out.print(table if table.row_count else empty, markup=False)


def size(num_bytes: float) -> str:
    """Bytes for people: 812 B, 1.7 MB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def percent(share: float | None) -> str:
    """A share for people: 14.8 %."""
    return "-" if share is None else f"{100 * share:.1f} %"


def print_failure(error: HomespunError) -> None:
    """`error` as one line on stderr, and the hint below it."""
    err.print(f"error: {error.message} [{error.code}]", markup=False, style="red")
    if error.hint:
        err.print(f"  hint: {error.hint}", markup=False)


def print_crash(error: BaseException) -> None:
    """An error of ours: the trace goes to a file, its address to the person."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="homespun-crash-", suffix=".txt", delete=False
    ) as file:
        traceback.print_exception(error, file=file)
    err.print(
        f"error: homespun failed in a way it should not: {type(error).__name__}",
        markup=False,
        style="red",
    )
    err.print(f"  hint: please report it with {Path(file.name)}", markup=False)
