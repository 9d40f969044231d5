"""Task descriptions: what goes together, and what is refused with the name of the field."""

from __future__ import annotations

import tomllib

import msgspec
import pytest

from homespun.errors import InvalidConfig
from homespun.protocol.messages import Aggregation, TaskKind
from homespun.protocol.tasks import parse

MINIMAL = {
    "name": "words",
    "population": "phones",
    "kind": "train",
    "plan_hash": "a" * 64,
    "checkpoints": ["b" * 64],
    "goal": 20,
    "minimum": 10,
}
ASYNC = {"mode": "async", "max_staleness": 5, "concurrency": 50}


def test_the_least_that_a_task_says():
    task = parse(MINIMAL)
    assert (task.kind, task.aggregation) == (TaskKind.TRAIN, Aggregation.SECURE)
    assert (task.cohort_size, task.pool_size()) == (40, 0)  # at most 20 x 2; the window runs out
    assert (task.min_group, task.max_group) == (10, 20)
    assert (task.bits, task.rotate) == (16, True)
    assert task.optimizer.name == "FedAvg"


def test_the_same_task_in_toml():
    text = """
    name = "words"
    population = "phones"
    kind = "train"
    plan_hash = "%s"
    checkpoints = ["%s"]
    goal = 20
    minimum = 10
    over_selection = 1
    pool_target = 40
    selection_s = 30

    [groups]
    size = 15
    step_s = 5

    [criteria]
    requires = ["idle"]
    bucket = {salt = "s", low = 0.0, high = 0.9}

    [optimizer]
    name = "FedAdam"
    settings = {learning_rate = 0.1}
    """
    task = parse(tomllib.loads(text % ("a" * 64, "b" * 64)))
    assert (task.cohort_size, task.pool_size(), task.selection_s) == (20, 40, 30.0)
    assert (task.groups.size, task.max_group) == (15, 10)  # two groups, as even as can be
    assert task.groups.step_s == 5
    assert task.criteria.requires == ("idle",)
    assert task.optimizer.settings == {"learning_rate": 0.1}


def test_a_task_survives_the_database():
    task = parse({**MINIMAL, "criteria": {"max_age_s": 3600}, "seed": 7})
    assert parse(msgspec.json.decode(msgspec.json.encode(task))) == task


def test_a_device_is_waited_for_through_every_round_that_its_report_may_go_into():
    assert parse({**MINIMAL, "deadline_s": 60}).assignment_s == 60
    assert parse({**MINIMAL, "deadline_s": 60, "max_staleness": 2}).assignment_s == 180
    assert parse({**MINIMAL, **ASYNC, "deadline_s": 60}).assignment_s == 60


def test_an_async_task_has_groups_of_its_goal():
    task = parse({**MINIMAL, **ASYNC})
    assert (task.is_async, task.max_group, task.concurrency) == (True, 20, 50)


def test_a_pool_is_never_smaller_than_the_cohort():
    fixed = {**MINIMAL, "over_selection": 1.3}
    assert parse({**fixed, "pool_target": 1}).pool_size() == 26
    assert parse({**fixed, "pool_target": 25}).pool_size() == 26
    assert parse({**fixed, "pool_target": 27}).pool_size() == 27
    adaptive = parse({**MINIMAL, "pool_target": 24})
    assert [adaptive.pool_size(n) for n in (23, 25, None)] == [24, 25, 40]


