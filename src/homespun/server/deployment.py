"""A deployment: everything that one running server consists of, put together."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from homespun.clock import Clock
from homespun.errors import InvalidConfig, StorageFailure
from homespun.server.auth import Doorkeeper
from homespun.server.blobs import Blobs, LocalBlobs
from homespun.server.board import Board
from homespun.server.groups import GroupDesk
from homespun.server.intake import ByteBudget, Intake
from homespun.server.keys import Keys, load_keys
from homespun.server.library import Library
from homespun.server.notify import SCHEDULER, Notices
from homespun.server.paces import Paces
from homespun.server.releases import ReleaseDesk
from homespun.server.rounds import Scheduler
from homespun.server.settings import Settings
from homespun.server.store import Store


@dataclass(frozen=True)
class Deployment:
    """`blobs`: what devices may be granted; `private`: sums and optimizer states, which nobody may see."""

    settings: Settings
    clock: Clock
    keys: Keys
    store: Store
    blobs: Blobs
    private: Blobs
    library: Library
    board: Board
    paces: Paces
    desk: ReleaseDesk
    doorkeeper: Doorkeeper
    notices: Notices
    intake: Intake
    groups: GroupDesk
    scheduler: Scheduler
    uploads: ByteBudget


def open_deployment(settings: Settings, clock: Clock) -> Deployment:
    """Open what is in the data directory; create what is not there yet.

    Raises `InvalidConfig` when the directory cannot be used, `StorageFailure` when something in it is damaged.
    """
    _make_directory(settings.data_dir)
    keys = load_keys(settings.data_dir)
    store = Store(settings.database)
    blobs = LocalBlobs(settings.data_dir / "blobs", settings.max_checkpoint)
    private = LocalBlobs(settings.data_dir / "private", settings.max_checkpoint * 3)
    blobs.sweep()
    private.sweep()
    library = Library(store, blobs, keys)
    paces = Paces(store)
    board = Board(store, library, blobs, paces, settings.retry)
    desk = ReleaseDesk(store, library, keys)
    notices = Notices()
    intake = Intake(store, private, settings, lambda: notices.ring(SCHEDULER))
    groups = GroupDesk(
        store=store,
        library=library,
        private=private,
        settings=settings,
        notices=notices,
        clock=clock,
    )
    scheduler = Scheduler(
        store=store,
        library=library,
        blobs=blobs,
        private=private,
        board=board,
        desk=desk,
        intake=intake,
        groups=groups,
        paces=paces,
        notices=notices,
        clock=clock,
    )
    board.refresh(clock.now())
    return Deployment(
        settings=settings,
        clock=clock,
        keys=keys,
        store=store,
        blobs=blobs,
        private=private,
        library=library,
        board=board,
        paces=paces,
        desk=desk,
        doorkeeper=Doorkeeper(store, clock, keys),
        notices=notices,
        intake=intake,
        groups=groups,
        scheduler=scheduler,
        uploads=ByteBudget(settings.upload_memory),
    )


def lock_directory(data_dir: Path) -> int:
    """Take the data directory for this process; the lock ends with it. Raises `InvalidConfig`."""
    _make_directory(data_dir)
    descriptor = os.open(data_dir / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InvalidConfig(
            f"another server is running in {data_dir}",
            hint="stop it, or use another data directory",
        ) from error
    return descriptor


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFailure(
                f"no space left for the data directory {path}", hint="free some disk space"
            ) from error
        raise InvalidConfig(
            f"the data directory {path} cannot be written: {error.strerror}",
            hint="choose another with --data, or change its permissions",
        ) from error
