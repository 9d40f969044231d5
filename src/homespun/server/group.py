"""One group of secure aggregation at work: a `secagg.server.Group` whose every change is durable before it shows.

All that a group knows is in the snapshot that the database names, so the server may be killed between any two
answers. What devices are told (`asking`) is as of the last durable snapshot, and made only from steps that are over:
those do not change any more, so nobody has to wait for the thread that is taking answers.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from homespun.clock import Clock
from homespun.errors import (
    BadShare,
    Expired,
    HomespunError,
    InvalidConfig,
    NotAllowed,
    SecureAggregationError,
)
from homespun.learning.contribution import Contribution
from homespun.protocol.frame import frame_parts
from homespun.protocol.group import GROUP, LIVE, GroupEvent, GroupState, due
from homespun.protocol.messages import GroupReply, ReportState, RetryWindow, Waiting
from homespun.secagg.messages import AdvertiseKeys, Agree, MaskedInput, ShareKeys, Terms, Unmask
from homespun.secagg.server import Group
from homespun.server.blobs import Blobs, discard
from homespun.server.store import Store
from homespun.server.store.records import GroupChange, GroupCounts, GroupRecord
from homespun.server.store.reports import receipt_id
from homespun.types import Hash

log = structlog.get_logger()

Answer = AdvertiseKeys | ShareKeys | MaskedInput | Agree | Unmask
G = GroupState
AGAIN = Waiting(retry=RetryWindow(earliest_s=0.0, latest_s=1.0))
"""Others are awaited: ask again."""
_CORES = os.cpu_count() or 1
_LONG_VECTOR = 2**20  # bytes
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class Arrival:
    """An answer on its way into a group. `identity`: of its sender; `digest`: of a masked input's body."""

    assignment_id: str
    identity: bytes
    answer: Answer
    digest: Hash = ""


@dataclass(frozen=True)
class _Asking:
    """What is being collected, from whom, and who answered already, by place in the roster."""

    state: GroupState
    group: Group
    places: dict[bytes, int]
    answered: frozenset[int]


