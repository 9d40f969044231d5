"""What devices do about releases, with models whose quality is made up: they fetch, serve, compare and report.

The rules are those of docs/protocol.md: membership by a salted hash, an arm only for who serves what it should, one
report per release. The device library has its own implementation; this one keeps the server's tests independent of it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from homespun.errors import NotFound
from homespun.learning.contribution import Contribution
from homespun.learning.metrics import MetricSum, watched_names
from homespun.protocol import signing
from homespun.protocol.messages import (
    Assigned,
    ReleaseManifest,
    SignedRelease,
    Watch,
    decode,
)
from homespun.protocol.selection import in_bucket
from homespun.protocol.views import ReleaseView, TaskView
from homespun.rng import stream, unit_interval
from tests.fleet.device import POPULATION, Device

if TYPE_CHECKING:
    from tests.fleet.world import World

PATH = f"/v1/releases/{POPULATION}/default"


@dataclass(frozen=True)
class Model:
    """`accuracy`: mean over devices; `spread`: how much a device differs; `fails`: as soon as it is served."""

    accuracy: float
    latency_s: float = 0.01
    fails: bool = False
    spread: float = 0.02


@dataclass
class Serving(Device):
    """A device that serves models."""

    models: dict[str, Model] = field(default_factory=dict)
    active: ReleaseManifest | None = None
    newest: ReleaseManifest | None = None
    failed: set[str] = field(default_factory=set)
    took_part: set[str] = field(default_factory=set)
    clips: bool = True

    def manifest(self, path: str = PATH) -> ReleaseManifest:
        """A manifest, after checking who signed it. Raises `NotFound`."""
        signed = self.call(SignedRelease, "GET", path)
        data = base64.b64decode(signed.manifest)
        public = self.world.deployment.keys.publisher_public
        signing.verify(public, signed.signature, signing.RELEASE_CONTEXT + data)
        found: ReleaseManifest = decode(data, ReleaseManifest)
        return found

    def fetch(self) -> None:
        """See what is released, and serve it if it is for this device."""
        try:
            newest = self.manifest()
        except NotFound:
            return
        assert self.newest is None or newest.sequence >= self.newest.sequence
        self.newest = newest
        if self.place(newest) < newest.fraction:
            self._serve(newest)
        elif self.active is None:
            self._serve(self.manifest(f"{PATH}/deployed"))

    def place(self, manifest: ReleaseManifest) -> float:
        return unit_interval(manifest.stage_salt, f"salt {self.index}")

    def _serve(self, manifest: ReleaseManifest) -> None:
        if self.models[manifest.checkpoint].fails:
            self.failed.add(manifest.release_id)  # and goes on with what it had
        else:
            self.active = manifest

    def arm(self, watch: Watch) -> str | None:
        """Which side of the watch this device is on, if any."""
        newest = self.newest
        if newest is None or newest.release_id != watch.release_id or self.active is None:
            return None
        if self.place(newest) < newest.fraction:
            return "stage"
        return "control" if self.place(newest) >= 1 - newest.control else None

    def may_join(self, task: TaskView) -> bool:
        spec = task.spec
        if spec.name in self.took_part and spec.criteria.min_separation_rounds:
            return False
        if spec.watch is not None:
            return self.arm(spec.watch) is not None
        return in_bucket(spec.criteria.bucket, self.device_id)

    def accuracy(self, checkpoint: str) -> float:
        """The model on this device's examples: a device's own difficulty, and a little chance for each model."""
        model = self.models[checkpoint]
        own = stream(0, "device", self.index).normal(0.0, 0.05)
        chance = stream(0, "model", checkpoint, self.index).normal(0.0, model.spread)
        return float(np.clip(model.accuracy + own + chance, 0.0, 1.0))

    def contribution(self, assigned: Assigned, staleness: int = 0) -> Contribution:
        codec = self.codec(assigned)
        rng = stream(assigned.seed, self.index)
        if codec.metrics == watched_names():
            values = self._watched()
        else:
            candidate, incumbent = (self.accuracy(c) for c in assigned.checkpoints[:2])
            values = self._paired(candidate, incumbent, codec.clip_norm)
        metrics = {name: values.get(name, MetricSum(0.0, 0.0)) for name in codec.metrics}
        return codec.encode(np.zeros(0, np.float32), 10, metrics, rng, staleness)

    def _watched(self) -> dict[str, MetricSum]:
        watch = self.watching
        assert watch is not None
        assert self.active is not None
        arm, model = self.arm(watch), self.models[self.active.checkpoint]
        numbers = {
            "primary": self.accuracy(self.active.checkpoint),
            "latency": min(model.latency_s, watch.max_latency_s),
            "failed": float(watch.release_id in self.failed),
        }
        sums = {f"{arm}.{name}": MetricSum(value, 1.0) for name, value in numbers.items()}
        squares = {f"{arm}.{n}_squared": MetricSum(v * v, 1.0) for n, v in numbers.items()}
        return sums | squares

    def _paired(self, candidate: float, incumbent: float, clip: float) -> dict[str, MetricSum]:
        difference = candidate - incumbent
        if self.clips:
            difference = float(np.clip(difference, -clip, clip))
        return {
            "0.accuracy": MetricSum(10 * candidate, 10.0),
            "1.accuracy": MetricSum(10 * incumbent, 10.0),
            "difference": MetricSum(difference, 1.0),
            "difference_squared": MetricSum(difference**2, 1.0),
            "wins": MetricSum(float(difference > 0), 1.0),
        }


def serve(world: World, models: dict[str, Model]) -> list[Serving]:
    """Let the devices of a world serve these models, by checkpoint."""
    serving = [Serving(world, device.index, models) for device in world.devices]
    world.devices = list(serving)
    return serving


def show(world: World, release: ReleaseView) -> ReleaseView:
    view: ReleaseView = world.operate(ReleaseView, "GET", f"/releases/{release.release_id}")
    return view


def fetch(world: World, devices: list[Serving]) -> None:
    """Everybody who has not seen the newest release does now."""
    newest = {notice.sequence for notice in world.devices[0].check_in().releases}
    for device in devices:
        if device.newest is None or device.newest.sequence not in newest:
            device.fetch()


def take_part(world: World, devices: list[Serving]) -> bool:
    """Everybody fetches what is released; then one round of the first task that enough devices can join."""
    fetch(world, devices)
    for task in world.operate(list[TaskView], "GET", "/tasks"):
        pool = [device for device in devices if device.may_join(task)]
        if task.state != "active" or len(pool) < task.spec.minimum:
            continue
        for device in pool:
            device.watching = task.spec.watch
        cohort = world.gather(task, task.rounds_committed + 1, devices=pool)  # type: ignore[arg-type]
        for drawn, _ in cohort:
            assert isinstance(drawn, Serving)
            drawn.took_part.add(task.spec.name)
        world.report(task, cohort)
        return True
    return False


def follow(
    world: World, devices: list[Serving], release: ReleaseView, until: set[str], turns: int = 40
) -> ReleaseView:
    """Let devices live until the release is in one of these states."""
    for _ in range(turns):
        view = show(world, release)
        if view.state in until:
            fetch(world, devices)
            return view
        if not take_part(world, devices):
            world.pass_time(6 * 3600.0)
    raise AssertionError(f"the release is stuck in {show(world, release)}")
