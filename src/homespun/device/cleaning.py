"""Cleaning: nothing of a session stays on the device once it has ended, however it ended.

`clean` runs when a session ends, at every start, and on a timer; `left_over` walks the directory and names
what should not be there: an empty answer is the proof. Files that are not the device's are never touched.
"""

from __future__ import annotations

from pathlib import Path

from homespun.device.home import TEMPORARY, Home, remove, storage
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
