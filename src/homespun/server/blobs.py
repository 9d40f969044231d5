"""Blobs: bytes under their own SHA-256, in a directory.

A blob appears whole or not at all: written to a temporary file, synced, renamed, the directory synced. It is
checked against its address when it is read back. A scope is a place of its own within the store, so that what
two rounds hold is never the same file and one can be cleared without asking the other.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from homespun.errors import HomespunError, NotFound, StorageFailure, TooLarge
from homespun.tensors.codec import digest, is_hash
from homespun.types import Hash

Buffer = bytes | bytearray | memoryview


class Blobs(Protocol):
    """Where bytes are kept. Every method raises `StorageFailure` when the medium fails."""

    def put(self, *parts: Buffer) -> Hash:
        """Store the concatenation of `parts`; durable on return. Raises `TooLarge`."""

    def get(self, address: Hash) -> bytearray:
        """The whole blob, verified. Raises `NotFound`; `StorageFailure` when it is damaged."""

    def read(self, address: Hash, start: int, length: int) -> bytes:
        """A part of it, as it lies there; the reader verifies. Raises `NotFound`."""

    def size(self, address: Hash) -> int:
        """Bytes of a blob. Raises `NotFound`."""

    def delete(self, address: Hash) -> None:
        """Forget a blob; deleting what is not there is fine."""

    def addresses(self) -> Iterator[Hash]:
        """Every blob here, not those of scopes within."""

    def scope(self, name: str) -> Blobs:
        """A place of its own within this one."""

    def scopes(self) -> Iterator[str]:
        """Names of the scopes that hold or held something."""

    def clear(self) -> None:
        """Forget everything here."""


class LocalBlobs:
    """`Blobs` in a local directory, which is created when something is stored."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes

    def put(self, *parts: Buffer) -> Hash:
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        size = sum(len(view) for view in views)
        if size > self._max_bytes:
            raise TooLarge("the blob is too large", expected=self._max_bytes, got=size)
        hasher = hashlib.sha256()
        for view in views:
            hasher.update(view)
        address = hasher.hexdigest()
        path = self._root / address
        with _named_failures(f"store a blob of {size} bytes"):
            if path.exists() and path.stat().st_size == size:
                return address
            if not self._root.exists():
                self._root.mkdir(parents=True)
                _sync_directory(self._root.parent)
            temporary = self._root / f"{address}.{secrets.token_hex(4)}.part"
            try:
                with temporary.open("wb", buffering=0) as file:
                    for view in views:
                        _write_all(file.fileno(), view)
                    os.fsync(file.fileno())
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            _sync_directory(self._root)
        return address

    def get(self, address: Hash) -> bytearray:
        data = bytearray(self.size(address))
        with _named_failures(f"read blob {address[:12]}"), self._path(address).open("rb") as file:
            file.readinto(data)
        if digest(data) != address:
            raise StorageFailure(
                f"blob {address[:12]} is damaged: its bytes are not those of its address",
                hint="restore it from a backup, or remove the file and push it again",
            )
        return data

    def read(self, address: Hash, start: int, length: int) -> bytes:
        self.size(address)
        with _named_failures(f"read blob {address[:12]}"), self._path(address).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def size(self, address: Hash) -> int:
        try:
            return self._path(address).stat().st_size
        except FileNotFoundError as error:
            raise NotFound(f"there is no blob {address[:12]}", hash=address) from error

    def delete(self, address: Hash) -> None:
        with _named_failures(f"delete blob {address[:12]}"):
            self._path(address).unlink(missing_ok=True)

    def addresses(self) -> Iterator[Hash]:
        if self._root.exists():
            yield from sorted(p.name for p in self._root.iterdir() if is_hash(p.name))

    def scope(self, name: str) -> LocalBlobs:
        return LocalBlobs(self._root / name, self._max_bytes)

    def scopes(self) -> Iterator[str]:
        if self._root.exists():
            yield from sorted(p.name for p in self._root.iterdir() if p.is_dir())

    def clear(self) -> None:
        with _named_failures("clear a blob directory"):
            if self._root.exists():
                shutil.rmtree(self._root)

    def sweep(self) -> None:
        """Remove what a crash left half-written, here and in every scope."""
        with _named_failures("clean the blob directory"):
            for part in self._root.rglob("*.part"):
                part.unlink(missing_ok=True)

    def _path(self, address: Hash) -> Path:
        if not is_hash(address):
            raise NotFound(f"{address[:80]!r} is not the address of a blob")
        return self._root / address


def discard(blobs: Blobs, address: Hash) -> None:
    """Forget a snapshot that nothing refers to; what cannot be deleted now goes with its scope."""
    with suppress(HomespunError):
        blobs.delete(address)


@contextmanager
def _named_failures(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageFailure(
            f"cannot {what}: {error.strerror}",
            hint="free some disk space" if full else "check the disk and its permissions",
        ) from error


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
