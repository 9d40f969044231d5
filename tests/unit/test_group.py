"""What a group does next: a table of cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from homespun.protocol.group import GroupEvent, GroupState, GroupView, due, group_size

G, CLOSE = GroupState, GroupEvent.CLOSE
DEADLINE = 100.0
FORMING = GroupView(
    G.ADVERTISE_KEYS,
    num_expected=0,
    num_answered=0,
    deadline_at=DEADLINE,
    n_min=3,
    target=10,
    wanted=20,
    num_unbound=50,
)


@pytest.mark.parametrize(
    ("num_devices", "wanted", "num_unbound", "now", "event"),
    [
        (9, 20, 50, 0.0, None),  # others may still come
        (10, 20, 50, 0.0, CLOSE),  # as many as planned
        (11, 20, 50, 0.0, CLOSE),
        (5, 5, 50, 0.0, CLOSE),  # the round lacks no more than these
        (4, 5, 50, 0.0, None),
        (6, 12, 50, 0.0, CLOSE),  # two of 6 rather than 10 and 2
        (5, 12, 50, 0.0, None),
        (3, 1, 50, 0.0, CLOSE),  # but never fewer than n_min
        (2, 1, 50, 0.0, None),
        (3, 20, 0, 0.0, CLOSE),  # nobody else can come
        (2, 20, 0, 0.0, None),
        (3, 20, 50, DEADLINE, CLOSE),  # the round waits no longer
        (2, 20, 50, DEADLINE, None),
        (10, 0, 0, DEADLINE, None),  # the round has its reports; these are a reserve
        (10, -2, 0, DEADLINE, None),
    ],
)
def test_a_forming_group(num_devices, wanted, num_unbound, now, event):
    view = replace(FORMING, num_answered=num_devices, wanted=wanted, num_unbound=num_unbound)
    assert due(view, now) is event


@pytest.mark.parametrize("state", [G.SHARE_KEYS, G.MASK_INPUT, G.AGREE, G.UNMASK])
def test_a_step_ends_when_all_answered_or_its_time_is_over(state):
    view = GroupView(state, num_expected=5, num_answered=4, deadline_at=DEADLINE)
    assert due(view, DEADLINE - 0.1) is None
    assert due(view, DEADLINE) is CLOSE
    assert due(replace(view, num_answered=5), 0.0) is CLOSE


@pytest.mark.parametrize("state", [G.OPENED, G.VOID])
def test_what_is_over_stays_over(state):
    assert due(GroupView(state, 0, 0, DEADLINE), 1e12) is None


@pytest.mark.parametrize(
    ("goal", "largest", "size"),
    [(10, 100, 10), (100, 100, 100), (101, 100, 51), (205, 100, 69), (1000, 100, 100), (1, 3, 1)],
)
def test_groups_are_as_even_as_can_be(goal, largest, size):
    assert group_size(goal, largest) == size
    num_groups = -(-goal // size)
    assert num_groups * size >= goal
    assert num_groups == -(-goal // largest)
