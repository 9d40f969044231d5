"""What everybody must agree on, as bytes: the roster's Merkle root, and the hash T that every seed depends on.

A server that shows one device another model, plan or roster gives it another T, and then its shares do not
open and its masks do not cancel.

Every hash and signature covers `fields(label, ...)`: each value as its length (uint32) and its bytes, where
text is UTF-8 and every number, whole or not, an IEEE 754 double; all little-endian. Hashes in hexadecimal are
text.
The tree is that of RFC 6962: an odd node at the end of a row moves up as it is.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Sequence

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from homespun.errors import BadRoster, BadSignature, WrongSurvivors
from homespun.secagg.graph import Shape
from homespun.secagg.messages import AdvertiseKeys, Terms
from homespun.types import AnyArray


def fields(label: str, *values: bytes | str | int | float) -> bytes:
    """The canonical bytes of a list of values; no two lists have the same."""
    parts = [label.encode()]
    for value in values:
        match value:
            case bytes():
                parts.append(value)
            case str():
                parts.append(value.encode())
            case int() | float():  # whole numbers stay below 2^53
                parts.append(struct.pack("<d", value))
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def sha256(data: bytes | memoryview) -> bytes:
    """SHA-256 as bytes."""
    return hashlib.sha256(data).digest()


# --- the roster ---------------------------------------------------------------------------------------


def leaf(index: int, keys: AdvertiseKeys) -> bytes:
    """The hash of one device's place in the roster."""
    values = msgspec.structs.astuple(keys)
    return sha256(b"\0" + fields("homespun-secagg-leaf-v1", index, *values))


def merkle_tree(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """All rows, leaves first; the last row is the root alone."""
    rows = [list(leaves)]
    while len(rows[-1]) > 1:
        row = rows[-1]
        pairs = zip(row[::2], row[1::2], strict=False)
        rows.append([_parent(*pair) for pair in pairs] + row[len(row) & ~1 :])
    return rows


def merkle_proof(tree: list[list[bytes]], index: int) -> tuple[bytes, ...]:
    """The siblings on the way from leaf `index` to the root."""
    proof = []
    for row in tree[:-1]:
        if index ^ 1 < len(row):
            proof.append(row[index ^ 1])
        index >>= 1
    return tuple(proof)


def check_proof(
    root: bytes, num_leaves: int, index: int, node: bytes, proof: Sequence[bytes]
) -> None:
    """Raise `BadRoster` unless `node` is leaf `index` of the tree with this root and size."""
    position, width, siblings = index, num_leaves, iter(proof)
    while width > 1:
        if position ^ 1 < width:
            sibling = next(siblings, b"")
            node = _parent(sibling, node) if position & 1 else _parent(node, sibling)
        position, width = position >> 1, (width + 1) >> 1
    if node != root or next(siblings, None) is not None:
        raise BadRoster("keys do not belong to the roster", device=index)


def _parent(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right)


# --- the transcript hash ------------------------------------------------------------------------------


def transcript_hash(terms: Terms, shape: Shape, root: bytes) -> bytes:
    """T: binds every term, the graph's n, k and t, and the roster."""
    return sha256(
        fields(
            "homespun-secagg-transcript-v1",
            *msgspec.structs.astuple(terms),
            shape.num_devices,
            shape.degree,
            shape.threshold,
            root,
        )
    )


def commitment(transcript: bytes, index: int, seed: bytes) -> bytes:
    """H(b): says nothing about the seed, and there is no second one for it."""
    return sha256(fields("homespun-secagg-commitment-v1", transcript, index, seed))


# --- what is signed -----------------------------------------------------------------------------------


def advertise_text(
    terms: Terms, identity: bytes, c_key: bytes, s_key: bytes, nonce: bytes
) -> bytes:
    """What step 0's signature covers."""
    agreed = msgspec.structs.astuple(terms)
    return fields("homespun-secagg-advertise-v1", *agreed, identity, c_key, s_key, nonce)


def masked_input_text(
    transcript: bytes, index: int, shared: bytes, main: AnyArray, aux: AnyArray
) -> bytes:
    """What step 2's signature covers: the vectors by the hashes of their little-endian words."""
    hashes = (sha256(main.data), sha256(aux.data))
    return fields("homespun-secagg-masked-input-v1", transcript, index, shared, *hashes)


def agree_text(transcript: bytes, shared: bytes, survivors: bytes) -> bytes:
    """What step 2.5's signature covers: the bitmaps U2 and U3."""
    return fields("homespun-secagg-agree-v1", transcript, shared, survivors)


def check_signature(identity: bytes, signature: bytes, text: bytes, what: str) -> None:
    """Raise `BadSignature` unless Ed25519 (RFC 8032) `signature` over `text` is by `identity`."""
    if not is_signed(identity, signature, text):
        raise BadSignature(f"the signature of {what} does not verify", identity=identity.hex())


def is_signed(identity: bytes, signature: bytes, text: bytes) -> bool:
    """Whether `signature` over `text` is by `identity`."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


# --- survivor sets ------------------------------------------------------------------------------------


def bitmap(devices: Collection[int], num_devices: int) -> bytes:
    """A set of indices: bit i of byte i // 8, least significant first, is device i."""
    return sum(1 << index for index in devices).to_bytes(-(-num_devices // 8), "little")


def members(bits: bytes, num_devices: int) -> frozenset[int]:
    """The indices in a bitmap. Raises `WrongSurvivors` for another length or a device that is not there."""
    value = int.from_bytes(bits, "little")
    if len(bits) != -(-num_devices // 8) or value >> num_devices:
        raise WrongSurvivors("the bitmap names devices that are not in the roster")
    return frozenset(index for index in range(num_devices) if value >> index & 1)
