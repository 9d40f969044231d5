"""Whether a device takes part: its conditions, the task's criteria, and its own policy.

Decided on the device. The server learns only that a device claimed; the reasons stay here, for the person
who asks why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta

from homespun.protocol.messages import Aggregation, Message, Offer, Positive
from homespun.protocol.selection import in_bucket

CONDITIONS = ("idle", "charging", "unmetered", "battery_ok", "cool", "storage_ok", "memory_ok")
"""What a device can measure of itself. A value is True, False, or None: the platform cannot tell."""

Conditions = Mapping[str, bool | None]


class Policy(Message, frozen=True, kw_only=True):
    """The device's own rules, which no server can override.

    `allow_plain`: accept tasks without secure aggregation; `min_group`: never be part of a sum over fewer devices;
    `unknown_is_met`: count a condition that the platform cannot report as met; `max_daily_*`: participations and
    bytes per 24 hours; `max_memory_bytes`, `max_cpu_share`: what a plan may allocate and use of one core.
    """

    allow_plain: bool = False
    min_group: Positive = 10
    unknown_is_met: bool = False
    max_daily_participations: Annotated[int, Meta(ge=0)] = 48
    max_daily_bytes: Annotated[int, Meta(ge=0)] = 500_000_000
    max_memory_bytes: Annotated[int, Meta(ge=100_000_000)] = 1_000_000_000
    max_cpu_share: Annotated[float, Meta(ge=0.05, le=1.0)] = 1.0


class Facts(Message, frozen=True, kw_only=True):
    """What the device knows of itself when it judges an offer. None: unknown, which is never eligible."""

    device_id: str
    num_examples: int | None
    last_round: int | None
    daily_participations: int
    daily_bytes: int


class Refusal(Message, frozen=True, kw_only=True):
    """One reason not to take part: a stable `code` and a sentence for the person."""

    code: str
    text: str


def unmet_conditions(
    requires: tuple[str, ...], conditions: Conditions, policy: Policy
) -> tuple[Refusal, ...]:
    """The required conditions that do not hold now."""
    refusals = []
    for name in requires:
        value, words = conditions.get(name), name.replace("_", " ")
        if value is None and not policy.unknown_is_met:
            refusals.append(
                Refusal(code=f"unknown_{name}", text=f"cannot tell whether the device is {words}")
            )
        elif value is False:
            refusals.append(Refusal(code=f"not_{name}", text=f"the device is not {words}"))
    return tuple(refusals)


def judge(
    offer: Offer, conditions: Conditions, policy: Policy, facts: Facts
) -> tuple[Refusal, ...]:
    """Every reason why the device does not take this offer; empty means eligible."""
    criteria = offer.criteria
    refusals = list(unmet_conditions(criteria.requires, conditions, policy))

    def refuse(code: str, text: str) -> None:
        refusals.append(Refusal(code=code, text=text))

    if offer.aggregation is Aggregation.PLAIN and not policy.allow_plain:
        refuse(
            "plain_aggregation",
            "the task is not securely aggregated and the device's policy does not allow that",
        )
    if offer.min_group < policy.min_group:
        refuse(
            "small_group",
            f"sums over {offer.min_group} devices; the device's policy asks for {policy.min_group}",
        )
    if not in_bucket(criteria.bucket, facts.device_id):
        refuse("not_in_bucket", "the task is for other devices")
    if facts.num_examples is None:
        refuse("unknown_examples", "cannot tell how many examples the store holds")
    elif facts.num_examples < criteria.min_examples:
        refuse(
            "too_few_examples",
            f"{facts.num_examples} examples; the task needs {criteria.min_examples}",
        )
    if (
        facts.last_round is not None
        and offer.round_number - facts.last_round <= criteria.min_separation_rounds
    ):
        refuse("took_part_recently", f"took part in round {facts.last_round} of this task")
    if facts.daily_participations >= policy.max_daily_participations:
        refuse("daily_participations", f"took part {facts.daily_participations} times in 24 hours")
    if facts.daily_bytes + offer.download_bytes + offer.upload_bytes > policy.max_daily_bytes:
        refuse(
            "daily_bytes",
            f"{facts.daily_bytes} bytes moved in 24 hours; the policy allows {policy.max_daily_bytes}",
        )
    return tuple(refusals)
