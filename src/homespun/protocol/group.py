"""The group: devices of one round that were ready at about the same time and are summed together, masked.

A group forms from devices as they finish (late binding). It is closed to others when it is large enough and the
round still wants its reports; from then on it goes through the steps of `secagg`, each closed when everybody
answered or its time is over. As for rounds, `due` looks at a small view and the shell carries the event out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from homespun.protocol.machine import Machine, Row


class GroupState(StrEnum):
    """What is being collected; then how it ended."""

    ADVERTISE_KEYS = "advertise_keys"
    SHARE_KEYS = "share_keys"
    MASK_INPUT = "mask_input"
    AGREE = "agree"
    UNMASK = "unmask"
    OPENED = "opened"
    VOID = "void"


class GroupEvent(StrEnum):
    CLOSE = "close"
    GIVE_UP = "give_up"


G, E = GroupState, GroupEvent
COLLECTING = (G.SHARE_KEYS, G.MASK_INPUT)
"""The roster is closed, and it is not yet known whose reports are in the sum."""
SUMMED = (G.AGREE, G.UNMASK, G.OPENED)
"""The survivors are fixed for good: their reports count."""
LIVE = (G.ADVERTISE_KEYS, *COLLECTING, G.AGREE, G.UNMASK)

GROUP: Machine[GroupState, GroupEvent] = Machine(
    "group",
    G.ADVERTISE_KEYS,
    (
        Row(
            G.ADVERTISE_KEYS, E.CLOSE, G.SHARE_KEYS, "large enough, and the round wants its reports"
        ),
        Row(G.SHARE_KEYS, E.CLOSE, G.MASK_INPUT, "enough devices shared their keys"),
        Row(G.MASK_INPUT, E.CLOSE, G.AGREE, "survivors stored, then published"),
        Row(G.AGREE, E.CLOSE, G.UNMASK, "enough devices signed the survivors"),
        Row(G.UNMASK, E.CLOSE, G.OPENED, "every secret opened"),
        *(
            Row(state, E.GIVE_UP, G.VOID, "too many dropped out, or the round ended")
            for state in LIVE
        ),
    ),
)


@dataclass(frozen=True)
class GroupView:
    """What `due` needs to know.

    `num_expected`: devices that may answer this step, of which `num_answered` did; `deadline_at`: Unix seconds,
    while it forms that of the round. The rest matters while it forms: `n_min`: fewest devices; `target`: enough
    of them; `wanted`: reports that the round still lacks; `num_unbound`: devices that may still come.
    """

    state: GroupState
    num_expected: int
    num_answered: int
    deadline_at: float
    n_min: int = 0
    target: int = 0
    wanted: int = 0
    num_unbound: int = 0


def due(view: GroupView, now: float) -> GroupEvent | None:
    """CLOSE when the step is complete or its time is over; None: keep waiting."""
    over = now >= view.deadline_at
    if view.state is G.ADVERTISE_KEYS:
        if view.wanted <= 0 or view.num_answered < view.n_min:
            return None  # its devices wait in case another group comes to nothing
        # As even as can be from here on, so that none is left over that is too small.
        enough = max(view.n_min, group_size(view.wanted, view.target))
        ready = view.num_answered >= enough or view.num_unbound == 0 or over
        return E.CLOSE if ready else None
    if view.state not in LIVE:
        return None
    return E.CLOSE if over or view.num_answered >= view.num_expected else None


def group_size(goal: int, largest: int) -> int:
    """Devices of a group when `goal` reports are split as evenly as can be into groups of at most `largest`."""
    return -(-goal // -(-goal // largest))
