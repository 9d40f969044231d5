"""`homespun doctor`: what this machine can and cannot do, with what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import typer

from homespun.cli.output import out, print_json, print_table, size

MIN_PYTHON = (3, 11)
MIN_DISK_BYTES = 1_000_000_000
MIN_MEMORY_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Finding:
    """`ok` is None where something optional is missing."""

    check: str
    ok: bool | None
    found: str
    hint: str = ""


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= MIN_PYTHON, found, "use Python 3.11 or newer")


def _sqlite() -> Finding:
    ok = sqlite3.sqlite_version_info >= (3, 35)
    return Finding("SQLite", ok, sqlite3.sqlite_version, "SQLite 3.35 or newer is needed")


def _engine() -> Finding:
    try:
        return Finding("ONNX Runtime", True, importlib.metadata.version("onnxruntime"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("ONNX Runtime", False, "missing", "pip install onnxruntime")


def _optional(module: str, purpose: str, hint: str) -> Callable[[], Finding]:
    def find() -> Finding:
        if importlib.util.find_spec(module) is None:
            return Finding(f"{module} (optional)", None, "missing", f"{purpose}: {hint}")
        return Finding(f"{module} (optional)", True, importlib.metadata.version(module))

    return find


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return Finding("free disk here", free >= MIN_DISK_BYTES, size(free), "1 GB is needed")


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    return Finding("free memory", free >= MIN_MEMORY_BYTES, size(free), "the demo needs 2 GB")


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Finding("local ports", True, f"could listen on {server.getsockname()[1]}")
    except OSError as error:
        return Finding("local ports", False, str(error), "allow listening on 127.0.0.1")


def _public_text() -> Finding:
    found = importlib.util.find_spec("pydoc_data.topics") is not None
    hint = "install Python's documentation data, or give the demo --text"
    return Finding("text for the demo", found or None, "present" if found else "missing", hint)


CHECKS = (
    _python,
    _sqlite,
    _engine,
    _optional("torch", "to build plans", "pip install 'homespun[author]'"),
    _optional("pyarrow", "to read Parquet", "pip install 'homespun[parquet]'"),
    _optional("ray", "to simulate on a cluster", "pip install 'homespun[ray]'"),
    _disk,
    _memory,
    _loopback,
    _public_text,
)


def findings() -> Iterator[Finding]:
    """Every check of this machine, run now."""
    for check in CHECKS:
        yield check()


def register(app: typer.Typer) -> None:
    """Add `doctor` to the command line."""

    @app.command()
    def doctor(json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
        """Check this machine; exit code 1 if something needed is missing."""
        found = list(findings())
        if json:
            print_json(found)
        else:
            mark = {True: "ok", False: "FAILED", None: "missing"}
            rows = [(f.check, mark[f.ok], f.found, "" if f.ok else f.hint) for f in found]
            print_table(("check", "", "found", "what to do"), rows, "")
        if any(finding.ok is False for finding in found):
            raise typer.Exit(1)
        if not json:
            out.print("This machine can run Homespun.")
