"""The owners of the demo's devices: they pick their phones up at the wrong moment, and they type on them.

What they do reaches a device as it would in life: as conditions that it measures, and as predictions that the keyboard
asks for. What came of it is read from what the device shows its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import sqrt

from homespun.cli.demo.devices import DemoDevice
from homespun.clock import Clock
from homespun.corpora.tokenizer import words
from homespun.protocol.messages import ReportState
from homespun.protocol.session import SessionState

IN_USE_S = 3.0
"""How long somebody who picks a phone up looks at it."""
LONG_USE_S = 20.0
"""How long at most, where it is to miss its round: if others are gone as well, the round waits for this one."""
NUM_PHRASES = 24
"""Typed with each watched release: a device says how its model does after 20 predictions."""

Say = Callable[[str, str], None]


@dataclass
class Interruption:
    """Somebody picks up a phone that trains, when `after` rounds are over.

    `until_late`: for so long that its round closes without it.

    Whose phone it is depends on who trains when the time has come; if the training was faster, another one is tried.
    `disturbed`: devices that were picked up, by anybody; each is once at most.
    """

    devices: Sequence[DemoDevice]
    disturbed: set[str]
    clock: Clock
    say: Say
    after: int = 0
    until_late: bool = False
    is_over: bool = False
    _device: DemoDevice | None = None
    _round: int = 0
    _picked_up_at: float = 0.0
    _is_in_use: bool = False

    def look(self, rounds_committed: int) -> None:
        """Do what is next, given how many rounds the task has committed."""
        if self._device is None:
            if rounds_committed >= self.after:
                self._pick_up()
        elif self._is_in_use:
            self._put_down(self._device, rounds_committed)
        else:
            self._tell(self._device)

    def end(self) -> None:
        """Nobody keeps a phone in hand after the last round."""
        if self._device is not None and self._is_in_use:
            self._device.put_down()

    def _pick_up(self) -> None:
        for device in self.devices:
            if device.has_role or device.name in self.disturbed:
                continue
            status = device.status()
            if status is None or status.state != SessionState.TRAINING:
                continue
            device.pick_up()
            self.disturbed.add(device.name)
            self._device, self._round = device, status.round_number or 0
            self._picked_up_at, self._is_in_use = self.clock.now(), True
            return

    def _put_down(self, device: DemoDevice, rounds_committed: int) -> None:
        status = device.status()
        was_training = status is not None and status.num_pauses > 0
        in_use_s = self.clock.now() - self._picked_up_at
        waits = was_training and self.until_late and rounds_committed < self._round
        if in_use_s >= (LONG_USE_S if waits else IN_USE_S):
            device.put_down()
            self._is_in_use = False
            if not was_training:
                self._device = None

    def _tell(self, device: DemoDevice) -> None:
        status = device.status()
        if status is None:
            return
        ended = [s for s in status.sessions if s.round_number >= self._round]
        if not ended or status.state == SessionState.TRAINING:
            return
        last = ended[-1]  # the newest come first; it was this one that was interrupted
        if last.outcome not in (ReportState.ACKNOWLEDGED, ReportState.INCLUDED):
            if last.outcome in (ReportState.LATE, ReportState.VOID):
                self._device = None  # it came too late, or its group was lost: the next one then
            return
        stopped = f"work stopped within {status.longest_stop_s:.1f} s"
        if not self.until_late:
            self.say(
                "picked up",
                f"{device.name} in the middle of training: {stopped}, went on from its step "
                f"checkpoint when it was put down, and reported",
            )
        elif last.round_number > self._round:
            late = last.round_number - self._round
            self.say(
                "straggler",
                f"{device.name} was picked up until round {self._round} had closed ({stopped}); its report "
                f"is in the group of round {last.round_number}, with weight {1 / sqrt(1 + late):.2f}",
            )
        else:
            self._device = None
            return
        self.is_over = True


@dataclass
class Typists:
    """Everybody types a little on each model that a watched release brings or compares. `word`: one they all use."""

    devices: Sequence[DemoDevice]
    slot: str
    word: str
    _typed: set[tuple[str, str]] = field(default_factory=set)

    def type(self, release_id: str) -> None:
        """On every device that knows of this release and has not been typed on since."""
        for device in self.devices:
            if (device.name, release_id) in self._typed:
                continue
            with closing(device.models()) as models:
                newest = models.slots(self.slot).newest
                if newest is not None and newest.release_id == release_id:
                    for phrase in self._phrases(device):
                        models.predict(phrase, slot=self.slot)
                    self._typed.add((device.name, release_id))

    def _phrases(self, device: DemoDevice) -> list[str]:
        openings = [" ".join(words(text)[:3]) for text in device.user.texts[:NUM_PHRASES]]
        openings += ["this is the"] * (NUM_PHRASES - len(openings))
        return [f"this is the {self.word}", *openings]


def serving(devices: Sequence[DemoDevice], slot: str, version: str) -> int:
    """How many devices predict with this release."""
    count = 0
    for device in devices:
        status = device.status()
        served = None if status is None else status.served.get(slot)
        count += served is not None and served.version == version
    return count
