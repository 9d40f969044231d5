"""The device's half, one function per step: old state and request in, new state and answer out.

The state is serializable, because phones kill processes: `save` what a function returns before sending its
answer. Then a repeated request gets the same answer again, and another one for the same step is refused
forever. In particular a device masks its vectors once, signs one survivor set and answers one unmasking.
The state holds secrets: it is kept encrypted and deleted with the session.

A device raises a `SecureAggregationError` and takes no further part as soon as something is not as it must be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from homespun.errors import (
    BadRoster,
    BadShare,
    BadSignature,
    GroupTooSmall,
    ShapeMismatch,
    SurvivorsChanged,
    TooManyDropOuts,
    WeakTerms,
    WrongStep,
    WrongSurvivors,
    WrongTerms,
)
from homespun.secagg import shamir
from homespun.secagg.graph import Adversary, Graph, choose_shape
from homespun.secagg.masks import (
    SHARE_LABEL,
    apply_masks,
    key_agreement,
    pair_key,
    pairwise_mask,
    self_mask,
)
from homespun.secagg.messages import (
    SUITE,
    AdvertiseKeys,
    Agree,
    AgreeRequest,
    MaskedInput,
    MaskInputRequest,
    Message,
    ShareKeys,
    ShareKeysRequest,
    Terms,
    Unmask,
    UnmaskRequest,
)
from homespun.secagg.transcript import (
    advertise_text,
    agree_text,
    check_proof,
    check_signature,
    commitment,
    fields,
    is_signed,
    leaf,
    masked_input_text,
    members,
    transcript_hash,
)
from homespun.tensors.packing import word
from homespun.types import AnyArray, Hash

SMALLEST_GROUP = 3
"""No device ever takes part in a smaller sum, whatever its policy says."""
_NONCE = bytes(12)  # each sealing key is used once

Entropy = Callable[[int], bytes]
"""n -> n unpredictable bytes, from the operating system (tests: reproducible ones)."""


class Signer(Protocol):
    """The device's Ed25519 identity key, wherever it is kept."""

    def sign(self, data: bytes, /) -> bytes: ...


@dataclass(frozen=True)
class Demands:
    """The device's own policy, which no server can override: the weakest terms that it accepts."""

    smallest_group: int = 10
    corrupt_fraction: float = 0.05
    adversary: Adversary = Adversary.SEMI_MALICIOUS
    max_staleness: int = 0


@dataclass(frozen=True)
class Work:
    """What the device did and is about to contribute; the terms must say the same.

    `n_max`: the largest group for which the encoding leaves room; `ancestry`: the checkpoint that it trained
    from, then those that followed, as the device was told, up to the one that its sum will move.
    """

    task: str
    round_number: int
    attempt: int
    plan_hash: Hash
    ancestry: tuple[Hash, ...]
    bits: int
    dimension: int
    num_aux: int
    schema: str
    clip: float
    n_max: int


# --- state --------------------------------------------------------------------------------------------


class Peer(Message, frozen=True, kw_only=True):
    """A neighbour. `open_key`: opens the shares that it sent to this device."""

    identity: bytes
    s_key: bytes
    open_key: bytes


class Advertised(Message, frozen=True, kw_only=True, tag="advertised"):
    """After step 0."""

    terms: Terms
    c_secret: bytes
    s_secret: bytes
    seed: bytes
    keys: AdvertiseKeys


class Shared(Advertised, frozen=True, kw_only=True, tag="shared"):
    """After step 1. `own_share`: of its own secrets, in a complete graph."""

    index: int
    num_devices: int
    root: bytes
    transcript: bytes
    peers: dict[int, Peer]
    own_share: bytes
    roster_digest: bytes
    share_keys: ShareKeys


class Masked(Shared, frozen=True, kw_only=True, tag="masked"):
    """After step 2. `shares`: held for others, by owner; `digest`: of request and masked input."""

    shared: bytes
    shares: dict[int, bytes]
    digest: bytes


