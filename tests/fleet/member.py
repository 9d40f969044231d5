"""The device's half of secure aggregation over the real HTTP application, one exchange at a time.

The state goes through its bytes at every step, as on a phone that is killed between any two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from homespun.device.secure import carry, group_work
from homespun.errors import WrongStep
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import Contribution
from homespun.learning.optimizers import server_optimizer
from homespun.protocol.frame import encode_masked_input
from homespun.protocol.messages import (
    Assigned,
    Carried,
    GroupReply,
    Receipt,
    ReportState,
    Settled,
    Waiting,
    encode,
)
from homespun.secagg import device as secagg
from homespun.secagg.messages import (
    AgreeRequest,
    MaskedInput,
    MaskInputRequest,
    ShareKeysRequest,
    Terms,
    UnmaskRequest,
)
from homespun.tensors import codec as tensors
from tests.fleet.device import Device

if TYPE_CHECKING:
    from tests.fleet.world import World

STEPS = ("advertise-keys", "share-keys", "mask-input", "agree", "unmask")
STEP_S = 60.0
"""Longest that a step waits, as in `GroupSpec`."""
MOST_TURNS = 80
_STEP_OF: dict[Any, str] = {
    Terms: "advertise-keys",
    Carried: "advertise-keys",
    ShareKeysRequest: "share-keys",
    MaskInputRequest: "mask-input",
    AgreeRequest: "agree",
    UnmaskRequest: "unmask",
}


@dataclass
class Member:
    """One device's passage through groups.

    `leaves_at`: the step that it is gone before; `last`: what was asked of it last; `sent`: step -> body, of the
    group that it is in; `assigned` and `ancestry`: as they are after it was carried.
    """

    device: Device
    assigned: Assigned
    task_name: str
    leaves_at: str = ""
    demands: secagg.Demands = field(default_factory=lambda: secagg.Demands(3, max_staleness=99))
    last: GroupReply | None = None
    state: bytes = b""
    sent: dict[str, bytes] = field(default_factory=dict)
    num_drawn: int = 0
    ancestry: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"/v1/assignments/{self.assigned.assignment_id}/group"

    @property
    def contribution(self) -> Contribution:
        return self.device.contribution(self.assigned, self.staleness)

    @property
    def staleness(self) -> int:
        return len(self.ancestry) - 1 if self.ancestry else 0

    @property
    def receipt(self) -> Receipt | None:
        return self.last.receipt if isinstance(self.last, Settled) else None

    @property
    def asked(self) -> str | None:
        """The step that is asked of it; None: it waits, or is through."""
        return _STEP_OF.get(type(self.last)) if self.last is not None else None

    @property
    def gone(self) -> bool:
        """It left; or it helped to open a group and was then asked to join another, which no device does."""
        again = isinstance(self.last, Terms | Carried) and "unmask" in self.sent
        return again or (self.asked is not None and self.asked == self.leaves_at)

    @property
    def through(self) -> bool:
        """Nothing more is to be expected of it."""
        return self.gone or isinstance(self.last, Settled)

    def ask(self, wait_s: int = 0) -> GroupReply:
        self.last = self.device.call(GroupReply, "GET", self.path, Prefer=f"wait={wait_s}")
        return self.last

    def put(self, step: str, body: bytes, wait_s: int = 0) -> GroupReply:
        path = f"{self.path}/{step}"
        reply: GroupReply = self.device.call(GroupReply, "PUT", path, body, Prefer=f"wait={wait_s}")
        return reply

    def send(self, step: str, body: bytes, wait_s: int = 0) -> GroupReply:
        self.sent[step] = body
        self.last = self.put(step, body, wait_s)
        return self.last

    def step(self, wait_s: int = 0) -> bool:
        """One exchange: answer what was asked, or ask. False when it is through."""
        if self.through:
            return False
        request, self.last = self.last, None  # no answer: it asks again
        if request is None or isinstance(request, Waiting):
            self.ask(wait_s)
        else:
            step, body = self.answer(request)
            with suppress(WrongStep):  # it came after the step was over
                self.send(step, body, wait_s)
        return not self.through

    def answer(self, request: Any) -> tuple[str, bytes]:
        """What an honest device says: the step's name in the path, and the body."""
        step = _STEP_OF[type(request)]
        return step, self._body(request)

    def _body(self, request: Any) -> bytes:
        key = self.device.key
        answer: Any
        if isinstance(request, Carried):
            self.assigned = carry(self.assigned, self.ancestry, request)
            self.ancestry, request = request.ancestry, request.terms
        match request:
            case Terms():
                self.sent.clear()
                identity = self.device.public
                state, answer = secagg.advertise_keys(
                    request,
                    self.work,
                    self.demands,
                    identity,
                    key,
                    self._entropy,
                )
            case ShareKeysRequest():
                state, answer = secagg.share_keys(self._state, request, self._entropy)
            case MaskInputRequest():
                mine = self.contribution
                state, answer = secagg.mask_input(self._state, request, mine.main, mine.aux, key)
            case AgreeRequest():
                state, answer = secagg.agree(self._state, request, key)
            case _:
                state, answer = secagg.unmask(self._state, request)
        self.state = secagg.save(state)
        if isinstance(answer, MaskedInput):
            return encode_masked_input(answer, self.assigned.encoding.bits)
        return encode(answer)

    @property
    def work(self) -> secagg.Work:
        codec = self.device.codec(self.assigned)
        return group_work(self.task_name, self.assigned, codec, self.ancestry)

    @property
    def _state(self) -> secagg.DeviceState:
        return secagg.load(self.state)

    def _entropy(self, size: int) -> bytes:
        """As good as random here, never the same twice, and the same in every run."""
        self.num_drawn += 1
        name = f"{self.device.index}/{self.assigned.assignment_id}/{self.num_drawn}".encode()
        return hashlib.shake_256(name).digest(size)


def play(world: World, members: Sequence[Member], rng: Random | None = None) -> None:
    """Everybody does what is asked until all are through; when nobody can go on, time passes.

    `rng`: of the order in which they come. Fails when they get stuck.
    """
    for _ in range(MOST_TURNS):
        turn = [member for member in members if not member.through]
        if not turn:
            return
        if rng is not None:
            rng.shuffle(turn)
        for member in turn:
            member.step()
        if not any(member.asked and not member.gone for member in turn):
            world.settle()
            for member in turn:
                member.step()
            if all(isinstance(member.last, Waiting) or member.gone for member in turn):
                world.pass_time(STEP_S)
    raise AssertionError("the round is stuck")


def included(members: Iterable[Member]) -> list[Member]:
    """Those whose report went into a checkpoint."""
    return [m for m in members if m.device.receipt(m.assigned).state is ReportState.INCLUDED]


def plain_checkpoint(world: World, members: Sequence[Member]) -> str:
    """The checkpoint that the contributions of these members make, without any secure aggregation.

    Each is a sum of its own here, so that it does not matter who was summed with whom.
    """
    device, assigned = members[0].device, members[0].assigned
    codec, rule = device.codec(assigned), server_optimizer("FedAvg", {})
    base = (members[0].ancestry or assigned.checkpoints)[-1]
    parameters = world.deployment.library.checkpoint(base)
    moved, _, _ = Algorithm(world.plan.manifest.shapes, codec, rule).server_update(
        parameters, rule.init(parameters), *(member.contribution for member in members)
    )
    return tensors.digest(tensors.encode_tree(moved))
