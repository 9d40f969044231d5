"""The round: one execution of a task against one base checkpoint.

`due` looks at a small view of a round and says which event, if any, the counts and the clock call for. The
shell loads the view, applies the event in one transaction and persists before it publishes; no deadline
depends on a process staying alive, because `due` asks only the view and the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import ceil

from homespun.protocol.machine import Machine, Row


class RoundState(StrEnum):
    PLANNED = "planned"
    OPEN = "open"
    RUNNING = "running"
    CLOSING = "closing"
    UNMASKING = "unmasking"
    AGGREGATED = "aggregated"
    COMMITTED = "committed"
    SCRUBBED = "scrubbed"
    ABANDONED = "abandoned"
    CANCELLED = "cancelled"


class RoundEvent(StrEnum):
    OPEN = "open"
    SELECT = "select"
    CLOSE = "close"
    ABANDON = "abandon"
    UNMASK = "unmask"
    AGGREGATE = "aggregate"
    COMMIT = "commit"
    SCRUB = "scrub"
    CANCEL = "cancel"


R, E = RoundState, RoundEvent
_LIVE = (R.PLANNED, R.OPEN, R.RUNNING, R.CLOSING, R.UNMASKING, R.AGGREGATED)

ROUND: Machine[RoundState, RoundEvent] = Machine(
    "round",
    R.PLANNED,
    (
        Row(R.PLANNED, E.OPEN, R.OPEN, "head is the base checkpoint"),
        Row(
            R.OPEN,
            E.SELECT,
            R.RUNNING,
            "pool filled, or window over and pool >= minimum, or at once if async",
        ),
        Row(
            R.RUNNING,
            E.CLOSE,
            R.CLOSING,
            "goal reached, or nobody left to wait for and reports >= minimum, or minimum reached if async",
        ),
        Row(R.RUNNING, E.ABANDON, R.ABANDONED, "nobody left to wait for and reports < minimum"),
        Row(R.CLOSING, E.AGGREGATE, R.AGGREGATED, "plain sums complete"),
        Row(R.CLOSING, E.UNMASK, R.UNMASKING, "no group takes reports any more"),
        Row(
            R.UNMASKING,
            E.AGGREGATE,
            R.AGGREGATED,
            "every group opened or dropped, count >= minimum",
        ),
        Row(R.CLOSING, E.ABANDON, R.ABANDONED, "sums unusable"),
        Row(R.UNMASKING, E.ABANDON, R.ABANDONED, "count < minimum"),
        Row(R.AGGREGATED, E.COMMIT, R.COMMITTED, "head still the base, all values finite"),
        Row(R.AGGREGATED, E.ABANDON, R.ABANDONED, "head moved, or values not finite"),
        Row(R.COMMITTED, E.SCRUB, R.SCRUBBED),
        *(Row(state, E.CANCEL, R.CANCELLED) for state in _LIVE),
    ),
)


@dataclass(frozen=True)
class RoundView:
    """What `due` needs to know. Times are Unix seconds.

    `pool_target`: the pool that ends the window early, 0 if none does; `num_open`: devices that may still report,
    with secure aggregation those that are in no group yet; `num_collecting`: groups whose reports are on the way;
    `num_unopened`: groups whose sum is not known yet; `is_async`: devices come and go at any time, so there is
    neither a pool nor an end of waiting.
    """

    state: RoundState
    goal: int
    minimum: int
    pool_target: int
    select_at: float
    deadline_at: float
    num_waiting: int
    num_assigned: int
    num_open: int
    num_reported: int
    secure: bool = False
    num_collecting: int = 0
    num_unopened: int = 0
    is_async: bool = False

    @property
    def is_admitting(self) -> bool:
        """Whether a device may claim a place."""
        return self.state is (R.RUNNING if self.is_async else R.OPEN)


def may_carry(origin: int, number: int, max_staleness: int) -> bool:
    """Whether a report that was assigned in round `origin` may go into round `number` of the same task."""
    return max_staleness > 0 and number - origin <= max_staleness


def cohort_size(goal: int, over_selection: float) -> int:
    """Devices to assign so that `goal` of them report: ceil(goal * over_selection)."""
    return ceil(round(goal * over_selection, 6))


def pool_ready(waiting: int, target: int, minimum: int, *, window_over: bool) -> bool:
    """Whether to draw now: the pool has reached its target (0: it has none), or the window is over.

    Without a target the draw is among all who came during the window, never first come first served.
    """
    return 0 < target <= waiting or (window_over and waiting >= minimum)


def due(view: RoundView, now: float) -> RoundEvent | None:
    """The event that the counts and the clock call for, or None: keep waiting."""
    match view.state:
        case R.PLANNED:
            return E.OPEN
        case R.OPEN if view.is_async:
            return E.SELECT
        case R.OPEN:
            ready = pool_ready(
                view.num_waiting, view.pool_target, view.minimum, window_over=now >= view.select_at
            )
            return E.SELECT if ready else None
        case R.RUNNING:
            if view.num_collecting:
                return None  # the steps of a group have deadlines of their own
            if view.is_async:  # a full group is one update, whatever it lost on the way
                return E.CLOSE if view.num_reported >= view.minimum else None
            if view.num_reported >= view.goal:
                return E.CLOSE
            if now >= view.deadline_at or view.num_open == 0:
                return E.CLOSE if view.num_reported >= view.minimum else E.ABANDON
            return None
        case R.CLOSING:
            return E.UNMASK if view.secure else E.AGGREGATE
        case R.UNMASKING:
            if view.num_unopened:
                return None
            return E.AGGREGATE if view.num_reported >= view.minimum else E.ABANDON
        case R.AGGREGATED:
            return E.COMMIT
        case R.COMMITTED:
            return E.SCRUB
        case _:
            return None