class Agreed(Masked, frozen=True, kw_only=True, tag="agreed"):
    """After step 2.5. `survivors`: the only U3 that this device will ever hear of."""

    survivors: bytes
    agree: Agree


class Answered(Agreed, frozen=True, kw_only=True, tag="answered"):
    """After step 3: recorded before it is sent."""

    unmask: Unmask


DeviceState = Advertised | Shared | Masked | Agreed | Answered
S = TypeVar("S", bound=Advertised)


def save(state: DeviceState) -> bytes:
    """The state as bytes. Secret."""
    return msgspec.msgpack.encode(state)


def load(data: bytes) -> DeviceState:
    """The state that `save` made."""
    state: DeviceState = msgspec.msgpack.decode(data, type=DeviceState)
    return state


def _advance(state: Advertised, kind: type[S], **new: Any) -> S:
    return kind(**msgspec.structs.asdict(state), **new)


def _need(state: Advertised, kind: type[S], step: str) -> S:
    if not isinstance(state, kind):
        raise WrongStep(f"{step} came too early", got=type(state).__name__.lower())
    return state


def _digest(message: Message) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(message)).digest()


# --- step 0 -------------------------------------------------------------------------------------------


def advertise_keys(
    terms: Terms,
    work: Work,
    demands: Demands,
    identity: bytes,
    signer: Signer,
    entropy: Entropy,
) -> tuple[Advertised, AdvertiseKeys]:
    """Check the terms and make fresh keys. Draws 32, 32, 32 and 16 bytes: c secret, s secret, seed, nonce.

    `identity`: the raw public key of `signer`. Raises `WrongTerms`, `WeakTerms`.
    """
    _check_terms(terms, work, demands)
    c_secret, s_secret, seed, nonce = entropy(32), entropy(32), entropy(32), entropy(16)
    c_key = X25519PrivateKey.from_private_bytes(c_secret).public_key().public_bytes_raw()
    s_key = X25519PrivateKey.from_private_bytes(s_secret).public_key().public_bytes_raw()
    signature = signer.sign(advertise_text(terms, identity, c_key, s_key, nonce))
    keys = AdvertiseKeys(
        identity=identity, c_key=c_key, s_key=s_key, nonce=nonce, signature=signature
    )
    state = Advertised(terms=terms, c_secret=c_secret, s_secret=s_secret, seed=seed, keys=keys)
    return state, keys


def _check_terms(terms: Terms, work: Work, demands: Demands) -> None:
    if terms.suite != SUITE:
        raise WrongTerms("unknown suite", expected=SUITE, got=terms.suite)
    names = ("task", "round_number", "attempt", "plan_hash")
    for name in (*names, "bits", "dimension", "num_aux", "schema", "clip", "n_max"):
        if getattr(terms, name) != getattr(work, name):
            raise WrongTerms(
                f"the group's {name} is not that of this device's work",
                expected=getattr(work, name),
                got=getattr(terms, name),
            )
    if terms.checkpoint_hash not in work.ancestry[: terms.max_staleness + 1]:
        raise WrongTerms(
            "the group's checkpoint is not the one that this device trained from",
            expected=work.ancestry[0],
            got=terms.checkpoint_hash,
        )
    smallest = max(SMALLEST_GROUP, demands.smallest_group)
    if terms.n_min < smallest:
        raise WeakTerms(
            "the group may be smaller than this device accepts", expected=smallest, got=terms.n_min
        )
    if terms.max_staleness > demands.max_staleness:
        raise WeakTerms(
            "the group mixes base checkpoints",
            expected=demands.max_staleness,
            got=terms.max_staleness,
        )
    trusting = terms.adversary is Adversary.SEMI_HONEST
    if terms.corrupt_fraction < demands.corrupt_fraction or (
        trusting and demands.adversary is not Adversary.SEMI_HONEST
    ):
        raise WeakTerms(
            "the graph bears fewer corrupt devices than this device asks for",
            expected=demands.corrupt_fraction,
            got=terms.corrupt_fraction,
            adversary=terms.adversary,
        )


