"""Signed requests: every device request carries an Ed25519 signature over what it asks.

    Homespun-Device      device id (absent when enrolling)
    Homespun-Time        Unix seconds
    Homespun-Signature   base64 Ed25519 over the text below

    homespun-request-v1 \n METHOD \n path \n time \n SHA-256 of the body, hexadecimal

A replayed request within `MAX_SKEW_S` is harmless, because every endpoint is idempotent.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from homespun.errors import NotAuthentic
from homespun.tensors.codec import digest
from homespun.types import Hash

DEVICE_HEADER = "Homespun-Device"
TIME_HEADER = "Homespun-Time"
SIGNATURE_HEADER = "Homespun-Signature"
MAX_SKEW_S = 300.0

RELEASE_CONTEXT = b"homespun-release-v1\n"


class Signer(Protocol):
    """An Ed25519 private key, wherever it is kept."""

    def sign(self, data: bytes, /) -> bytes: ...


def device_id(public_key: bytes) -> str:
    """A device's id: the first 16 bytes of the SHA-256 of its raw Ed25519 public key, hexadecimal."""
    return hashlib.sha256(public_key).hexdigest()[:32]


def request_text(method: str, path: str, time: str, body_hash: Hash) -> bytes:
    """What a request's signature covers."""
    return "\n".join(("homespun-request-v1", method.upper(), path, time, body_hash)).encode()


def request_headers(
    key: Signer, device: str, method: str, path: str, now: float, body: bytes
) -> dict[str, str]:
    """Device half: the headers of a signed request."""
    time = f"{now:.3f}"
    signature = key.sign(request_text(method, path, time, digest(body)))
    return {
        DEVICE_HEADER: device,
        TIME_HEADER: time,
        SIGNATURE_HEADER: base64.b64encode(signature).decode(),
    }


def verify_request(
    public_key: bytes,
    method: str,
    path: str,
    time: str,
    signature: str,
    body_hash: Hash,
    now: float,
) -> None:
    """Server half. Raises `NotAuthentic`."""
    try:
        skew = abs(float(time) - now)
    except ValueError as error:
        raise NotAuthentic(f"the {TIME_HEADER} header is not a number") from error
    if not skew <= MAX_SKEW_S:
        raise NotAuthentic(
            "the request's time is too far from the server's",
            hint="set the clock",
            skew_s=skew,
            server_time=now,
        )
    verify(public_key, signature, request_text(method, path, time, body_hash))


def verify(public_key: bytes, signature: str, data: bytes) -> None:
    """Raise `NotAuthentic` unless base64 `signature` over `data` is by raw Ed25519 `public_key`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(
            base64.b64decode(signature, validate=True), data
        )
    except (InvalidSignature, ValueError) as error:
        raise NotAuthentic(
            "the signature does not verify", hint="enrol again if the key was lost"
        ) from error
