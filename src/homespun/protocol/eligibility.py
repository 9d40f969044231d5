"""Whether a device takes part: its conditions, the task's criteria, and its own policy.

Decided on the device. The server learns only that a device claimed; everything that was judged stays here, as a list
of `Check`s, for the person who asks why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from msgspec import Meta

from homespun.protocol.messages import (
    Aggregation,
    Count,
    ExampleQuery,
    Message,
    Name,
    Offer,
    Positive,
)
from homespun.protocol.selection import in_bucket

CONDITIONS = ("idle", "charging", "unmetered", "battery_ok", "cool", "storage_ok", "memory_ok")
"""What a device can measure of itself. A value is True, False, or None: the platform cannot tell."""

Conditions = Mapping[str, bool | None]


class Policy(Message, frozen=True, kw_only=True):
    """The device's own rules, which no server can override.

    `is_enabled`: the person's switch; off: the device never contacts the server; `populations`: those that it
    serves (none: whichever it is enrolled in); `allow_plain`: accept tasks without secure aggregation; `min_group`:
    never be part of a sum over fewer devices; `private_tensors`: patterns such as `embedding.*` of parameters that
    never leave; a plan that trains one does not run; `unknown_is_met`: count a condition that the platform cannot
    report as met; `max_daily_participations`: most per 24 hours; `max_daily_bytes`: most per 24 hours, both ways;
    `max_memory_bytes`: what a plan may allocate; `max_cpu_share`: what it may use of one core.
    """

    is_enabled: bool = True
    populations: tuple[Name, ...] = ()
    allow_plain: bool = False
    min_group: Positive = 10
    private_tensors: tuple[Annotated[str, Meta(min_length=1, max_length=100)], ...] = ()
    unknown_is_met: bool = False
    max_daily_participations: Count = 48
    max_daily_bytes: Count = 500_000_000
    max_memory_bytes: Annotated[int, Meta(ge=100_000_000, le=2**53 - 1)] = 1_000_000_000
    max_cpu_share: Annotated[float, Meta(ge=0.05, le=1.0)] = 1.0


class Facts(Message, frozen=True, kw_only=True):
    """What the device knows of itself when it judges an offer.

    `examples`: for the criteria's relevant examples and for each of `also`, how many there are, or why that cannot
    be told, which is never eligible; `since_last_s`: since it last took part in the task (None: never).
    """

    device_id: str
    examples: tuple[int | str, ...]
    last_round: int | None = None
    since_last_s: float | None = None
    daily_participations: int = 0
    daily_bytes: int = 0


class Check(Message, frozen=True, kw_only=True):
    """One thing that was judged.

    `about`: whose demand it is; `name`: of the condition, criterion or rule; `holds`: yes, no, or None: unknown;
    `code`: stable, of the reason not to take part; empty if there is none; `text`: a sentence with the values.
    """

    about: Literal["condition", "criterion", "policy", "history"]
    name: str
    holds: bool | None
    code: str = ""
    text: str


_WORDS = {
    "unmetered": "on an unmetered network",
    "battery_ok": "charged enough",
    "storage_ok": "left with enough storage",
    "memory_ok": "left with enough memory",
}


def condition_in_words(name: str) -> str:
    """To be read after "the device is"."""
    return _WORDS.get(name, name)


def refusals(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Those that speak against taking part."""
    return tuple(check for check in checks if check.code)


def check_conditions(
    requires: tuple[str, ...], conditions: Conditions, policy: Policy
) -> tuple[Check, ...]:
    """The person's switch, and each required condition as it is now."""
    switch = "on" if policy.is_enabled else "off"
    checks = [
        _rule("is_enabled", policy.is_enabled, "switched_off", f"taking part is switched {switch}")
    ]
    for name in requires:
        holds, words = conditions.get(name), condition_in_words(name)
        match holds:
            case True:
                code, text = "", f"the device is {words}"
            case False:
                code, text = f"not_{name}", f"the device is not {words}"
            case None:
                code, text = f"unknown_{name}", f"cannot tell whether the device is {words}"
                if policy.unknown_is_met:
                    code, text = "", f"{text}; its policy counts that as met"
        checks.append(Check(about="condition", name=name, holds=holds, code=code, text=text))
    return tuple(checks)


