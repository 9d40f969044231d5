"""What all steps of the demo share: the settings of the run, everything that is on stage, and a look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from homespun.cli.client import OperatorClient
from homespun.cli.demo.devices import DemoDevice
from homespun.cli.demo.fleet import Process
from homespun.cli.demo.screen import Screen
from homespun.clock import Clock
from homespun.plan.package import Plan
from homespun.protocol.messages import RetryWindow
from homespun.protocol.tasks import GroupSpec
from homespun.tensors import codec
from homespun.types import Hash, Tree

POPULATION = "keyboard"
SELECTION_S = 15.0
RETRY = RetryWindow(earliest_s=1.0, latest_s=2.0)
GROUPS = GroupSpec(step_s=3.0)
PATIENCE_S = 120.0
POLL_S = 1.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. A run resumes only with the settings it began with."""

    text: str | None
    public_text: str | None
    devices: int
    rounds: int
    seed: int
    exact: bool


@dataclass(frozen=True)
class Stage:
    """Everything that is on stage while the server runs."""

    settings: Settings
    screen: Screen
    clock: Clock
    client: OperatorClient
    plan: Plan
    plan_hash: Hash
    devices: Sequence[DemoDevice]
    processes: Sequence[Process]

    def check(self) -> None:
        """Raise if one of the processes has ended."""
        for process in self.processes:
            process.check()


def tick(stage: Stage) -> None:
    """Between two looks at the server: are all alive, who is doing what."""
    for device in stage.devices:
        device.come_back(stage.clock.now())
    stage.check()
    stage.screen.live(stage.devices)


def push(client: OperatorClient, plan_hash: Hash, checkpoint: Tree) -> Hash:
    """Give the server a checkpoint."""
    return client.push_checkpoint(codec.encode_tree(checkpoint), plan_hash).hash
