"""A device is a directory. This is the only place that knows where things lie in it.

    device.json     settings and the person's policy           identity.key    Ed25519, 0600
    examples.db     the private store, encrypted               store.key       its key, 0600
    journal.db      what must survive a crash                  status.json     what a person may read
    models/         what is served                             work/<session>/ training files
    run.log         of the device inside an application

Files of value are written beside their place, synced, and renamed: a crash leaves the old one or the new
one. Disk and database failures become `StorageFailure` at this seam.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from homespun.device.conditions import Span
from homespun.errors import InvalidConfig, StorageFailure
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import Name, RetryWindow, Seconds
from homespun.protocol.pacing import PERMANENT_ERROR, TRANSIENT_ERROR

SERVING_FILE = "serving.db"
"""Which models are served, below `models`."""
TEMPORARY = ".tmp"
"""Suffix of a file that is not yet what its name says; `cleaning` removes those that a crash left."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """device.json. `publisher_keys`: base64 Ed25519 keys whose plans and releases may run; `seed`: of this
    device's training and of nothing secret; `conditions`: a script, or None for what the platform reports;
    `poll_s`: how long the server may hold an answer. What enrolling gives comes after `population`.
    """

    server: str
    population: Name
    device_id: str = ""
    publisher_keys: tuple[str, ...] = ()
    seed: int = 0
    policy: Policy = Policy()
    conditions: tuple[Span, ...] | None = None
    transient_error: RetryWindow = TRANSIENT_ERROR
    permanent_error: RetryWindow = PERMANENT_ERROR
    poll_s: Seconds = 20.0


@dataclass(frozen=True)
class Home:
    """The paths below one device's directory."""

    root: Path

    @property
    def settings_file(self) -> Path:
        return self.root / "device.json"

    @property
    def identity_file(self) -> Path:
        return self.root / "identity.key"

    @property
    def examples_file(self) -> Path:
        return self.root / "examples.db"

    @property
    def store_key_file(self) -> Path:
        return self.root / "store.key"

    @property
    def journal_file(self) -> Path:
        return self.root / "journal.db"

    @property
    def status_file(self) -> Path:
        return self.root / "status.json"

    @property
    def log_file(self) -> Path:
        return self.root / "run.log"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def serving_file(self) -> Path:
        return self.models / SERVING_FILE

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def databases(self) -> tuple[Path, ...]:
        """Of SQLite, which puts files of its own beside them."""
        return (self.examples_file, self.journal_file, self.serving_file)

    @property
    def written_files(self) -> tuple[Path, ...]:
        """The files at the top that `write_atomically` replaces."""
        return (self.settings_file, self.identity_file, self.store_key_file, self.status_file)

    def settings(self) -> Settings:
        """Read device.json. Raises `InvalidConfig` when this is no enrolled device's directory."""
        try:
            return msgspec.json.decode(self.settings_file.read_bytes(), type=Settings)
        except FileNotFoundError as error:
            raise InvalidConfig(
                f"{self.root} is not the directory of a device",
                hint="make it one with: homespun device enroll --dir DIR --server URL ...",
            ) from error
        except msgspec.MsgspecError as error:
            raise InvalidConfig(
                f"{self.settings_file} cannot be read: {error}",
                hint="correct it, or enrol again: the identity and the examples are kept",
            ) from error
        except OSError as error:
            raise storage_failure(self.settings_file, error) from error

    def write_settings(self, settings: Settings) -> None:
        data = msgspec.json.format(msgspec.json.encode(settings), indent=2)
        write_atomically(self.settings_file, data)


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `data`, readable by its owner only. Raises `StorageFailure`; then the old file is still there.

    `durable`: survive a power cut too, not only the end of the process.
    """
    beside = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise storage_failure(path, error) from error


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Delete a file, or a directory with all it holds; fine if there is none."""
    with storage(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def storage_failure(path: Path, error: Exception) -> StorageFailure:
    """What went wrong with `path`, as our exception."""
    reason = getattr(error, "strerror", None) or str(error)
    return StorageFailure(
        f"{path} cannot be read or written: {reason}",
        hint="check free disk space, permissions and the disk",
    )


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn failures of the disk or of SQLite while using `path` into `StorageFailure`."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise storage_failure(path, error) from error
