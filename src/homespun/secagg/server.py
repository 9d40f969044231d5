"""The server's half: one `Group` collects the answers of each step and makes the requests of the next.

    group = Group(terms)
    group.advertise_keys(answer) ...         close_advertise_keys()   U1, the roster
    group.share_keys(index, answer) ...      close_share_keys()       U2
    group.mask_input(index, answer) ...      close_mask_input()       U3
    group.agree(index, answer) ...           close_agree()
    group.unmask(index, answer) ...          open_sum() -> main, aux

Closing a step fixes who goes on, so the shell stores the state first and publishes requests after. Repeating
an answer changes nothing; another answer for the same step is refused. Masked vectors are added to the
running sums and forgotten: memory does not grow with the group, except for keys and shares.

What no threshold of shares can open is never opened: a step that cannot be closed, or a sum that cannot be
unmasked, raises a `SecureAggregationError`, and the group is void.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from enum import StrEnum
from functools import lru_cache, partial
from typing import NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from homespun.errors import (
    BadRoster,
    BadShare,
    GroupTooSmall,
    ShapeMismatch,
    TooManyDropOuts,
    WrongStep,
)
from homespun.secagg import shamir
from homespun.secagg.graph import Graph, choose_shape
from homespun.secagg.masks import Mask, apply_masks, opposite, pairwise_mask, self_mask
from homespun.secagg.messages import (
    AdvertiseKeys,
    Agree,
    AgreeRequest,
    MaskedInput,
    MaskInputRequest,
    RosterEntry,
    ShareKeys,
    ShareKeysRequest,
    Terms,
    Unmask,
    UnmaskRequest,
)
from homespun.secagg.transcript import (
    advertise_text,
    agree_text,
    bitmap,
    check_signature,
    commitment,
    leaf,
    masked_input_text,
    merkle_proof,
    merkle_tree,
    sha256,
    transcript_hash,
)
from homespun.tensors.packing import word
from homespun.types import AnyArray

Sums: TypeAlias = tuple[AnyArray, AnyArray]
"""main: words modulo 2^bits `[d]`; aux: uint64 `[a]`."""

A = TypeVar("A")
MapParts = Callable[[Callable[[list["Secret"]], Sums], list[list["Secret"]]], Iterable[Sums]]
"""`map`, or that of a pool. Processes rather than threads: X25519 holds the interpreter's lock (decision 0005)."""


class Secret(NamedTuple):
    """What the holders of a device gave up: the seed of its self mask; of a lost one, which left `pairs` of
    masks behind, its mask key. `pairs`: surviving neighbours and their public mask keys.
    """

    owner: int
    value: bytes
    pairs: tuple[tuple[int, bytes], ...]


class Step(StrEnum):
    """What the group is collecting."""

    ADVERTISE_KEYS = "advertise_keys"
    SHARE_KEYS = "share_keys"
    MASK_INPUT = "mask_input"
    AGREE = "agree"
    UNMASK = "unmask"


class GroupState(msgspec.Struct, kw_only=True):
    """All of a group but its running sums; serializable, so that a server can be killed between two answers.

    `roster`: in the order of arrival until step 0 is closed, then by `c_key`; the others: by roster index.
    `masked`: SHA-256 of what each device sent, to know a repetition; the vectors themselves are nowhere.
    """

    terms: Terms
    step: Step = Step.ADVERTISE_KEYS
    roster: list[AdvertiseKeys] = []
    shared: dict[int, ShareKeys] = {}
    masked: dict[int, bytes] = {}
    agreed: dict[int, Agree] = {}
    unmasked: dict[int, Unmask] = {}


