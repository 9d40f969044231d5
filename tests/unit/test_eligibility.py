"""The device's judgement: each reason to refuse, one at a time."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from homespun.protocol.eligibility import (
    CONDITIONS,
    Facts,
    Policy,
    check_conditions,
    check_population,
    duration,
    judge,
    refusals,
)
from homespun.protocol.messages import (
    Aggregation,
    Bucket,
    Criteria,
    ExampleQuery,
    Offer,
    TaskKind,
)
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
FACTS = Facts(device_id="d1", examples=(10,), daily_participations=1, daily_bytes=4000)
OTHERS = Bucket(salt="s", low=0.0, high=0.5)
assert not in_bucket(OTHERS, "d1")


def codes(offer=OFFER, conditions=GOOD, policy=POLICY, facts=FACTS) -> list[str]:
    return [check.code for check in refusals(judge(offer, conditions, policy, facts))]


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
    assert codes(facts=replace(FACTS, examples=(9,))) == ["too_few_examples"]
    assert codes(facts=replace(FACTS, examples=("who knows",))) == ["unknown_examples"]
    assert codes(with_criteria(min_examples=0), facts=replace(FACTS, examples=("who knows",))) == [
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
    found = judge(
        replace(OFFER, aggregation=Aggregation.PLAIN, min_group=1),
        {"idle": False},
        POLICY,
        replace(FACTS, examples=(0,), daily_participations=9),
    )
    against = refusals(found)
    assert [check.code for check in against] == [
        "not_idle", "unknown_charging", "unknown_unmetered", "too_few_examples",
        "plain_aggregation", "small_group", "daily_participations",
    ]  # fmt: skip
    assert against[0].text == "the device is not idle"
    assert against[3].text == "0 relevant examples, the task needs 10"


def test_conditions_alone():
    unmet = refusals(check_conditions(("battery_ok", "cool"), {"battery_ok": False}, Policy()))
    assert [check.text for check in unmet] == [
        "the device is not charged enough",
        "cannot tell whether the device is cool",
    ]


def test_time_must_lie_between():
    daily = with_criteria(min_separation_s=86_400.0)
    assert codes(daily) == []
    assert codes(daily, facts=replace(FACTS, since_last_s=86_399.0)) == ["took_part_recently"]
    assert codes(daily, facts=replace(FACTS, since_last_s=86_400.0)) == []


def test_other_examples_must_be_there():
    both = with_criteria(also=(ExampleQuery(collection="ratings", min_examples=5),))
    assert codes(both, facts=replace(FACTS, examples=(10, 5))) == []
    assert codes(both, facts=replace(FACTS, examples=(10, 4))) == ["too_few_examples"]
    found = refusals(judge(both, GOOD, POLICY, replace(FACTS, examples=(10, "no such field"))))
    assert [(check.name, check.holds, check.code) for check in found] == [
        ("also", None, "unknown_examples")
    ]
    assert found[0].text.endswith("how many examples of ratings there are: no such field")


def test_the_switch():
    off = replace(POLICY, is_enabled=False)
    assert codes(policy=off) == ["switched_off"]
    assert [check.code for check in refusals(check_conditions((), {}, off))] == ["switched_off"]


def test_the_populations_that_are_served():
    assert check_population(POLICY, "any").code == ""
    one = replace(POLICY, populations=("phones", "cars"))
    assert check_population(one, "cars").code == ""
    refused = check_population(one, "doors")
    assert refused.code == "population_not_served"
    assert refused.text == "the device is of doors; its policy serves phones, cars"


def test_what_holds_is_explained_too():
    checks = judge(with_criteria(bucket=Bucket(salt="s", low=0.5)), GOOD, POLICY, FACTS)
    assert [(check.about, check.name, check.holds) for check in checks] == [
        ("policy", "is_enabled", True),
        *(("condition", name, True) for name in ("idle", "charging", "unmetered")),
        ("criterion", "min_examples", True),
        ("criterion", "bucket", True),
        *(("policy", name, True) for name in ("min_group", "max_daily_participations")),
        ("policy", "max_daily_bytes", True),
    ]
    assert checks[4].text == "10 relevant examples, the task needs 10"
    unknown = judge(OFFER, {}, replace(POLICY, unknown_is_met=True), FACTS)[1]
    assert (unknown.holds, unknown.code) == (None, "")
    assert "counts that as met" in unknown.text


def test_durations():
    assert [duration(s) for s in (-1, 0.9, 59, 60, 3599, 7200, 86_400, 172_800)] == [
        "0 s", "0 s", "59 s", "1 min", "59 min", "2 h", "24 h", "2 days",
    ]  # fmt: skip