def test_a_sum_is_over_the_cohort_or_over_a_group():
    plain = {**MINIMAL, "aggregation": "plain", "over_selection": 1.3}
    assert parse(plain).max_group == 26
    assert parse({**plain, "groups": {"size": 10}}).max_group == 26
    many = {**MINIMAL, "goal": 205, "groups": {"size": 100}}
    assert parse(many).max_group == 69  # three groups of 69, 69 and 67
    # Never below min_group.
    assert parse({**MINIMAL, "goal": 12, "groups": {"size": 11}}).max_group == 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "Words"}, "name"),
        ({"name": "words\n"}, "name"),
        ({"plan_hash": "a"}, "plan_hash"),
        ({"plan_hash": "a" * 64 + "\n"}, "plan_hash"),
        ({"kind": "teach"}, "kind"),
        ({"checkpoints": []}, "checkpoints"),
        ({"checkpoints": ["b" * 64] * 9}, "checkpoints"),
        ({"goal": 0}, "goal"),
        ({"goal": True}, "goal"),
        ({"goal": 10.0}, "goal"),
        ({"goal": "10"}, "goal"),
        ({"goal": 10**30}, "goal"),
        ({"over_selection": 0.9}, "over_selection"),
        ({"over_selection": float("nan")}, "over_selection"),
        ({"selection_s": -1}, "selection_s"),
        ({"selection_s": float("inf")}, "selection_s"),
        ({"selection_s": float("nan")}, "selection_s"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"bits": 7}, "bits"),
        ({"bits": 33}, "bits"),
        ({"min_group": 2}, "min_group"),
        ({"groups": {"size": 2}}, "groups.size"),
        ({"groups": {"step_s": 0}}, "groups.step_s"),
        ({"groups": {"corrupt_fraction": 1.0}}, "groups.corrupt_fraction"),
        ({"groups": {"corrupt_fraction": 0.04}}, "groups.corrupt_fraction"),  # devices would refuse
        ({"seed": -1}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"deadline": 5}, "unknown field `deadline`"),
        ({"criteria": {"min_example": 5}}, "unknown field `min_example`.*criteria"),
        ({"optimizer": {"settings": {"learning_rate": True}}}, "optimizer.settings"),
        ({"optimizer": {"settings": {"learning_rate": "0.1"}}}, "optimizer.settings"),
    ],
)
def test_a_field_that_is_wrong_is_named(changes, says):
    with pytest.raises(InvalidConfig, match=says):
        parse({**MINIMAL, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"minimum": 21}, "minimum is above goal"),
        ({"minimum": 9}, "minimum is below min_group"),
        ({"min_group": 11}, "minimum is below min_group"),
        ({"checkpoints": ["b" * 64] * 2}, "training task starts from one checkpoint"),
        ({"kind": "analyze"}, "analyze tasks are not available"),
        ({"groups": {"size": 9}}, "groups.size is below min_group"),
        ({"goal": 23, "minimum": 23, "groups": {"size": 10}}, "may leave 3 devices over"),
        (
            {"goal": 200, "groups": {"size": 200, "drop_out_fraction": 0.5}},
            "no ring of this size bears such losses",
        ),
        (
            {
                "goal": 1000,
                "groups": {"size": 1000, "corrupt_fraction": 0.2, "drop_out_fraction": 0.3},
            },
            "too many neighbours",
        ),
        ({"retry": {"earliest_s": 5, "latest_s": 4}}, "retry window ends before it begins"),
        ({"criteria": {"requires": ["chargin"]}}, "condition 'chargin'.*one of: idle, charging"),
        ({"criteria": {"bucket": {"salt": "s", "low": 0.5, "high": 0.5}}}, "bucket is empty"),
        ({"optimizer": {"name": "FedSomething"}}, "unknown server optimizer 'FedSomething'"),
        ({"optimizer": {"settings": {"momentum": 0.9}}}, "no setting 'momentum'"),
        ({"optimizer": {"settings": {"learning_rate": float("nan")}}}, "learning_rate"),
        ({"goal": 60_000}, "cohort is too large"),  # 78,000 devices
        ({"goal": 20_000, "aggregation": "plain"}, "leave no room in the word"),
        ({"goal": 100, "bits": 8}, "leave no room in the word"),
        ({"max_staleness": 1, "aggregation": "plain"}, "securely aggregated training"),
        ({"max_staleness": 1, "kind": "evaluate"}, "securely aggregated training"),
        ({"concurrency": 30}, "concurrency is for async tasks"),
        ({"mode": "async", "concurrency": 30}, "an async task needs max_staleness"),
        ({**ASYNC, "concurrency": 19}, "fewer devices at once"),
        ({**ASYNC, "groups": {"size": 19}}, "the sum of one group"),
        ({**ASYNC, "kind": "evaluate"}, "securely aggregated training"),
    ],
)
def test_values_that_cannot_go_together_are_refused(changes, says):
    with pytest.raises(InvalidConfig, match=says):
        parse({**MINIMAL, **changes})


@pytest.mark.parametrize("data", [None, [], "words", 5])
def test_what_is_no_description_is_refused(data):
    with pytest.raises(InvalidConfig):
        parse(data)


def test_several_checkpoints_are_evaluated():
    task = parse({**MINIMAL, "kind": "evaluate", "checkpoints": ["b" * 64, "c" * 64]})
    assert len(task.checkpoints) == 2
