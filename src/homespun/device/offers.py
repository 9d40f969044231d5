"""Judging offers on the device: `protocol.eligibility` says what counts, here are the facts."""

from __future__ import annotations

from collections.abc import Iterable

from homespun.device.examples import ExampleStore
from homespun.device.home import Settings
from homespun.device.journal import DAY_S, Journal
from homespun.device.models import Models
from homespun.device.status import Reason
from homespun.device.watching import Watcher
from homespun.protocol.eligibility import Conditions, Facts, judge
from homespun.protocol.messages import Offer, TaskKind


class Judge:
    """Chooses among offers by what the device holds, has done, and may do."""

    def __init__(
        self, settings: Settings, journal: Journal, examples: ExampleStore, models: Models
    ) -> None:
        self._settings, self._journal, self._examples = settings, journal, examples
        self._models = models

    def choose(
        self, offers: Iterable[Offer], conditions: Conditions, now: float
    ) -> tuple[Offer | None, tuple[Reason, ...]]:
        """The first offer that nothing speaks against, and the reasons against those before it."""
        against: list[Reason] = []
        for offer in offers:
            reasons = self.reasons(offer, conditions, now)
            if not reasons:
                return offer, tuple(against)
            against += reasons
        return None, tuple(against)

    def reasons(self, offer: Offer, conditions: Conditions, now: float) -> list[Reason]:
        """Every reason not to take `offer`; empty means eligible."""

        def reason(code: str, text: str) -> Reason:
            return Reason(code=code, text=text, task=offer.task_name)

        refusals = judge(offer, conditions, self._settings.policy, self._facts(offer, now))
        found = [reason(refusal.code, refusal.text) for refusal in refusals]
        if offer.kind is TaskKind.ANALYZE:
            found.append(reason("unsupported_task", "this runtime cannot do that kind of task yet"))
        if self._journal.was_assigned(offer):
            found.append(reason("already_tried", "this round was tried and did not end well"))
        if (refused := self._journal.plan_refusal(offer.plan_hash, now)) is not None:
            found.append(reason("refused_plan", refused))
        if offer.watch is not None:
            if (refusal := Watcher(self._models, offer.watch).refusal()) is not None:
                found.append(reason(refusal.code, refusal.text))
            if self._journal.has_watched(offer.watch.release_id):
                found.append(reason("has_watched", "the device has reported on this release"))
        return found

    def _facts(self, offer: Offer, now: float) -> Facts:
        """Relevant examples are those that the task would use: held-out ones for evaluation, others for training."""
        return Facts(
            device_id=self._settings.device_id,
            num_examples=self._examples.count(
                now, offer.kind is TaskKind.EVALUATE, offer.criteria.max_age_s
            ),
            last_round=self._journal.last_round(offer.task_name),
            daily_participations=self._journal.daily_participations(now),
            daily_bytes=sum(self._journal.traffic(now - DAY_S)),
        )