# --- step 1 -------------------------------------------------------------------------------------------


def share_keys(
    state: Advertised, request: ShareKeysRequest, entropy: Entropy
) -> tuple[Shared, ShareKeys]:
    """Check the roster and split both secrets among the neighbours, sealed.

    Draws 64 (t - 1) bytes: coefficients of degree 1 to t-1, each 32 for the s secret, then 32 for the seed.
    Raises `GroupTooSmall`, `BadRoster`, `BadSignature`; `WrongStep` for a second roster.
    """
    if isinstance(state, Shared):
        if _digest(request) != state.roster_digest:
            raise WrongStep("another roster after the first")
        return state, state.share_keys
    terms, me = state.terms, request.index
    if not terms.n_min <= request.num_devices <= terms.n_max:
        raise GroupTooSmall(
            "the roster's size is not what the terms promise",
            expected=f"{terms.n_min}..{terms.n_max}",
            got=request.num_devices,
        )
    graph = _graph(terms, request.num_devices, request.root)
    roster = _check_roster(state, request, graph)
    transcript = transcript_hash(terms, graph.shape, request.root)

    holders = graph.holders(me)
    secret = state.s_secret + state.seed
    random = entropy(shamir.num_random_bytes(len(secret), graph.shape.threshold))
    coordinates = [holder + 1 for holder in holders]
    shares = shamir.split(secret, graph.shape.threshold, coordinates, random)
    c_secret = X25519PrivateKey.from_private_bytes(state.c_secret)
    peers, sealed, own_share = {}, [], b""
    for holder, share in zip(holders, shares, strict=True):
        if holder == me:
            own_share = share
            continue
        keys = roster[holder]
        agreed = key_agreement(c_secret, keys.c_key, holder)
        # One pair key is two AES keys, one for each direction: none seals twice.
        both = pair_key(agreed, transcript, SHARE_LABEL, me, holder)
        low, high = both[:16], both[16:]
        seal_key, open_key = (low, high) if me < holder else (high, low)
        sealed.append(AESGCM(seal_key).encrypt(_NONCE, share, _address(transcript, me, holder)))
        peers[holder] = Peer(identity=keys.identity, s_key=keys.s_key, open_key=open_key)
    answer = ShareKeys(sealed=tuple(sealed), commitment=commitment(transcript, me, state.seed))
    new = _advance(
        state,
        Shared,
        index=me,
        num_devices=request.num_devices,
        root=request.root,
        transcript=transcript,
        peers=peers,
        own_share=own_share,
        roster_digest=_digest(request),
        share_keys=answer,
    )
    return new, answer


def _graph(terms: Terms, num_devices: int, root: bytes) -> Graph:
    shape = choose_shape(
        num_devices, terms.corrupt_fraction, terms.drop_out_fraction, terms.adversary
    )
    return Graph(shape, root)


def _address(transcript: bytes, sender: int, receiver: int) -> bytes:
    """Associated data of sealed shares: no other sender, receiver, step or group."""
    return fields("homespun-secagg-sealed-v1", transcript, sender, receiver)