def check_population(policy: Policy, population: str) -> Check:
    """Whether the person wants the device to serve this population."""
    served = ", ".join(policy.populations) or "any population"
    holds = not policy.populations or population in policy.populations
    text = f"the device is of {population}; its policy serves {served}"
    return _rule("populations", holds, "population_not_served", text)


def judge(offer: Offer, conditions: Conditions, policy: Policy, facts: Facts) -> tuple[Check, ...]:
    """Every condition, criterion and rule of the policy that `offer` touches; eligible without `refusals`."""
    return (
        *check_conditions(offer.criteria.requires, conditions, policy),
        *_check_criteria(offer, facts),
        *_check_policy(offer, policy, facts),
    )


def _check_criteria(offer: Offer, facts: Facts) -> Iterable[Check]:
    criteria = offer.criteria
    queries = zip((criteria.relevant, *criteria.also), facts.examples, strict=True)
    for place, (query, found) in enumerate(queries):
        yield _examples(query, found, "also" if place else "min_examples")
    if criteria.bucket is not None:
        holds = in_bucket(criteria.bucket, facts.device_id)
        text = "the task is for this device, too" if holds else "the task is for other devices"
        yield _criterion("bucket", holds, "not_in_bucket", text)
    between = criteria.min_separation_rounds
    if facts.last_round is not None:
        holds = offer.round_number - facts.last_round > between
        text = f"took part in round {facts.last_round} of this task, this is {offer.round_number}"
        if between:
            text += f"; {between} must lie between"
        yield _criterion("min_separation_rounds", holds, "took_part_recently", text)
    if facts.since_last_s is not None and criteria.min_separation_s:
        holds = facts.since_last_s >= criteria.min_separation_s
        text = (
            f"took part in this task {duration(facts.since_last_s)} ago; "
            f"{duration(criteria.min_separation_s)} must lie between"
        )
        yield _criterion("min_separation_s", holds, "took_part_recently", text)


def _check_policy(offer: Offer, policy: Policy, facts: Facts) -> Iterable[Check]:
    if offer.aggregation is Aggregation.PLAIN:
        allows = "allows" if policy.allow_plain else "does not allow"
        yield _rule(
            "allow_plain",
            policy.allow_plain,
            "plain_aggregation",
            f"the task is not securely aggregated and the device's policy {allows} that",
        )
    yield _rule(
        "min_group",
        offer.min_group >= policy.min_group,
        "small_group",
        f"sums over {offer.min_group} devices; the device's policy asks for {policy.min_group}",
    )
    yield _rule(
        "max_daily_participations",
        facts.daily_participations < policy.max_daily_participations,
        "daily_participations",
        f"took part {facts.daily_participations} times in 24 hours; "
        f"the policy allows {policy.max_daily_participations}",
    )
    more = offer.download_bytes + offer.upload_bytes
    yield _rule(
        "max_daily_bytes",
        facts.daily_bytes + more <= policy.max_daily_bytes,
        "daily_bytes",
        f"{facts.daily_bytes / 1e6:.1f} MB moved in 24 hours and {more / 1e6:.1f} MB to come; "
        f"the policy allows {policy.max_daily_bytes / 1e6:.1f} MB",
    )


def _examples(query: ExampleQuery, found: int | str, name: str) -> Check:
    what = "relevant examples" if name == "min_examples" else f"examples of {query.collection}"
    if isinstance(found, str):
        text = f"cannot tell how many {what} there are: {found}"
        return Check(about="criterion", name=name, holds=None, code="unknown_examples", text=text)
    text = f"{found} {what}, the task needs {query.min_examples}"
    return _criterion(name, found >= query.min_examples, "too_few_examples", text)


def _criterion(name: str, holds: bool, code: str, text: str) -> Check:
    return Check(about="criterion", name=name, holds=holds, code="" if holds else code, text=text)


def _rule(name: str, holds: bool, code: str, text: str) -> Check:
    return Check(about="policy", name=name, holds=holds, code="" if holds else code, text=text)


def duration(seconds: float) -> str:
    """A length of time for people, rounded down: 45 s, 12 min, 3 h, 5 days."""
    for unit, size_s in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= (2 * size_s if unit == "days" else size_s):
            return f"{int(seconds // size_s)} {unit}"
    return f"{max(0, int(seconds))} s"
