"""The demo's devices: whose text lies on which, who is scripted away, and what their owners can see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path

import msgspec

from homespun.cli.demo.fleet import Process
from homespun.cli.demo.vanishing import EXIT_CODE as VANISHED
from homespun.clock import Clock, SystemClock
from homespun.corpora.sources import UserText
from homespun.device.conditions import Span
from homespun.device.enrolment import enroll
from homespun.device.examples import open_examples
from homespun.device.home import Home, Settings
from homespun.device.identity import Identity
from homespun.device.models import Models, open_models
from homespun.device.status import Status, read_status
from homespun.device.why import explain
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import Bucket, RetryWindow
from homespun.protocol.selection import in_bucket
from homespun.rng import derive_seed
from homespun.types import Hash

RETRY_WHEN_AWAY = RetryWindow(earliest_s=1.0, latest_s=3.0)
POLL_S = 20.0
AWAY_S = 40.0

NEVER_CHARGING = (Span(charging=False),)
AWAY = (Span(to_s=AWAY_S, unmetered=False),)
SCRIPTS = (NEVER_CHARGING, AWAY)
"""Of the first devices that may train: one is never plugged in, one is on a metered network at first."""
PICKED_UP = (Span(idle=False),)
"""What a device measures while its owner uses it."""
NEWCOMER_TEXTS = 8
"""All that the owner of the next device has written so far."""

VANISHING = ("advertise-keys", "share-keys", "mask-input")
"""The next devices vanish once, each right after another step of secure aggregation, and miss the rest of it."""
SWITCHED_OFF_S = 15.0

MIN_GROUP = 5
"""Fewest devices in a sum. Fewer than the 10 that devices insist on by default: there are only 30 of them here."""


@dataclass
class DemoDevice:
    """One device: a directory, a process, and the text that lies on it and nowhere else."""

    user: UserText
    root: Path
    seed: int
    script: tuple[Span, ...] = ()
    is_newcomer: bool = False
    vanish_after: str = ""
    back_at: float = 0.0
    process: Process = field(init=False)

    def __post_init__(self) -> None:
        self.process = Process(
            f"device {self.name}", self._command(), self.root.with_suffix(".log")
        )

    def _command(self, *options: str) -> tuple[str, ...]:
        return ("device", "run", "--dir", str(self.root), "--until-eof", *options)

    def start(self) -> None:
        """Begin; a device that is to vanish does so in its first group."""
        if self.vanish_after:
            self.process.command = self._command("--vanish-after", self.vanish_after)
            self.process.may_end_with = VANISHED
        self.process.start()

    def come_back(self, now: float) -> None:
        """If the device has vanished, as it was meant to, it is switched on again after a while."""
        if self.process.exit_code != VANISHED:
            return
        self.back_at = self.back_at or now + SWITCHED_OFF_S
        if now >= self.back_at:
            self.process.command = self._command()
            self.process.start()

    @property
    def name(self) -> str:
        return self.user.user

    @property
    def home(self) -> Home:
        return Home(self.root)

    @cached_property
    def device_id(self) -> str:
        return Identity.load_or_create(self.home.identity_file, self.seed).device_id

    def status(self) -> Status | None:
        """What the device tells its owner; None before its first step."""
        return read_status(self.home)

    def serves(self, checkpoint: Hash) -> bool:
        """Whether this is the model it predicts with."""
        status = self.status()
        return status is not None and any(
            served.checkpoint == checkpoint for served in status.served.values()
        )

    @property
    def has_role(self) -> bool:
        """Whether something is planned for it from the beginning."""
        return bool(self.script or self.is_newcomer or self.vanish_after)

    def pick_up(self) -> None:
        """Its owner uses it from now on."""
        self._measures(PICKED_UP)

    def put_down(self) -> None:
        self._measures(())

    def _measures(self, script: tuple[Span, ...]) -> None:
        settings = self.home.settings()
        self.home.write_settings(msgspec.structs.replace(settings, conditions=script))

    def why(self) -> str:
        """Why it does not take part, as it would tell its owner."""
        return explain(self.home, SystemClock()).text[0]

    def models(self) -> Models:
        """What it predicts with, from its directory alone."""
        return open_models(self.home, self.home.settings())

    def state(self) -> str:
        """What it is doing, in a word."""
        status = self.status()
        return "starting" if status is None else status.state.replace("_", " ")


def cast(users: Sequence[UserText], root: Path, seed: int) -> list[DemoDevice]:
    """One device per user."""
    return [
        DemoDevice(user, root / f"{index:03d}", derive_seed(seed, "device", index))
        for index, user in enumerate(users)
    ]


def give_roles(trainers: Sequence[DemoDevice]) -> None:
    """Who is away, who has too little to learn from, who vanishes; all before the devices are enrolled."""
    rest = iter(trainers)
    for script in SCRIPTS:
        next(rest).script = script
    next(rest).is_newcomer = True
    for step in VANISHING:
        next(rest).vanish_after = step


def split(devices: Sequence[DemoDevice], test_share: float) -> tuple[Bucket, Bucket]:
    """Disjoint buckets of the population: who trains, who only tests.

    The salt is the first that gives the test bucket its share of these few devices.
    """
    for number in count():
        train = Bucket(salt=f"demo-{number}", low=0.0, high=1.0 - test_share)
        tests = Bucket(salt=f"demo-{number}", low=1.0 - test_share, high=1.0)
        if len(members(devices, tests)) == round(test_share * len(devices)):
            return train, tests
    raise AssertionError("count() does not end")


def members(devices: Sequence[DemoDevice], bucket: Bucket) -> list[DemoDevice]:
    """The devices of a bucket."""
    return [device for device in devices if in_bucket(bucket, device.device_id)]


def enrol(
    devices: Sequence[DemoDevice], server: str, population: str, token: str, clock: Clock
) -> None:
    """Make every directory a device of the population; new ones get their user's text."""
    for device in devices:
        settings = Settings(
            server=server,
            population=population,
            policy=Policy(min_group=MIN_GROUP),
            conditions=device.script,
            transient_error=RETRY_WHEN_AWAY,
            poll_s=POLL_S,
        )
        enrolled = enroll(device.home, settings, token, clock, device.seed)
        store = open_examples(device.home, enrolled)
        try:
            now = clock.now()
            if store.count(now) == 0:
                texts = device.user.texts[: NEWCOMER_TEXTS if device.is_newcomer else None]
                store.add_many(({"text": text} for text in texts), now)
        finally:
            store.close()


def refusing(devices: Sequence[DemoDevice]) -> dict[str, int]:
    """How many devices refuse to take part at this moment, by reason."""
    statuses = [status for device in devices if (status := device.status())]
    return Counter(r.code.replace("_", " ") for s in statuses for r in s.refusals[:1])


def traffic(devices: Sequence[DemoDevice]) -> tuple[int, int]:
    """Bytes (up, down) of all devices together."""
    statuses = [status for device in devices if (status := device.status())]
    return sum(s.bytes_up for s in statuses), sum(s.bytes_down for s in statuses)