class LiveGroup:
    """A group that is not over. `take` and `end_steps` run in one thread at a time; `ask` in any."""

    def __init__(
        self, record: GroupRecord, terms: Terms, store: Store, scope: Blobs, clock: Clock
    ) -> None:
        """`scope`: where the snapshots of its round are."""
        self.record = record
        self._terms = terms
        self._store = store
        self._scope = scope
        self._clock = clock
        self._snapshot: Hash | None = None
        self._group: Group | None = None
        self._asking = _Asking(G.ADVERTISE_KEYS, Group(terms), {}, frozenset())
        self._load()

    def ask(self, identity: bytes) -> GroupReply | None:
        """The next request to a member, `AGAIN`, or None when the group goes on without it."""
        asking = self._asking
        group, index = asking.group, asking.places.get(identity)
        if asking.state is G.ADVERTISE_KEYS or index is None or index in asking.answered:
            return AGAIN
        match asking.state:
            case G.SHARE_KEYS:
                return group.share_keys_request(index)
            case G.MASK_INPUT if index in group.state.shared:
                return group.mask_input_request(index)
            case G.AGREE if index in group.state.masked:
                return group.agree_request()
            case G.UNMASK if index in group.state.agreed:
                return group.unmask_request(index)
            case G.AGREE | G.UNMASK if index not in group.state.masked:
                return None
        return AGAIN

    def take(self, arrivals: Collection[Arrival]) -> dict[Arrival, HomespunError]:
        """Make answers durable, leaving out those that the group or the store refuses, which are returned.

        When the group is over already, nothing changes and nobody is to blame.
        """
        refused: dict[Arrival, HomespunError] = {}
        while fresh := [arrival for arrival in arrivals if arrival not in refused]:
            group = self._load()
            if group is None:
                break
            before = _counts(group)
            new = [arrival for arrival in fresh if self._apply(group, arrival, refused)]
            if _counts(group) == before:
                break
            change = GroupChange(
                state=G(group.state.step),
                counts=_counts(group),
                joined=tuple(a.assignment_id for a in new if isinstance(a.answer, AdvertiseKeys)),
                digests={receipt_id(a.assignment_id): a.digest for a in new if a.digest},
            )
            settled = self._save(group, change)
            if settled is None:
                break
            over = Expired("it is too late for this answer", state=ReportState.LATE)
            for arrival in new:
                if receipt_id(arrival.assignment_id) in settled:
                    refused[arrival] = over
        return refused

    def end_steps(self) -> tuple[bool, bool]:
        """End the steps that are complete or whose time is over. Whether one ended, and whether the group did."""
        moved = False
        while True:
            record, group = self._get(), self._load()
            if record.view.state not in LIVE or group is None:
                return moved, True
            try:
                if not group.can_open() and due(record.view, self._clock.now()) is None:
                    return moved, False
                self._end_step(group, record)
            except (SecureAggregationError, InvalidConfig) as error:
                if isinstance(error, BadShare) and due(record.view, self._clock.now()) is None:
                    return moved, False  # enough shares, but wrong ones among them: more may come
                self._group = None
                self._store.groups.void(record.group_id, error.message, self._clock.now())
                if self._snapshot is not None:
                    discard(self._scope, self._snapshot)
                log.warning("group void", round_id=record.round_id, reason=error.message)
            moved = True

    def _end_step(self, group: Group, record: GroupRecord) -> None:
        state, now = record.view.state, self._clock.now()
        match state:
            case G.ADVERTISE_KEYS:
                group.close_advertise_keys()
            case G.SHARE_KEYS:
                group.close_share_keys()
            case G.MASK_INPUT:
                group.close_mask_input()
            case G.AGREE:
                group.close_agree()
            case _:
                self._open(group, now)
                return
        following = GROUP.next(state, GroupEvent.CLOSE)
        step_s = record.task.spec.groups.step_s
        self._save(group, GroupChange(following, _counts(group), deadline_at=now + step_s))

    def _open(self, group: Group, now: float) -> None:
        # Keystreams are made without the interpreter's lock, key agreements with it (decision 0005): threads help
        # where vectors are long.
        num_threads = _CORES if group.main.nbytes >= _LONG_VECTOR else 1
        with ThreadPoolExecutor(num_threads) as pool:
            main, aux = group.open_sum(pool.map, num_threads)
        total = self._scope.put(*frame_parts(Contribution(main, aux, self._terms.bits)))
        assert self._snapshot is not None
        opened = self._store.groups.open(self.record.group_id, self._snapshot, total, now)
        discard(self._scope, self._snapshot if opened else total)
        self._group = None

    def _apply(self, group: Group, arrival: Arrival, refused: dict[Arrival, HomespunError]) -> bool:
        """Give an answer to the group. Whether it is a new one."""
        known, places, answer = _counts(group), self._asking.places, arrival.answer
        try:
            if isinstance(answer, AdvertiseKeys):
                if answer.identity != arrival.identity:
                    raise NotAllowed("these are the keys of another device")
                group.advertise_keys(answer)
            else:
                if arrival.identity not in places:
                    raise NotAllowed("this device is not in the group's roster")
                index = places[arrival.identity]
                match answer:
                    case ShareKeys():
                        group.share_keys(index, answer)
                    case MaskedInput():
                        group.mask_input(index, answer)
                    case Agree():
                        group.agree(index, answer)
                    case Unmask():
                        group.unmask(index, answer)
        except HomespunError as error:
            refused[arrival] = error
        return _counts(group) != known

    def _save(self, group: Group, change: GroupChange) -> frozenset[Hash] | None:
        """Make the group as it is now durable. None, or what the store has against it: then nothing changed."""
        try:
            snapshot = self._scope.put(*_snapshot_parts(group))
            refused = self._store.groups.record(
                self.record.group_id, self._snapshot, snapshot, change
            )
        except BaseException:
            self._group = None
            raise
        if refused is not None:
            self._group = None
            discard(self._scope, snapshot)
            return refused.receipt_ids
        if self._snapshot is not None:
            discard(self._scope, self._snapshot)
        self._snapshot = snapshot
        self._publish(group)
        return None

    def _get(self) -> GroupRecord:
        return self._store.groups.get(self.record.group_id, self._clock.now())

    def _load(self) -> Group | None:
        """The group as it was last made durable; None when it is over."""
        if self._group is None:
            record = self._get()
            if record.view.state not in LIVE:
                return None
            self._snapshot = record.snapshot
            if self._snapshot is None:
                self._group = Group(self._terms)
            else:
                self._group = _from_snapshot(self._scope.get(self._snapshot), self._terms)
            self._publish(self._group)
        return self._group

    def _publish(self, group: Group) -> None:
        state = G(group.state.step)
        places = self._asking.places
        if state is not G.ADVERTISE_KEYS and not places:
            places = {keys.identity: index for index, keys in enumerate(group.state.roster)}
        answers: dict[GroupState, Collection[int]] = {
            G.SHARE_KEYS: group.state.shared,
            G.MASK_INPUT: group.state.masked,
            G.AGREE: group.state.agreed,
            G.UNMASK: group.state.unmasked,
        }
        self._asking = _Asking(state, group, places, frozenset(answers.get(state, ())))


def _counts(group: Group) -> GroupCounts:
    state = group.state
    return GroupCounts(
        num_devices=len(state.roster),
        num_shared=len(state.shared),
        num_masked=len(state.masked),
        num_agreed=len(state.agreed),
        num_unmasked=len(state.unmasked),
    )


def _snapshot_parts(group: Group) -> tuple[bytes, bytes, memoryview, memoryview]:
    """State with its length, auxiliary and main sum; the sums are views, so that they are not copied."""
    state = group.save()
    return _LENGTH.pack(len(state)), state, group.aux.data.cast("B"), group.main.data.cast("B")


def _from_snapshot(data: bytearray, terms: Terms) -> Group:
    (length,) = _LENGTH.unpack_from(data)
    start = _LENGTH.size + length
    empty = Group(terms)
    middle = start + empty.aux.nbytes
    empty.aux.data.cast("B")[:] = data[start:middle]
    empty.main.data.cast("B")[:] = data[middle:]
    return Group.load(bytes(data[_LENGTH.size : start]), empty.main, empty.aux)