def _check_roster(
    state: Advertised, request: ShareKeysRequest, graph: Graph
) -> dict[int, AdvertiseKeys]:
    """The keys of the device itself and its neighbours, by index; every one proven and signed."""
    me, num_devices = request.index, request.num_devices
    if me >= num_devices:
        raise BadRoster("this device's place is not in the roster", device=me)
    expected = sorted({me, *graph.neighbours(me)})
    if [entry.index for entry in request.entries] != expected:
        raise BadRoster(
            "the server chose other neighbours than the graph",
            expected=len(expected),
            got=len(request.entries),
        )
    roster = {entry.index: entry.keys for entry in request.entries}
    if roster[me] != state.keys:
        raise BadRoster("this device's keys were changed", device=me)
    c_keys = [keys.c_key for keys in roster.values()]
    s_keys = {keys.s_key for keys in roster.values()}
    identities = {keys.identity for keys in roster.values()}
    if c_keys != sorted(set(c_keys)) or not len(s_keys) == len(identities) == len(roster):
        raise BadRoster("the roster is out of order or lists a device twice")
    for entry in request.entries:
        node = leaf(entry.index, entry.keys)
        check_proof(request.root, num_devices, entry.index, node, entry.proof)
        keys = entry.keys
        text = advertise_text(state.terms, keys.identity, keys.c_key, keys.s_key, keys.nonce)
        check_signature(keys.identity, keys.signature, text, f"device {entry.index}'s keys")
    return roster


# --- step 2 -------------------------------------------------------------------------------------------


def mask_input(
    state: Advertised, request: MaskInputRequest, main: AnyArray, aux: AnyArray, signer: Signer
) -> tuple[Masked, MaskedInput]:
    """Open the shares meant for this device, then hide its vectors. Called again, it repeats its bytes.

    `main`: words modulo 2^bits `[d]`; `aux`: uint64 `[a]`; neither is changed. Raises `TooManyDropOuts`,
    `WrongSurvivors`, `BadShare`; `ShapeMismatch` for vectors that do not fit the terms; `WrongStep` for a
    second set of sharers or other vectors, whose masked forms together would give the difference away.
    """
    state = _need(state, Shared, "mask_input")
    graph = _graph(state.terms, state.num_devices, state.root)
    alive = _check_survivors(state, graph, request.shared, "shared keys")
    shares = _open_shares(state, request, graph, alive)
    masked_main, masked_aux = _check_vectors(state.terms, main, aux)
    s_secret = X25519PrivateKey.from_private_bytes(state.s_secret)
    masks = [self_mask(state.seed, state.transcript, state.index)]
    masks += [
        pairwise_mask(s_secret, peer.s_key, state.transcript, state.index, other)
        for other, peer in state.peers.items()
        if other in alive
    ]
    apply_masks(masked_main, masked_aux, masks)
    masked_main &= masked_main.dtype.type(2**state.terms.bits - 1)
    text = masked_input_text(state.transcript, state.index, request.shared, masked_main, masked_aux)
    digest = hashlib.sha256(_digest(request) + text).digest()
    if isinstance(state, Masked) and state.digest != digest:
        raise WrongStep("other vectors or another request after the first masked input")
    answer = MaskedInput(
        main=masked_main.tobytes(), aux=masked_aux.tobytes(), signature=signer.sign(text)
    )
    if isinstance(state, Masked):
        return state, answer
    return _advance(state, Masked, shared=request.shared, shares=shares, digest=digest), answer


def _check_survivors(state: Shared, graph: Graph, bits: bytes, what: str) -> frozenset[int]:
    """The set of a bitmap, if this device is in it and it is large enough to go on."""
    alive = members(bits, state.num_devices)
    if state.index not in alive:
        raise WrongSurvivors(f"this device is not among those that {what}", device=state.index)
    if len(alive) < state.terms.n_min:
        raise GroupTooSmall(f"too few devices {what}", expected=state.terms.n_min, got=len(alive))
    lost = state.num_devices - len(alive)
    if lost > graph.shape.max_drop_outs:
        raise TooManyDropOuts(
            f"too few devices {what}", expected=f"<= {graph.shape.max_drop_outs}", got=lost
        )
    graph.check_holders(state.index, alive, what)
    return alive


