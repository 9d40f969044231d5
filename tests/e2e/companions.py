"""Companions: synthetic devices beside a real one, because nobody is ever summed alone.

They sign, mask and wait as any device does; only their training is made up.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from homespun.plan.package import Plan
from homespun.protocol.messages import Assigned, Waiting
from homespun.protocol.views import TaskView
from tests.e2e.processes import CLOCK, MIN_GROUP, PATIENCE_S, POLL_S, Server
from tests.fleet.device import Device
from tests.fleet.member import Member


class Companions:
    """Several devices: by default as many as make a group together with one more."""

    def __init__(self, server: Server, http: httpx.Client, plan: Plan, count: int) -> None:
        self.clock, self.http, self.plan = CLOCK, http, plan
        here: Any = self  # what a synthetic device needs of its world
        self.devices = [Device(here, index) for index in range(count)]
        self._server = server

    def take_part(self, task: TaskView) -> None:
        """In the first round of a task, until nothing more is asked of them."""
        self._each(task, self._take_part)

    def give_up(self, task: TaskView) -> None:
        """Be drawn for the first round of a task, and leave."""
        self._each(task, lambda device, assigned, task: device.abort(assigned))

    def _each(self, task: TaskView, play: Any) -> None:
        token = self._server.token(task.spec.population)
        with ThreadPoolExecutor(len(self.devices)) as pool:
            done = [pool.submit(self._play, device, token, task, play) for device in self.devices]
        for each in done:
            each.result()

    def _play(self, device: Device, token: str, task: TaskView, play: Any) -> None:
        device.enroll(token, task.spec.population)
        give_up_at = CLOCK.now() + PATIENCE_S
        while isinstance(reply := device.claim(task, 1, wait_s=POLL_S), Waiting):
            assert CLOCK.now() < give_up_at, "never drawn"
        assert isinstance(reply, Assigned)
        play(device, reply, task)

    def _take_part(self, device: Device, assigned: Assigned, task: TaskView) -> None:
        member, give_up_at = Member(device, assigned, task.spec.name), CLOCK.now() + PATIENCE_S
        while member.step(int(POLL_S)):
            assert CLOCK.now() < give_up_at, f"never settled: {member.last}"


@contextmanager
def companions(server: Server, plan: Plan, count: int = MIN_GROUP - 1) -> Iterator[Companions]:
    """Companions of whoever takes part in a task with `plan`."""
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
        yield Companions(server, http, plan, count)
