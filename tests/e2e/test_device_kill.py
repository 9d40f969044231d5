"""A device that is killed right after each state of its journal, and one that is picked up while it trains."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from homespun.device.cleaning import left_over
from homespun.device.models import open_models
from homespun.protocol.group import GroupState
from homespun.protocol.session import SessionState
from homespun.protocol.views import TaskView
from tests.e2e import drill
from tests.e2e.companions import companions
from tests.e2e.processes import MIN_GROUP, Device, Process, Server, eventually
from tests.e2e.test_device_process import (
    ENDLESS,
    KEYBOARD,
    create_task,
    make_device,
    smuggle,
    start_endless_training,
)

S = SessionState
CONTRIBUTES = (*(set(S) - {S.LATE, S.VOID}), drill.MASKED)
REFUSES = (S.VOID, S.CLEANED, S.WAITING)
TOO_LATE = (S.LATE, S.CLEANED, S.WAITING)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("device-kill") / "server")
    yield server
    server.kill()


class Victim(Device):
    """A device that can be made to die."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.script = root.with_suffix(".drill")
        self.script.write_text("")
        self.deaths = 0

    def start(self, *options: object) -> None:
        command = (sys.executable, "-m", "tests.e2e.drill", self.script)
        self.process = Process(
            self.log,
            *("device", "run", "--dir", self.home.root),
            command=tuple(map(str, command)),
        )

    def die_at(self, *states: str) -> None:
        drill.write(self.script, states)

    @property
    def still_to_die_at(self) -> set[str]:
        return set(self.script.read_text().split())

    def live_until(self, done: Callable[[], bool], what: str) -> None:
        """Start it again whenever it was killed."""

        def look() -> bool:
            if self.process.exit_code is not None:
                assert self.process.end() == -signal.SIGKILL, self.log.read_text()
                self.deaths += 1
                self.start()
            return done()

        eventually(look, f"{what}; still to come: {self.still_to_die_at}")

    def children(self) -> list[psutil.Process]:
        """Every process that works for this device, whoever its parent is now."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "homespun.device.labour" in line and str(self.home.root) in line:
                found.append(process)
        return found

    def working_child(self) -> psutil.Process:
        """A child that has read its job: it has its lifeline, and then the memory limit that the job names."""

        def look() -> psutil.Process | None:
            for child in self.children():
                with suppress(psutil.NoSuchProcess):
                    if child.rlimit(psutil.RLIMIT_DATA)[0] != psutil.RLIM_INFINITY:
                        return child
            return None

        child = eventually(look, "a child works")
        assert child is not None
        return child

    def assert_clean(self) -> None:
        """Nothing of any session is left: no file, no process."""
        models = open_models(self.home, self.home.settings())
        eventually(lambda: not left_over(self.home, models), "everything is cleaned")
        assert self.children() == []
        assert self.log.read_text() == ""


@pytest.fixture
def victim(server: Server, tmp_path: Path) -> Iterator[Victim]:
    """A running device in a population of its own."""
    root = tmp_path / tmp_path.name
    make_device(root, server)
    victim = Victim(root)
    victim.start()
    yield victim
    victim.kill()


def in_the_sum(server: Server, task: TaskView) -> list[int]:
    """How many reports are in each sum of a task that was ever opened."""
    rounds = server.client.rounds(task.task_id)
    opened = [g for r in rounds for g in r.groups if g.state is GroupState.OPENED]
    return [group.num_masked for group in opened]


def push(server: Server) -> str:
    return server.client.push_plan(KEYBOARD.to_bytes()).hash


def whole_round(server: Server, victim: Victim, name: str = "train") -> None:
    """A round that needs the device, which dies at whatever is still on its list."""
    task = create_task(server, victim, push(server), name)
    with companions(server, KEYBOARD) as others, ThreadPoolExecutor(1) as pool:
        playing = pool.submit(others.take_part, task)

        def finished() -> bool:
            return (
                playing.done()
                and server.client.task(task.task_id).state == "finished"
                and (name, 1, "included") in victim.outcomes()
                and not victim.still_to_die_at
            )

        victim.live_until(finished, "the round is committed")
        playing.result()
    (summary,) = server.client.rounds(task.task_id)
    assert (summary.attempt, summary.num_assigned) == (1, MIN_GROUP)
    assert in_the_sum(server, task) == [MIN_GROUP]  # everybody, each once


def test_every_state_has_its_death():
    assert {*CONTRIBUTES, *REFUSES, *TOO_LATE} == {*S, drill.MASKED}


def test_a_device_that_is_killed_at_every_state_contributes_exactly_once(
    server: Server, victim: Victim
):
    before = {S.ELIGIBLE, S.CHECKED_IN, S.REJECTED, S.WAITING}  # while there is nothing to do
    victim.die_at(*before)
    victim.live_until(lambda: not victim.still_to_die_at, "it dies while there is nothing to do")
    victim.die_at(*(state for state in CONTRIBUTES if state not in before))
    whole_round(server, victim)
    assert victim.deaths == len(CONTRIBUTES)
    assert victim.outcomes() == [("train", 1, "included")]
    victim.assert_clean()


def test_a_device_that_is_killed_while_it_gives_up_holds_nobody_up(server: Server, victim: Victim):
    bad = create_task(server, victim, smuggle(server, KEYBOARD.to_bytes()), "bad")
    victim.die_at(*REFUSES)
    with companions(server, KEYBOARD) as others:
        others.give_up(bad)
    victim.live_until(lambda: not victim.still_to_die_at, "it refuses the plan")
    whole_round(server, victim, "good")
    assert victim.deaths == len(REFUSES)
    assert victim.outcomes() == [("bad", 1, "void"), ("good", 1, "included")]
    assert in_the_sum(server, bad) == []
    victim.assert_clean()


def test_a_device_that_is_killed_while_it_is_too_late_is_in_no_sum(server: Server, victim: Victim):
    """It is picked up while it trains, and the others reach the goal without it."""
    task = create_task(server, victim, push(server), over_selection=(MIN_GROUP + 1) / MIN_GROUP)
    victim.die_at(S.TRAINING, *TOO_LATE)
    with companions(server, KEYBOARD, MIN_GROUP) as others, ThreadPoolExecutor(1) as pool:
        playing = pool.submit(others.take_part, task)
        eventually(lambda: victim.process.exit_code is not None, "it dies while it trains")
        drill.in_use(victim.script).touch()
        victim.live_until(playing.done, "the others have finished")
        playing.result()
    eventually(lambda: server.client.task(task.task_id).state == "finished", "the goal is reached")
    drill.in_use(victim.script).unlink()
    victim.live_until(lambda: not victim.still_to_die_at, "it hears that it is late")
    victim.live_until(lambda: victim.outcomes() == [("train", 1, "late")], "it is late")
    assert in_the_sum(server, task) == [MIN_GROUP]
    victim.assert_clean()


# --- training ----------------------------------------------------------------------------------------------


def test_a_device_that_is_picked_up_stops_within_two_seconds_and_resumes(
    server: Server, victim: Victim
):
    start_endless_training(server, victim)
    eventually(victim.children, "the child is there")
    drill.in_use(victim.script).touch()
    picked_up = time.monotonic()
    eventually(lambda: not victim.children(), "nothing trains any more")
    assert time.monotonic() - picked_up < 2.0
    assert "onnxruntime" not in Path(f"/proc/{victim.process.pid}/maps").read_text()
    eventually(lambda: victim.status().verdict.startswith("paused"), "it says so")
    paused = victim.status()
    assert paused.num_pauses == 1
    assert paused.state == "training"
    assert paused.verdict.startswith("paused: the device is not idle")
    assert 0 < paused.longest_stop_s < 2.0
    drill.in_use(victim.script).unlink()
    eventually(victim.children, "it trains again")
    assert victim.status().num_resumes == 1


def test_a_device_stops_its_work_when_the_goal_is_reached_without_it(
    server: Server, victim: Victim
):
    plan_hash = server.client.push_plan(ENDLESS.to_bytes()).hash
    more_than_needed = (MIN_GROUP + 1) / MIN_GROUP
    task = create_task(server, victim, plan_hash, over_selection=more_than_needed)
    with companions(server, ENDLESS, MIN_GROUP) as others:
        others.take_part(task)
    eventually(lambda: victim.outcomes() == [("train", 1, "late")], "it hears of it")
    (session,) = victim.status().sessions
    assert session.reason == "the server wants no more reports"
    victim.assert_clean()


def test_a_child_dies_with_its_parent_and_the_next_start_carries_on(server: Server, victim: Victim):
    start_endless_training(server, victim)
    child = victim.working_child()
    child.suspend()  # it can do nothing about it itself
    victim.kill()
    eventually(lambda: not child.is_running() or child.status() == "zombie", "the child is gone")
    victim.start()
    (again,) = eventually(victim.children, "it trains again")
    assert again.pid != child.pid
    assert victim.outcomes() == [("train", 1, "training")]


def test_a_child_that_is_killed_costs_the_session_and_not_the_device(
    server: Server, victim: Victim
):
    start_endless_training(server, victim)
    victim.working_child().kill()
    eventually(lambda: victim.outcomes() == [("train", 1, "void")], "the session is given up")
    (session,) = victim.status().sessions
    assert session.reason == "plan refused: the process that ran the plan ended by signal 9"
    whole_round(server, victim, "another")
    victim.assert_clean()
