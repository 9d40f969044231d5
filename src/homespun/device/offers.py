"""Judging offers on the device: `protocol.eligibility` says what counts, here are the facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from homespun.device.examples import ExampleStore
from homespun.device.journal import DAY_S, Journal
from homespun.device.models import Models
from homespun.device.watching import Watcher
from homespun.protocol.eligibility import Check, Conditions, Facts, Policy, judge, refusals
from homespun.protocol.messages import ExampleQuery, Offer, TaskKind


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why the device does not take part: at all (`task` None), or in one task. `about`: whose demand, see `Check`."""

    code: str
    text: str
    about: str
    task: str | None = None


def reasons_of(checks: Iterable[Check], task: str | None = None) -> tuple[Reason, ...]:
    """What of `checks` speaks against taking part."""
    return tuple(
        Reason(code=check.code, text=check.text, about=check.about, task=task)
        for check in refusals(checks)
    )


def in_words(reasons: Iterable[Reason]) -> str:
    """As one sentence; empty if there are none."""
    return "; ".join(dict.fromkeys(reason.text for reason in reasons))


def is_forbidden(reasons: Iterable[Reason]) -> bool:
    """Whether the person does not want it, rather than the moment being wrong."""
    return any(reason.about == "policy" for reason in reasons)


class Offered(msgspec.Struct, frozen=True, kw_only=True):
    """An offer, and what the journal knows of it.

    `last_round`, `last_at`: when the device last took part in the task; `was_tried`: this very round attempt;
    `plan_refused`: why the device refuses its plan; `not_watched`: why it has nothing to say of the release that the
    offer asks about; `has_watched`: it has reported on it.
    """

    offer: Offer
    last_round: int | None
    last_at: float | None
    daily_participations: int
    daily_bytes: int
    was_tried: bool
    plan_refused: str | None
    not_watched: str = ""
    has_watched: bool = False

    @classmethod
    def now(cls, offer: Offer, journal: Journal, models: Models, now: float) -> Offered:
        watch = offer.watch
        return cls(
            offer=offer,
            last_round=journal.last_round(offer.task_name),
            last_at=journal.last_at(offer.task_name),
            daily_participations=journal.daily_participations(now),
            daily_bytes=sum(journal.traffic(now - DAY_S)),
            was_tried=journal.was_assigned(offer),
            plan_refused=journal.plan_refusal(offer.plan_hash, now),
            not_watched="" if watch is None else Watcher(models, watch).refusal(),
            has_watched=watch is not None and journal.has_watched(watch.release_id),
        )

    def judge(
        self,
        conditions: Conditions,
        policy: Policy,
        device_id: str,
        examples: ExampleStore,
        now: float,
    ) -> tuple[Check, ...]:
        """All that speaks for and against taking it."""
        facts = Facts(
            device_id=device_id,
            examples=tuple(_counts(self.offer, examples, now)),
            last_round=self.last_round,
            since_last_s=None if self.last_at is None else now - self.last_at,
            daily_participations=self.daily_participations,
            daily_bytes=self.daily_bytes,
        )
        checks = judge(self.offer, conditions, policy, facts)
        return (*checks, *self._history())

    def _history(self) -> Iterable[Check]:
        def refuse(name: str, code: str, text: str) -> Check:
            return Check(about="history", name=name, holds=False, code=code, text=text)

        if self.offer.kind is TaskKind.ANALYZE:
            yield refuse("kind", "unsupported_task", "this runtime cannot do that kind of task yet")
        if self.was_tried:
            yield refuse("round", "already_tried", "this round was tried and did not end well")
        if self.plan_refused is not None:
            yield refuse("plan", "refused_plan", self.plan_refused)
        if self.not_watched:
            yield refuse("release", "not_watched", self.not_watched)
        if self.has_watched:
            text = "the device has reported on this release"
            yield refuse("release", "has_watched", text)


class Judge:
    """Chooses among offers by what the device holds, has done, and may do, and remembers those of the last check-in."""

    def __init__(
        self,
        device_id: str,
        policy: Callable[[], Policy],
        journal: Journal,
        examples: ExampleStore,
        models: Models,
    ) -> None:
        self._device_id, self._policy = device_id, policy
        self._journal, self._examples, self._models = journal, examples, models
        self._offers: tuple[Offer, ...] = ()
        self.checked_in_at: float | None = None

    def remember(self, offers: Iterable[Offer], checked_in_at: float | None) -> None:
        """What was offered when the device checked in."""
        self._offers, self.checked_in_at = tuple(offers), checked_in_at

    def choose(
        self, offers: Iterable[Offer], conditions: Conditions, now: float
    ) -> tuple[Offer | None, tuple[Reason, ...]]:
        """The first offer that nothing speaks against, and the reasons against those before it."""
        self.remember(offers, now)
        against: list[Reason] = []
        for offered in self.offered(now):
            checks = offered.judge(conditions, self._policy(), self._device_id, self._examples, now)
            reasons = reasons_of(checks, offered.offer.task_name)
            if not reasons:
                return offered.offer, tuple(against)
            against += reasons
        return None, tuple(against)

    def offered(self, now: float) -> tuple[Offered, ...]:
        """The offers of the last check-in, with what the journal knows now."""
        return tuple(Offered.now(offer, self._journal, self._models, now) for offer in self._offers)


def _counts(offer: Offer, examples: ExampleStore, now: float) -> Iterable[int | str]:
    """Relevant examples are those that the task would use: held-out ones for evaluation, others for training."""
    yield _count(examples, offer.criteria.relevant, now, offer.kind is TaskKind.EVALUATE)
    for query in offer.criteria.also:
        yield _count(examples, query, now, None)


def _count(
    examples: ExampleStore, query: ExampleQuery, now: float, held_out: bool | None
) -> int | str:
    return examples.undecided(query) or examples.count(now, held_out, query)
