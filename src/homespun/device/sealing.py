"""Sealing: what lies on the disk is AES-GCM under the device's key. Delete the key and all of it is forgotten.

The key is a file of the same directory. So this guards what leaves the directory without it (a backup, a copied
work folder, deleted files that the flash memory still holds), not against whoever reads all of it.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from homespun.device.home import storage, sync_directory, write_atomically
from homespun.errors import StorageFailure

KEY_BYTES = 32
NONCE_BYTES = 12


def destroy_key(path: Path) -> None:
    """Overwrite and delete a key; fine if there is none.

    Flash memory writes elsewhere than where the old bytes are, and keeps those until it needs the place.
    """
    with storage(path):
        if not path.exists():
            return
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        sync_directory(path.parent)


class Seal:
    """The key in `path`, made now if there is none. Raises `StorageFailure` when it is damaged."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            write_atomically(path, AESGCM.generate_key(8 * KEY_BYTES))
        with storage(path):
            key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise StorageFailure(
                f"{path} is not a store's key",
                hint="restore it; or delete it, which forgets every example",
            )
        self._path, self._cipher = path, AESGCM(key)

    def seal(self, plain: bytes, bound: bytes) -> bytes:
        """`bound`: what the sealed bytes cannot be separated from; they open with the same only."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, bound)

    def unseal(self, sealed: bytes, bound: bytes, where: Path) -> bytes:
        """What was sealed and lay in `where`. Raises `StorageFailure`."""
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound)
        except (InvalidTag, ValueError) as error:
            raise StorageFailure(
                f"{where} is damaged, or {self._path.name} is not its key",
                hint=f"restore {self._path.name}; or delete it, which forgets every example",
            ) from error
