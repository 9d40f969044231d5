"""Masks: from two devices' keys to one long pseudo-random vector that both can make and nobody else.

    shared secret   X25519 (RFC 7748), 32 bytes
    pair key        HKDF-SHA256 (RFC 5869): salt = transcript hash, info = label | min(i,j) | max(i,j), the two
                    indices as uint32 little-endian; 32 bytes
    mask            AES-128-CTR with pair key[:16] as key and pair key[16:] as the first counter block (big-endian
                    increment); first the auxiliary words (uint64), then, from the next whole 16-byte block on, the
                    main words (uint16 or uint32), all little-endian

Keystream words are uniform, so a mask modulo 2^bits needs no rejection. Keystream is made in 256 KB pieces, each
straight into one reused buffer and from there added to its piece of the vector, which stays in the cache
while all masks pass over it.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from homespun.errors import BadRoster
from homespun.types import AnyArray

Mask: TypeAlias = tuple[bytes, bool]
"""A pair key, and whether its mask is added (True) or subtracted."""

MASK_LABEL = b"homespun-secagg-mask"
SELF_LABEL = b"homespun-secagg-self"
SHARE_LABEL = b"homespun-secagg-share"

_SEGMENT = 1 << 18
_BLOCK = 16
_ZEROS = memoryview(bytes(_SEGMENT))
_AT_ONCE = 64  # ciphers alive at a time


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869), extract and expand; `size` at most 8160."""
    key = hmac.digest(salt or bytes(32), secret, "sha256")
    block = output = b""
    for counter in range(1, -(-size // 32) + 1):
        block = hmac.digest(key, block + info + bytes((counter,)), "sha256")
        output += block
    return output[:size]


def key_agreement(secret: X25519PrivateKey, public: bytes, device: int) -> bytes:
    """The secret shared with `device`. Raises `BadRoster` if its key is no usable point."""
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise BadRoster("a key in the roster is not usable", device=device) from error


def pair_key(secret: bytes, transcript: bytes, label: bytes, i: int, j: int) -> bytes:
    """32 bytes for the pair {i, j} (or for i alone, when they are equal)."""
    pair = min(i, j).to_bytes(4, "little") + max(i, j).to_bytes(4, "little")
    return hkdf(secret, transcript, label + pair)


def pairwise_mask(
    secret: X25519PrivateKey, public: bytes, transcript: bytes, i: int, j: int
) -> Mask:
    """Device i's mask with neighbour j: the lower index adds what the higher one subtracts."""
    shared = key_agreement(secret, public, j)
    return pair_key(shared, transcript, MASK_LABEL, i, j), i < j


def self_mask(seed: bytes, transcript: bytes, i: int) -> Mask:
    """Device i's own mask, which only t of its neighbours can take away."""
    return pair_key(seed, transcript, SELF_LABEL, i, i), True


def opposite(mask: Mask) -> Mask:
    """What takes `mask` away again."""
    key, added = mask
    return key, not added


def apply_masks(main: AnyArray, aux: AnyArray, masks: Iterable[Mask]) -> None:
    """Add or subtract `masks`, in place. `main`: words `[d]`; `aux`: uint64 `[a]`; both wrap around."""
    keystream = np.empty(_SEGMENT + _BLOCK, np.uint8)  # update_into asks for a block more
    entries = _SEGMENT // main.itemsize
    remaining: Iterator[Mask] = iter(masks)
    while batch := list(islice(remaining, _AT_ONCE)):
        streams = [
            (Cipher(algorithms.AES(key[:16]), modes.CTR(key[16:])).encryptor().update_into, added)
            for key, added in batch
        ]
        for start in range(0, aux.size, _SEGMENT // 8):
            _apply(aux[start : start + _SEGMENT // 8], streams, keystream)
        for start in range(0, main.size, entries):
            _apply(main[start : start + entries], streams, keystream)


def _apply(words: AnyArray, streams: list[tuple[Any, bool]], keystream: AnyArray) -> None:
    zeros = _ZEROS[: -(-words.nbytes // _BLOCK) * _BLOCK]
    mask = keystream[: words.nbytes].view(words.dtype)
    for update_into, added in streams:
        update_into(zeros, keystream)
        (np.add if added else np.subtract)(words, mask, out=words)