def _open_shares(
    state: Shared, request: MaskInputRequest, graph: Graph, alive: frozenset[int]
) -> dict[int, bytes]:
    senders = [holder for holder in state.peers if holder in alive]
    if len(request.sealed) != len(senders):
        raise BadShare("shares are missing", expected=len(senders), got=len(request.sealed))
    shares = {state.index: state.own_share} if state.own_share else {}
    for sender, sealed in zip(senders, request.sealed, strict=True):
        address = _address(state.transcript, sender, state.index)
        try:
            share = AESGCM(state.peers[sender].open_key).decrypt(_NONCE, sealed, address)
        except InvalidTag as error:
            raise BadShare(
                "a share does not open",
                hint="the server may show devices different models or rosters",
                sender=sender,
                device=state.index,
            ) from error
        shares[sender] = share
    return shares


def _check_vectors(terms: Terms, main: AnyArray, aux: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Copies to mask."""
    for name, array, dtype, size in (
        ("main", main, word(terms.bits), terms.dimension),
        ("aux", aux, "<u8", terms.num_aux),
    ):
        if array.dtype != dtype or array.shape != (size,):
            raise ShapeMismatch(
                f"the {name} vector does not fit the group's terms",
                expected=f"{dtype}[{size}]",
                got=f"{array.dtype}{list(array.shape)}",
            )
    return main.copy(), aux.copy()


# --- step 2.5 -----------------------------------------------------------------------------------------


def agree(state: Advertised, request: AgreeRequest, signer: Signer) -> tuple[Agreed, Agree]:
    """Sign the survivor set, once. Raises `WrongSurvivors`, `TooManyDropOuts`; `SurvivorsChanged` for another."""
    state = _need(state, Masked, "agree")
    if isinstance(state, Agreed):
        _check_unchanged(state, request.survivors)
        return state, state.agree
    graph = _graph(state.terms, state.num_devices, state.root)
    alive = _check_survivors(state, graph, request.survivors, "sent masked input")
    if not alive <= members(state.shared, state.num_devices):
        raise WrongSurvivors("a survivor never shared its keys")
    text = agree_text(state.transcript, state.shared, request.survivors)
    answer = Agree(signature=signer.sign(text))
    return _advance(state, Agreed, survivors=request.survivors, agree=answer), answer


def _check_unchanged(state: Agreed, survivors: bytes) -> None:
    if survivors != state.survivors:
        raise SurvivorsChanged(
            "another survivor set after the first",
            hint="the server tries to open single contributions; nothing was sent",
        )


# --- step 3 -------------------------------------------------------------------------------------------


def unmask(state: Advertised, request: UnmaskRequest) -> tuple[Answered, Unmask]:
    """Give up one share per neighbour, once, when enough neighbours signed the same survivor set.

    Save the new state before sending the answer. Raises `SurvivorsChanged`, `BadSignature`.
    """
    state = _need(state, Agreed, "unmask")
    _check_unchanged(state, request.survivors)
    if isinstance(state, Answered):
        return state, state.unmask
    graph = _graph(state.terms, state.num_devices, state.root)
    alive = members(state.survivors, state.num_devices)
    signers = sorted(members(request.signers, state.num_devices))
    if len(signers) != len(request.signatures):
        raise BadSignature(
            "signatures are missing", expected=len(signers), got=len(request.signatures)
        )
    text = agree_text(state.transcript, state.shared, state.survivors)
    signed = int(bool(state.own_share))  # in a complete graph it is a holder of its own secrets
    for signer, signature in zip(signers, request.signatures, strict=True):
        if signed >= graph.shape.threshold:
            break
        if signer in state.peers and signer in alive:
            signed += is_signed(state.peers[signer].identity, signature, text)
    if signed < graph.shape.threshold:
        raise BadSignature(
            "too few neighbours signed the same survivor set",
            expected=f">= {graph.shape.threshold}",
            got=signed,
        )
    answer = Unmask(
        shares=tuple(
            share[32:] if owner in alive else share[:32]
            for owner, share in sorted(state.shares.items())
        )
    )
    return _advance(state, Answered, unmask=answer), answer
