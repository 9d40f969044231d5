"""The device's identity: an Ed25519 key that never leaves its directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun.device.home import storage, write_atomically
from homespun.errors import StorageFailure
from homespun.protocol.signing import device_id

KEY_BYTES = 32


class Identity:
    """`device_id` is a hash of the public key; `sign` makes it a `protocol.signing.Signer`."""

    def __init__(self, private_key: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private_key)
        self.public_key = self._key.public_key().public_bytes_raw()
        self.device_id = device_id(self.public_key)

    def sign(self, data: bytes, /) -> bytes:
        return self._key.sign(data)

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read the key. Raises `StorageFailure` when it is missing or damaged."""
        with storage(path):
            data = path.read_bytes()
        if len(data) != KEY_BYTES:
            raise StorageFailure(
                f"{path} is not a device's key",
                hint="restore it, or enrol a new device in another directory",
                expected=KEY_BYTES,
                got=len(data),
            )
        return cls(data)

    @classmethod
    def load_or_create(cls, path: Path, seed: int | None = None) -> Identity:
        """The key at `path`, made now if there is none.

        With `seed` a new key follows from it. That is for experiments that must draw the same devices
        again: whoever knows the seed can be this device.
        """
        if not path.exists():
            if seed is None:
                key = Ed25519PrivateKey.generate().private_bytes_raw()
            else:
                key = hashlib.sha256(f"homespun-identity-v1/{seed}".encode()).digest()
            write_atomically(path, key)
        return cls.load(path)
