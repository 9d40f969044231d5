"""What device and server say to each other, step by step: a request from the server, an answer from the device.

    step             request               answer
    advertise_keys   Terms                 AdvertiseKeys
    share_keys       ShareKeysRequest      ShareKeys
    mask_input       MaskInputRequest      MaskedInput
    agree            AgreeRequest          Agree
    unmask           UnmaskRequest         Unmask

Devices are named by their index in the roster, sets of them are bitmaps (`transcript.bitmap`), and lists per
neighbour are in ascending order of its index, so that both sides know what stands where. Bytes are base64 in
JSON, and a request carries its step as `type`. How messages travel, and until when, is the shell's business.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from homespun.secagg.graph import Adversary

SUITE = "ring-x25519-ed25519-aes128-shamir16"

Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Sealed = Annotated[bytes, Meta(min_length=80, max_length=80)]
Bitmap = Annotated[bytes, Meta(max_length=8192)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Index = Annotated[int, Meta(ge=0, lt=2**16)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A record with exactly these fields."""


class Terms(Message, frozen=True, kw_only=True, tag="advertise_keys"):
    """Step 0, request: what this group computes and how well it is protected. Bound into T, in this order.

    `version`: of these messages; `suite`: the cryptography; `task`: its name; `checkpoint_hash`: that all members
    trained from, or with `max_staleness` above 0 the head of the chain within whose last links each member's lies;
    `bits`: the modulus of the main vector is 2^bits; `dimension`: d, words of the main vector; `num_aux`: a, words of
    the auxiliary vector; `schema`: names the encoding and the layout of the auxiliary vector; `clip`: bound of an
    entry; `n_min`: fewest devices in a sum; `n_max`: most, for which the encoding leaves room; `corrupt_fraction`: of
    the devices, that may work together with the server; `drop_out_fraction`: of the devices, that may be lost;
    `adversary`: what the server may do; `max_staleness`: links of the chain between members' checkpoints.
    """

    version: Literal[1] = 1
    suite: str = SUITE
    task: str
    round_number: Count
    attempt: Count
    checkpoint_hash: Sha256
    plan_hash: Sha256
    bits: Annotated[int, Meta(ge=1, le=32)]
    dimension: Annotated[int, Meta(ge=0, lt=2**32)]
    num_aux: Annotated[int, Meta(ge=0, lt=2**16)]
    schema: str
    clip: float
    n_min: Annotated[int, Meta(ge=3, lt=2**16)]
    n_max: Annotated[int, Meta(ge=3, lt=2**16)]
    corrupt_fraction: Fraction = 0.1
    drop_out_fraction: Fraction = 0.2
    adversary: Adversary = Adversary.SEMI_MALICIOUS
    max_staleness: Count = 0


class AdvertiseKeys(Message, frozen=True, kw_only=True):
    """Step 0, answer: two fresh X25519 keys, signed by the device's identity (Ed25519).

    `identity`: raw Ed25519 key; `c_key`: encrypts shares; `s_key`: makes masks; `nonce`: makes the roster
    unpredictable; `signature`: over the terms and all of these.
    """

    identity: Bytes32
    c_key: Bytes32
    s_key: Bytes32
    nonce: Bytes16
    signature: Signature


class RosterEntry(Message, frozen=True, kw_only=True):
    """A device's place in the roster, with the Merkle proof for it.

    `index`: its place, from 0; `keys`: as it advertised them; `proof`: siblings from the leaf to the root.
    """

    index: Index
    keys: AdvertiseKeys
    proof: Annotated[tuple[Bytes32, ...], Meta(max_length=16)]


class ShareKeysRequest(Message, frozen=True, kw_only=True, tag="share_keys"):
    """Step 1, request: the roster is closed.

    It is in ascending order of `c_key`. `index`: of the device that is asked; `num_devices`: n; `root`: of the
    roster's Merkle tree; `entries`: the device itself and its neighbours, ascending.
    """

    index: Index
    num_devices: Index
    root: Bytes32
    entries: tuple[RosterEntry, ...]


class ShareKeys(Message, frozen=True, kw_only=True):
    """Step 1, answer. `sealed`: shares, for each neighbour; `commitment`: to the seed of the self mask."""

    sealed: tuple[Sealed, ...]
    commitment: Bytes32


class MaskInputRequest(Message, frozen=True, kw_only=True, tag="mask_input"):
    """Step 2, request. `shared`: U2, who shared keys, bitmap; `sealed`: from each neighbour in it, for this device."""

    shared: Bitmap
    sealed: tuple[Sealed, ...]


class MaskedInput(Message, frozen=True, kw_only=True):
    """Step 2, answer: the masked vectors as little-endian words. It travels as a frame.

    `main`: words below 2^bits in 16 bits each, or in 32 if bits > 16; `aux`: words of 64 bits; `signature`: over both.
    """

    main: bytes
    aux: bytes
    signature: Signature


class AgreeRequest(Message, frozen=True, kw_only=True, tag="agree"):
    """Step 2.5, request. `survivors`: U3, whose masked input is in the sum, bitmap."""

    survivors: Bitmap


class Agree(Message, frozen=True, kw_only=True):
    """Step 2.5, answer. `signature`: over T, U2 and U3."""

    signature: Signature


class UnmaskRequest(Message, frozen=True, kw_only=True, tag="unmask"):
    """Step 3, request. `signers`: neighbours that agreed, bitmap; `signatures`: theirs, on the same T, U2 and U3."""

    survivors: Bitmap
    signers: Bitmap
    signatures: tuple[Signature, ...]


class Unmask(Message, frozen=True, kw_only=True):
    """Step 3, answer. `shares`: of each owner in U2, 32 bytes: of its seed if it is in U3, else of its mask key."""

    shares: tuple[Bytes32, ...]