class Group:
    """One run of the protocol, seen from the server."""

    def __init__(self, terms: Terms) -> None:
        self.state = GroupState(terms=terms)
        self.main = np.zeros(terms.dimension, word(terms.bits))
        self.aux = np.zeros(terms.num_aux, "<u8")

    def save(self) -> bytes:
        """The state as bytes; `main` and `aux` are kept beside it, in the same transaction."""
        return msgspec.msgpack.encode(self.state)

    @classmethod
    def load(cls, data: bytes, main: AnyArray, aux: AnyArray) -> Group:
        state = msgspec.msgpack.decode(data, type=GroupState)
        group = cls(state.terms)
        group.state, group.main, group.aux = state, main, aux
        if state.step is not Step.ADVERTISE_KEYS:
            group._build_graph()
        return group

    # --- step 0: U1 -----------------------------------------------------------------------------------

    def advertise_keys(self, answer: AdvertiseKeys) -> None:
        """Raises `BadSignature`; `BadRoster` for a key that another device has, `WrongStep` for a second one."""
        if answer in self.state.roster:
            return
        self._need(Step.ADVERTISE_KEYS)
        for other in self.state.roster:
            if answer.identity == other.identity:
                raise WrongStep("other keys after the first", identity=answer.identity.hex())
            if answer.c_key == other.c_key or answer.s_key == other.s_key:
                raise BadRoster("two devices have the same key", identity=answer.identity.hex())
        text = advertise_text(
            self.state.terms, answer.identity, answer.c_key, answer.s_key, answer.nonce
        )
        check_signature(answer.identity, answer.signature, text, "advertised keys")
        if len(self.state.roster) == self.state.terms.n_max:
            raise WrongStep("the group is full", n_max=self.state.terms.n_max)
        self.state.roster.append(answer)

    def close_advertise_keys(self) -> None:
        """Fix the roster. Raises `GroupTooSmall`."""
        self._need(Step.ADVERTISE_KEYS)
        self._check_enough(self.state.roster, "advertised keys")
        self.state.roster.sort(key=lambda keys: keys.c_key)
        self._build_graph()
        self.state.step = Step.SHARE_KEYS

    def _build_graph(self) -> None:
        terms, roster = self.state.terms, self.state.roster
        shape = choose_shape(
            len(roster), terms.corrupt_fraction, terms.drop_out_fraction, terms.adversary
        )
        self._tree = merkle_tree([leaf(index, keys) for index, keys in enumerate(roster)])
        self._root = self._tree[-1][0]
        self._entries: dict[int, RosterEntry] = {}
        self.graph = Graph(shape, self._root)
        self.transcript = transcript_hash(terms, shape, self._root)

    def index_of(self, identity: bytes) -> int:
        """A device's place in the roster. Raises `BadRoster` when it has none."""
        for index, keys in enumerate(self.state.roster):
            if keys.identity == identity:
                return index
        raise BadRoster("this device is not in the roster", identity=identity.hex())

    # --- step 1: U2 -----------------------------------------------------------------------------------

    def share_keys_request(self, index: int) -> ShareKeysRequest:
        places = sorted({index, *self.graph.neighbours(index)})
        return ShareKeysRequest(
            index=index,
            num_devices=len(self.state.roster),
            root=self._root,
            entries=tuple(self._entry(place) for place in places),
        )

    def _entry(self, place: int) -> RosterEntry:
        """The same for all neighbours of a device."""
        if place not in self._entries:
            keys, proof = self.state.roster[place], merkle_proof(self._tree, place)
            self._entries[place] = RosterEntry(index=place, keys=keys, proof=proof)
        return self._entries[place]

    def share_keys(self, index: int, answer: ShareKeys) -> None:
        """Raises `BadShare` for a wrong number of shares."""
        if self._is_repeated(Step.SHARE_KEYS, index, answer, self.state.shared):
            return
        _check_number(index, len(self.graph.neighbours(index)), len(answer.sealed))
        self.state.shared[index] = answer

    def close_share_keys(self) -> None:
        """Fix U2. Raises `GroupTooSmall`, `TooManyDropOuts`."""
        self._need(Step.SHARE_KEYS)
        self._check_survivors(self.state.shared, "shared keys")
        self.state.step = Step.MASK_INPUT

    # --- step 2: U3 -----------------------------------------------------------------------------------

    def mask_input_request(self, index: int) -> MaskInputRequest:
        """U2, and the shares that each neighbour in it sealed for this device."""
        sealed = (
            self.state.shared[sender].sealed[self.graph.neighbours(sender).index(index)]
            for sender in self.graph.neighbours(index)
            if sender in self.state.shared
        )
        return MaskInputRequest(shared=self._bitmap(self.state.shared), sealed=tuple(sealed))

    def mask_input(self, index: int, answer: MaskedInput) -> None:
        """Add to the running sums. Raises `BadSignature`, `ShapeMismatch`; then they are as they were."""
        if index not in self.state.masked:
            self._need(Step.MASK_INPUT)
        shared, parts = self._bitmap(self.state.shared), (answer.main, answer.aux)
        words = (np.frombuffer(part, np.uint8) for part in parts)
        text = masked_input_text(self.transcript, index, shared, *words)
        digest = sha256(answer.signature + text)
        if self._is_repeated(Step.MASK_INPUT, index, digest, self.state.masked):
            return
        if index not in self.state.shared:
            raise WrongStep("this device did not share its keys", device=index)
        if len(answer.main) != self.main.nbytes or len(answer.aux) != self.aux.nbytes:
            raise ShapeMismatch(
                "masked vectors have the wrong length",
                expected=self.main.nbytes + self.aux.nbytes,
                got=len(answer.main) + len(answer.aux),
            )
        self._check_signed(index, answer.signature, text, "masked input")
        self.main += np.frombuffer(answer.main, self.main.dtype)
        self.aux += np.frombuffer(answer.aux, self.aux.dtype)
        self.state.masked[index] = digest

    def close_mask_input(self) -> None:
        """Fix U3, for good. Raises `GroupTooSmall`, `TooManyDropOuts`."""
        self._need(Step.MASK_INPUT)
        self._check_survivors(self.state.masked, "sent masked input")
        self.state.step = Step.AGREE

    # --- step 2.5 -------------------------------------------------------------------------------------

    def agree_request(self) -> AgreeRequest:
        return AgreeRequest(survivors=self._bitmap(self.state.masked))

    def agree(self, index: int, answer: Agree) -> None:
        """Raises `BadSignature`."""
        if self._is_repeated(Step.AGREE, index, answer, self.state.agreed):
            return
        if index not in self.state.masked:
            raise WrongStep("this device's masked input is not in the sum", device=index)
        text = agree_text(
            self.transcript, self._bitmap(self.state.shared), self._bitmap(self.state.masked)
        )
        self._check_signed(index, answer.signature, text, "the survivor set")
        self.state.agreed[index] = answer

    def close_agree(self) -> None:
        """Raises `TooManyDropOuts` when too few agreed to open every secret."""
        self._need(Step.AGREE)
        for owner in self.state.shared:
            self.graph.check_holders(owner, self.state.agreed, "agreed")
        self.state.step = Step.UNMASK

    # --- step 3 ---------------------------------------------------------------------------------------

    def unmask_request(self, index: int) -> UnmaskRequest:
        signers = [other for other in self.graph.neighbours(index) if other in self.state.agreed]
        return UnmaskRequest(
            survivors=self._bitmap(self.state.masked),
            signers=self._bitmap(signers),
            signatures=tuple(self.state.agreed[signer].signature for signer in signers),
        )

    def unmask(self, index: int, answer: Unmask) -> None:
        """Raises `BadShare` for a wrong number of shares."""
        if self._is_repeated(Step.UNMASK, index, answer, self.state.unmasked):
            return
        if index not in self.state.agreed:
            raise WrongStep("this device did not agree to the survivor set", device=index)
        _check_number(index, len(self._owners(index)), len(answer.shares))
        self.state.unmasked[index] = answer

    def _owners(self, holder: int) -> list[int]:
        """Whose shares a device holds, in the order of its answer."""
        return [owner for owner in self.graph.holders(holder) if owner in self.state.shared]

    def can_open(self) -> bool:
        """Whether every secret has enough shares, so that nobody else needs to answer."""
        if self.state.step is not Step.UNMASK:
            return False
        holders, unmasked = self.graph.holders, self.state.unmasked
        return all(
            sum(holder in unmasked for holder in holders(owner)) >= self.graph.shape.threshold
            for owner in self.state.shared
        )

    def open_sum(self, map_parts: MapParts = map, num_parts: int = 1) -> Sums:
        """The sum of the survivors' vectors, without masks; the running sums stay as they are.

        `map_parts` may run `num_parts` parts at once, each with sums of its own. Raises `TooManyDropOuts`
        when a secret has too few shares, `BadShare` when too many of them are wrong.
        """
        self._need(Step.UNMASK)
        secrets = self._open_secrets()
        # Lost devices cost k masks each, survivors one: every part gets its share of both.
        secrets.sort(key=lambda secret: not secret.pairs)
        parts = [part for start in range(num_parts) if (part := secrets[start::num_parts])]
        sum_of_masks = partial(_sum_of_masks, self.state.terms, self.transcript)
        main, aux = self.main.copy(), self.aux.copy()
        for part_main, part_aux in map_parts(sum_of_masks, parts):
            main -= part_main
            aux -= part_aux
        main &= main.dtype.type(2**self.state.terms.bits - 1)
        return main, aux

    def _open_secrets(self) -> list[Secret]:
        """Survivors' seeds and lost devices' mask keys, each from t shares of it."""
        given: dict[int, dict[int, bytes]] = {owner: {} for owner in sorted(self.state.shared)}
        for holder, answer in sorted(self.state.unmasked.items()):
            for owner, share in zip(self._owners(holder), answer.shares, strict=True):
                given[owner][holder + 1] = share
        for owner in given:
            self.graph.check_holders(owner, self.state.unmasked, "gave up their shares")
        t = self.graph.shape.threshold
        secrets = shamir.combine_all(
            [list(shares)[:t] for shares in given.values()],
            [list(shares.values())[:t] for shares in given.values()],
        )
        return [
            Secret(
                owner,
                secret if self._fits(owner, secret) else self._open_again(owner, given[owner]),
                self._pairs(owner),
            )
            for owner, secret in zip(given, secrets, strict=True)
        ]

    def _open_again(self, owner: int, shares: dict[int, bytes]) -> bytes:
        """Some holder gave a wrong share: try other t of them, in turn. Raises `BadShare` when none fit."""
        coordinates = list(shares)
        for start in range(1, len(coordinates)):
            chosen = (coordinates[start:] + coordinates[:start])[: self.graph.shape.threshold]
            secret = shamir.combine(chosen, [shares[coordinate] for coordinate in chosen])
            if self._fits(owner, secret):
                return secret
        raise BadShare("shares give another secret than was committed to", device=owner)

    def _fits(self, owner: int, secret: bytes) -> bool:
        """Whether it is what its owner committed to."""
        if owner in self.state.masked:
            committed = self.state.shared[owner].commitment
            return commitment(self.transcript, owner, secret) == committed
        key = X25519PrivateKey.from_private_bytes(secret)
        return key.public_key().public_bytes_raw() == self.state.roster[owner].s_key

    def _pairs(self, owner: int) -> tuple[tuple[int, bytes], ...]:
        """Whose masks a lost device left behind: surviving neighbours and their public mask keys."""
        if owner in self.state.masked:
            return ()
        others = [other for other in self.graph.neighbours(owner) if other in self.state.masked]
        return tuple((other, self.state.roster[other].s_key) for other in others)

    # --- what every step checks -----------------------------------------------------------------------

    def _need(self, step: Step) -> None:
        if self.state.step is not step:
            raise WrongStep(f"the group is not at {step}", expected=self.state.step, got=step)

    def _is_repeated(self, step: Step, index: int, answer: A, known: dict[int, A]) -> bool:
        """Whether this very answer is known already, even from a step that is over."""
        if index in known and known[index] == answer:
            return True
        self._need(step)
        if not 0 <= index < len(self.state.roster):
            raise BadRoster("no such device in the roster", device=index)
        if index in known:
            raise WrongStep(f"another answer to {step} after the first", device=index)
        return False

    def _check_signed(self, index: int, signature: bytes, text: bytes, what: str) -> None:
        check_signature(self.state.roster[index].identity, signature, text, what)

    def _check_enough(self, devices: Collection[object], what: str) -> None:
        n_min = self.state.terms.n_min
        if len(devices) < n_min:
            raise GroupTooSmall(f"too few devices {what}", expected=n_min, got=len(devices))

    def _check_survivors(self, alive: Collection[int], what: str) -> None:
        self._check_enough(alive, what)
        lost, bearable = len(self.state.roster) - len(alive), self.graph.shape.max_drop_outs
        if lost > bearable:
            raise TooManyDropOuts(f"too few devices {what}", expected=f"<= {bearable}", got=lost)
        for owner in self.state.shared:
            self.graph.check_holders(owner, alive, what)

    def _bitmap(self, devices: Iterable[int]) -> bytes:
        return _known_bitmap(tuple(devices), len(self.state.roster))


def _sum_of_masks(terms: Terms, transcript: bytes, secrets: list[Secret]) -> Sums:
    """The masks that are still in the running sums because of some devices; what a pool's worker needs."""
    main, aux = np.zeros(terms.dimension, word(terms.bits)), np.zeros(terms.num_aux, "<u8")
    masks = (mask for secret in secrets for mask in _masks_of(transcript, secret))
    apply_masks(main, aux, masks)
    return main, aux


def _masks_of(transcript: bytes, secret: Secret) -> Iterator[Mask]:
    if not secret.pairs:
        yield self_mask(secret.value, transcript, secret.owner)
        return
    key = X25519PrivateKey.from_private_bytes(secret.value)
    for other, public in secret.pairs:
        yield opposite(pairwise_mask(key, public, transcript, secret.owner, other))


@lru_cache(maxsize=16)
def _known_bitmap(devices: tuple[int, ...], num_devices: int) -> bytes:
    """U2 and U3 go to every device, and making one costs as much as checking a signature."""
    return bitmap(devices, num_devices)


def _check_number(device: int, expected: int, got: int) -> None:
    if got != expected:
        raise BadShare("not one share per neighbour", device=device, expected=expected, got=got)
