"""Secure aggregation inside a simulation: really masked, really unmasked, with the code of devices and servers.

It shows that the masks leave the sum as it is, and what a group costs. For small cohorts: the work of all devices and
of the server is done here, one after another. Keys are of the run's own making, so nothing here is secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun.errors import InvalidConfig
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.secagg import device
from homespun.secagg.messages import Terms
from homespun.secagg.server import Group

SMALLEST = 3
_NONE = "0" * 64
"""Stands for plan and checkpoint, which the group binds: within one simulation there is nothing to confuse."""


def secure_sum(
    codec: ContributionCodec, contributions: Sequence[Contribution], number: int = 1
) -> Contribution:
    """The sum of all contributions as one group opens it. Raises `InvalidConfig` for fewer than 3."""
    if len(contributions) < SMALLEST:
        raise InvalidConfig(
            "a secure sum needs more clients",
            hint="raise the cohort, or lower the drop-out",
            expected=f">= {SMALLEST}",
            got=len(contributions),
        )
    terms = Terms(
        task="simulation",
        round_number=number,
        attempt=1,
        checkpoint_hash=_NONE,
        plan_hash=_NONE,
        bits=codec.bits,
        dimension=codec.dimension,
        num_aux=len(codec.aux_names),
        schema=codec.schema,
        clip=codec.clip,
        n_min=SMALLEST,
        n_max=codec.max_group,
    )
    group = Group(terms)
    members = [_Member(terms, place, mine) for place, mine in enumerate(contributions)]
    for member in members:
        group.advertise_keys(member.advertise_keys())
    group.close_advertise_keys()
    indexed = [(group.index_of(member.identity), member) for member in members]
    for index, member in indexed:
        group.share_keys(index, member.share_keys(group.share_keys_request(index)))
    group.close_share_keys()
    for index, member in indexed:
        group.mask_input(index, member.mask_input(group.mask_input_request(index)))
    group.close_mask_input()
    for index, member in indexed:
        group.agree(index, member.agree(group.agree_request()))
    group.close_agree()
    for index, member in indexed:
        group.unmask(index, member.unmask(group.unmask_request(index)))
    main, aux = group.open_sum()
    return Contribution(main, aux, codec.bits)


class _Member:
    """One device's half: its state goes from step to step."""

    def __init__(self, terms: Terms, place: int, contribution: Contribution) -> None:
        self._terms, self._mine = terms, contribution
        self._entropy = _entropy(f"{terms.round_number}/{place}")
        self._key = Ed25519PrivateKey.from_private_bytes(self._entropy(32))
        self.identity = self._key.public_key().public_bytes_raw()
        self._state: Any = None

    def _kept(self, made: tuple[Any, Any]) -> Any:
        self._state, answer = made
        return answer

    def advertise_keys(self) -> Any:
        terms = self._terms
        work = device.Work(
            task=terms.task,
            round_number=terms.round_number,
            attempt=terms.attempt,
            plan_hash=terms.plan_hash,
            ancestry=(terms.checkpoint_hash,),
            bits=terms.bits,
            dimension=terms.dimension,
            num_aux=terms.num_aux,
            schema=terms.schema,
            clip=terms.clip,
            n_max=terms.n_max,
        )
        demands = device.Demands(SMALLEST)
        return self._kept(
            device.advertise_keys(terms, work, demands, self.identity, self._key, self._entropy)
        )

    def share_keys(self, request: Any) -> Any:
        return self._kept(device.share_keys(self._state, request, self._entropy))

    def mask_input(self, request: Any) -> Any:
        main, aux = self._mine.main, self._mine.aux
        return self._kept(device.mask_input(self._state, request, main, aux, self._key))

    def agree(self, request: Any) -> Any:
        return self._kept(device.agree(self._state, request, self._key))

    def unmask(self, request: Any) -> Any:
        return self._kept(device.unmask(self._state, request))


def _entropy(name: str) -> Callable[[int], bytes]:
    """Bytes that are the same in every run, and never the same twice within one."""
    drawn = 0

    def draw(size: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(f"homespun-simulation/{name}/{drawn}".encode()).digest(size)

    return draw
