"""Watching a release while it is on its way: what its stage and its control band say of the model that they serve.

A device says how its model does on its held-out examples, how long a prediction takes, and whether the release failed
here; through secure aggregation, so only sums over many devices are ever known. It downloads nothing for that. It says
it once for each release, so it waits until the model has been used or has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from homespun.device.models import Models
from homespun.device.slots import Slots, name_of
from homespun.errors import Conflict, NumericFailure
from homespun.learning.metrics import MetricSum, watched_names
from homespun.plan import features
from homespun.plan.package import Plan
from homespun.protocol.messages import Watch
from homespun.protocol.selection import STAGE, arm
from homespun.types import Tree


@dataclass(frozen=True)
class Watcher:
    """One device, asked about one release."""

    models: Models
    watch: Watch

    def refusal(self) -> str:
        """Why this device has nothing to say of the release; empty: it has."""
        return self._place(self.models.slots(self.watch.slot))[1]

    def _place(self, slots: Slots) -> tuple[str | None, str]:
        """The arm that the device is in, and why it has nothing to say (empty: it has)."""
        newest, active, watch = slots.newest, slots.active, self.watch
        not_here = "the release that is watched is not here yet"
        if newest is None or newest.release_id != watch.release_id:
            return None, not_here
        place = arm(newest, self.models.salt)
        if place is None:
            return (
                None,
                "the release is neither for this device yet nor compared with what it serves",
            )
        if self._has_failed(slots, place):
            return place, ""
        if active is None:
            return place, "the device serves nothing that the release could be compared with"
        if place == STAGE and name_of(active) != watch.release_id:
            return place, not_here
        used = self.models.usage(watch.slot, active).num_predictions
        if used < watch.min_predictions:
            return place, f"{used} predictions; the device speaks after {watch.min_predictions}"
        return place, ""

    def _has_failed(self, slots: Slots, place: str | None) -> bool:
        """The release itself, in its stage; in the control band, what was served since the release came."""
        release = self.watch.release_id
        if place == STAGE:
            return any(failure.release == release for failure in slots.failed)
        return any(failure.during == release for failure in slots.failed)

    def metrics(
        self, examples: Sequence[dict[str, Any]], should_stop: Callable[[], bool]
    ) -> dict[str, MetricSum] | None:
        """The device's values under `watched_names()`, from its held-out examples; None if `should_stop` ended it.

        Raises `Conflict` if the device has nothing to say any more, `InvalidInput` and `InvalidExample` for its
        examples, `StorageFailure`.
        """
        watch, models = self.watch, self.models
        slots = models.slots(watch.slot)
        place, silent_because = self._place(slots)
        if silent_because:
            raise Conflict(silent_because)
        values: dict[str, float | None] = {}
        if (active := slots.active) is not None:
            try:
                if not slots.has_failed(active):  # with nothing to go back to, it is still served
                    plan, checkpoint = models.load(watch.slot, active)
                    values["primary"] = primary(plan, checkpoint, examples, should_stop)
            except NumericFailure as error:  # as bad as in a prediction
                slots = models.withdraw(watch.slot, active, error)
            if should_stop():
                return None
            mean_s = models.usage(watch.slot, active).mean_s
            values["latency"] = None if mean_s is None else min(mean_s, watch.max_latency_s)
        values["failed"] = float(self._has_failed(slots, place))
        sums = dict.fromkeys(watched_names(), MetricSum(0.0, 0.0))
        for name, value in values.items():
            if value is not None:
                sums[f"{place}.{name}"] = MetricSum(value, 1.0)
                sums[f"{place}.{name}_squared"] = MetricSum(value * value, 1.0)
        return sums


def primary(
    plan: Plan,
    checkpoint: Tree,
    examples: Sequence[dict[str, Any]],
    should_stop: Callable[[], bool],
) -> float:
    """Mean of the plan's primary metric; meaningless if `should_stop` ended it. Raises as `plan.run.evaluate` does."""
    from homespun.plan import run  # loads ONNX Runtime

    rows = features.encode(plan.manifest, plan.assets, examples)
    sums = run.evaluate(plan, checkpoint, rows, should_stop)
    return sums[plan.manifest.metrics[0]].mean if sums else 0.0
