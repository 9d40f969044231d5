"""Cleaning: nothing of a session stays on the device once it has ended, however it ended.

`clean` runs when a session ends, at every start, and on a timer; `left_over` walks the directory and names
what should not be there; `device.proof` looks into files, too. Files that are not the device's are never touched.

`forget` goes further: it ends all that the device ever learned from.
"""

from __future__ import annotations

from pathlib import Path

from homespun.device import examples
from homespun.device.home import TEMPORARY, Home, remove, storage
from homespun.device.journal import Journal
from homespun.device.models import Models

EVERY_S = 3_600.0


def left_over(home: Home, models: Models, keep: str | None = None) -> list[Path]:
    """Training files of sessions other than `keep`, half-written files, models that are not served."""
    halves = [path.with_name(path.name + TEMPORARY) for path in home.written_files]
    with storage(home.root):
        found = [path for path in halves if path.exists()]
        if home.work.is_dir():
            found += [path for path in home.work.iterdir() if path.name != keep]
        return sorted(found + models.unserved())


def clean(home: Home, models: Models, keep: str | None = None) -> None:
    """Remove all that `left_over` names; `keep` is the session under way."""
    models.settle()
    for path in left_over(home, models, keep):
        remove(path)


def forget(home: Home) -> None:
    """Destroy the store's key, the examples, and what is sealed with the key: files of a session that was interrupted.

    The device stays enrolled and its store is empty. Raises `Conflict` while a process runs the device.
    """
    journal = Journal(home.journal_file)  # so that nobody can begin to run it meanwhile
    try:
        examples.forget(home.examples_file, home.store_key_file)
        remove(home.work)
        remove(home.status_file)  # it says how many there were
    finally:
        journal.close()
