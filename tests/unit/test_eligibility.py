"""The device's judgement: each reason to refuse, one at a time."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from homespun.protocol.eligibility import (
    CONDITIONS,
    Facts,
    Policy,
    judge,
    unmet_conditions,
)
from homespun.protocol.messages import Aggregation, Bucket, Criteria, Offer, TaskKind
from homespun.protocol.selection import in_bucket

OFFER = Offer(
    task_id="t1",
    task_name="words",
    kind=TaskKind.TRAIN,
    round_number=5,
    attempt=1,
    plan_hash="0" * 64,
    criteria=Criteria(min_examples=10),
    aggregation=Aggregation.SECURE,
    min_group=3,
    download_bytes=600,
    upload_bytes=400,
)
GOOD = dict.fromkeys(CONDITIONS, True)
POLICY = Policy(min_group=3, max_daily_participations=2, max_daily_bytes=5000)
FACTS = Facts(
    device_id="d1", num_examples=10, last_round=None, daily_participations=1, daily_bytes=4000
)
OTHERS = Bucket(salt="s", low=0.0, high=0.5)
assert not in_bucket(OTHERS, "d1")


def codes(offer=OFFER, conditions=GOOD, policy=POLICY, facts=FACTS) -> list[str]:
    return [refusal.code for refusal in judge(offer, conditions, policy, facts)]


def with_criteria(**changes) -> Offer:
    return replace(OFFER, criteria=replace(OFFER.criteria, **changes))


def test_a_good_offer_on_a_good_day():
    assert codes() == []


@pytest.mark.parametrize("name", ["idle", "charging", "unmetered"])
def test_each_required_condition(name):
    assert codes(conditions={**GOOD, name: False}) == [f"not_{name}"]
    assert codes(conditions={**GOOD, name: None}) == [f"unknown_{name}"]
    assert codes(conditions={k: v for k, v in GOOD.items() if k != name}) == [f"unknown_{name}"]


def test_what_is_not_required_may_be_otherwise():
    assert codes(conditions={**GOOD, "cool": False, "memory_ok": None}) == []
    assert codes(with_criteria(requires=()), conditions={}) == []


def test_unknown_is_met_only_if_the_policy_says_so_and_false_never_is():
    lenient = replace(POLICY, unknown_is_met=True)
    assert codes(conditions={}, policy=lenient) == []
    assert codes(conditions={**GOOD, "idle": False}, policy=lenient) == ["not_idle"]


def test_plain_aggregation_needs_the_devices_leave():
    plain = replace(OFFER, aggregation=Aggregation.PLAIN)
    assert Policy().allow_plain is False
    assert codes(plain) == ["plain_aggregation"]
    assert codes(plain, policy=replace(POLICY, allow_plain=True)) == []


def test_small_groups():
    assert codes(policy=Policy()) == ["small_group"]
    assert codes(replace(OFFER, min_group=2)) == ["small_group"]
    assert codes(policy=replace(POLICY, min_group=4)) == ["small_group"]
    assert codes(replace(OFFER, min_group=4), policy=replace(POLICY, min_group=4)) == []


def test_buckets():
    assert codes(with_criteria(bucket=OTHERS)) == ["not_in_bucket"]
    assert codes(with_criteria(bucket=Bucket(salt="s", low=0.5, high=1.0))) == []


def test_examples():
    assert codes(facts=replace(FACTS, num_examples=9)) == ["too_few_examples"]
    assert codes(facts=replace(FACTS, num_examples=None)) == ["unknown_examples"]
    assert codes(with_criteria(min_examples=0), facts=replace(FACTS, num_examples=None)) == [
        "unknown_examples"
    ]


@pytest.mark.parametrize(
    ("last_round", "separation", "refused"),
    [
        (None, 3, False),
        (5, 0, True),  # this very round, in an earlier attempt
        (4, 0, False),
        (4, 1, True),
        (3, 1, False),  # round 4 lies between
        (2, 3, True),
        (1, 3, False),
    ],
)
def test_separation_counts_the_rounds_in_between(last_round, separation, refused):
    offer = with_criteria(min_separation_rounds=separation)
    found = codes(offer, facts=replace(FACTS, last_round=last_round))
    assert found == (["took_part_recently"] if refused else [])


def test_the_daily_limits():
    assert codes(facts=replace(FACTS, daily_participations=2)) == ["daily_participations"]
    assert codes(facts=replace(FACTS, daily_bytes=4001)) == ["daily_bytes"]  # 600 + 400 more
    assert codes(policy=replace(POLICY, max_daily_participations=0)) == ["daily_participations"]


def test_all_reasons_are_given_and_read_as_sentences():
    refusals = judge(
        replace(OFFER, aggregation=Aggregation.PLAIN, min_group=1),
        {"idle": False},
        POLICY,
        replace(FACTS, num_examples=0, daily_participations=9),
    )
    assert [refusal.code for refusal in refusals] == [
        "not_idle", "unknown_charging", "unknown_unmetered", "plain_aggregation", "small_group",
        "too_few_examples", "daily_participations",
    ]  # fmt: skip
    assert refusals[0].text == "the device is not idle"
    assert refusals[5].text == "0 examples; the task needs 10"


def test_conditions_alone():
    refusals = unmet_conditions(("battery_ok", "cool"), {"battery_ok": False}, Policy())
    assert [refusal.text for refusal in refusals] == [
        "the device is not battery ok",
        "cannot tell whether the device is cool",
    ]
