"""The server's secrets, made on first start and readable by its owner only.

`operator.token` opens the operator API; `publisher.key` (Ed25519) signs plans and releases.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun.errors import StorageFailure
from homespun.protocol.messages import ReleaseManifest, SignedRelease, encode
from homespun.protocol.signing import RELEASE_CONTEXT


@dataclass(frozen=True)
class Keys:
    """`publisher`: what devices of this server trust."""

    operator_token: str
    publisher: Ed25519PrivateKey

    @property
    def publisher_public(self) -> bytes:
        """Raw Ed25519 public key."""
        return self.publisher.public_key().public_bytes_raw()

    def sign_release(self, manifest: ReleaseManifest) -> SignedRelease:
        """The manifest's exact bytes with their signature."""
        data = encode(manifest)
        signature = self.publisher.sign(RELEASE_CONTEXT + data)
        return SignedRelease(
            manifest=base64.b64encode(data).decode(),
            signature=base64.b64encode(signature).decode(),
        )


def load_keys(data_dir: Path) -> Keys:
    """Read the keys, or make them. Raises `StorageFailure` for a damaged one."""
    token = _load(data_dir / "operator.token", lambda: secrets.token_urlsafe(32))
    secret = _load(data_dir / "publisher.key", lambda: secrets.token_hex(32))
    try:
        publisher = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    except ValueError as error:
        raise StorageFailure(
            f"{data_dir / 'publisher.key'} is damaged",
            hint="restore it: devices trust no other key",
        ) from error
    return Keys(token, publisher)


def _load(path: Path, make: Callable[[], str]) -> str:
    """The file's only line. Whoever creates it wins; a crash leaves it whole or absent."""
    try:
        if not path.exists():
            temporary = path.with_suffix(f".{secrets.token_hex(4)}.part")
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(make() + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    path.hardlink_to(temporary)
            finally:
                temporary.unlink(missing_ok=True)
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageFailure(
            f"cannot read or create {path}: {error}", hint="check the disk and its permissions"
        ) from error
    if not text:
        raise StorageFailure(f"{path} is empty", hint="restore it, or delete it to make a new one")
    return text
