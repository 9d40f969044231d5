"""Why the device does or does not take part: every condition, criterion and rule, with the values behind it.

Judged afresh whenever somebody asks, by the functions that the device itself uses: with the conditions, the policy and
the examples of now, and the tasks that were offered at the last check-in. Only what the journal knows comes
from status.json while a process runs the device, because that process holds the journal for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import msgspec

from homespun.clock import Clock
from homespun.device.conditions import ConditionSource, ScriptedConditions
from homespun.device.examples import open_examples
from homespun.device.home import Home, Settings
from homespun.device.journal import Journal
from homespun.device.measured import measured
from homespun.device.models import open_models
from homespun.device.offers import Offered
from homespun.device.status import IN_SESSION, Status, read_status
from homespun.errors import Conflict
from homespun.protocol.eligibility import (
    Check,
    Conditions,
    check_conditions,
    check_population,
    condition_in_words,
    duration,
    refusals,
)
from homespun.protocol.messages import Criteria, TaskKind
from homespun.protocol.session import SessionState


class TaskWhy(msgspec.Struct, frozen=True, kw_only=True):
    """One task of the last check-in. `takes_part`: nothing speaks against it now; `text`: that, in a sentence."""

    task: str
    kind: TaskKind
    round_number: int
    takes_part: bool
    text: str
    checks: tuple[Check, ...]


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """`text`: the answer in words; `waiting_for`: what comes next; `checks`: what is asked of the device itself before
    it contacts the server; `checked_in_at`, `retry_at`: Unix seconds.
    """

    device_id: str
    population: str
    is_running: bool
    state: str
    text: tuple[str, ...] = ()
    waiting_for: str = ""
    checks: tuple[Check, ...]
    tasks: tuple[TaskWhy, ...]
    checked_in_at: float | None
    retry_at: float | None


def explain(home: Home, clock: Clock) -> Why:
    """The answer for this moment. Raises `InvalidConfig` if this is no device, `StorageFailure`."""
    settings, status, now = home.settings(), read_status(home), clock.now()
    is_running, retry_at, offered = _recorded(home, settings, status, now)
    running = status if is_running else None
    with _source(home, settings, running, now) as source:
        conditions = source.read(now)
    checks = (
        check_population(settings.policy, settings.population),
        *check_conditions(Criteria().requires, conditions, settings.policy),
    )
    why = Why(
        device_id=settings.device_id,
        population=settings.population,
        is_running=is_running,
        state=running.state if running else "stopped",
        checks=checks,
        tasks=tuple(_judged(home, settings, offered, conditions, now)),
        checked_in_at=status.checked_in_at if status else None,
        retry_at=retry_at if retry_at and retry_at > now else None,
    )
    session = running if running and running.state in IN_SESSION else None
    return msgspec.structs.replace(
        why,
        text=tuple(_sentences(why, session, now)),
        waiting_for=_waiting_for(why, session, now),
    )


def _recorded(
    home: Home, settings: Settings, status: Status | None, now: float
) -> tuple[bool, float | None, tuple[Offered, ...]]:
    """Whether a process runs the device; when it comes back; what it was offered, as the journal has it now."""
    offered = () if status is None else status.offered
    if not home.journal_file.exists():
        return False, None, offered
    try:
        journal = Journal(home.journal_file)
    except Conflict:
        return True, None if status is None else status.retry_at, offered
    try:
        models = open_models(home, settings)
        again = tuple(Offered.now(each.offer, journal, models, now) for each in offered)
        return False, journal.retry_at, again
    finally:
        journal.close()


def _source(
    home: Home, settings: Settings, running: Status | None, now: float
) -> AbstractContextManager[ConditionSource]:
    """What the device asks, too. A script goes on where the running device is in it."""
    if settings.conditions is None:
        return measured(home.root)
    start = running.script_start if running else None
    start = now if start is None else start
    return nullcontext(ScriptedConditions(settings.conditions, start))


def _judged(
    home: Home,
    settings: Settings,
    offered: Iterable[Offered],
    conditions: Conditions,
    now: float,
) -> Iterable[TaskWhy]:
    examples = open_examples(home, settings)
    try:
        for each in offered:
            offer = each.offer
            checks = each.judge(conditions, settings.policy, settings.device_id, examples, now)
            against = "; ".join(check.text for check in refusals(checks))
            yield TaskWhy(
                task=offer.task_name,
                kind=offer.kind,
                round_number=offer.round_number,
                takes_part=not against,
                text=f"not taking part in {offer.task_name}: {against}"
                if against
                else f"nothing speaks against taking part in {offer.task_name}",
                checks=checks,
            )
    finally:
        examples.close()


def _sentences(why: Why, session: Status | None, now: float) -> Iterable[str]:
    against = refusals(why.checks)
    if session is not None:
        yield f"taking part in round {session.round_number} of {session.task}: {session.state}"
    elif against:
        yield "not asking the server for work: " + "; ".join(check.text for check in against)
    for task in why.tasks:
        if session is None or session.task != task.task:
            yield task.text
    if why.checked_in_at is None:
        yield "it has not checked in yet, so no task is known"
    elif not why.tasks:
        ago = duration(now - why.checked_in_at)
        yield f"the server had no task to offer at the last check-in, {ago} ago"


def _waiting_for(why: Why, session: Status | None, now: float) -> str:
    against = refusals(why.checks)
    if not why.is_running:
        return "a process that runs the device: homespun device run"
    if any(check.about == "policy" for check in against):
        return "its person: homespun device policy"
    if against:
        return "the device to be " + " and ".join(condition_in_words(each.name) for each in against)
    if why.retry_at is not None:
        return f"the next check-in, in {duration(why.retry_at - now)}"
    if session is not None:
        return "the end of the round"
    if why.state == SessionState.CHECKED_IN:
        return "the draw of the devices that take part in the round"
    return "the server's offers"
