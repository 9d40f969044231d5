"""The main job as a newcomer runs it, only shorter: real processes, real HTTP, real text."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from homespun.cli.demo.devices import MIN_GROUP
from homespun.clock import SystemClock
from homespun.device.home import Home
from homespun.device.status import Status, read_status
from homespun.protocol.group import GroupState
from homespun.server.store import Store

TIMEOUT_S = 600
NUM_DEVICES = 40


def command(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "homespun.cli.main", "demo", "--dir", str(directory), *arguments]


def processes_of(directory: Path) -> list[list[str]]:
    """Command lines of running processes that name `directory`."""
    running = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return [words for words in running if any(str(directory) in word for word in words)]


def rates(text: str, model: str) -> list[float]:
    """Top-1 and top-3 of a line of the final table, in per cent."""
    found = re.search(rf"{model} +([\d.]+) % +([\d.]+) %", text)
    assert found is not None, text
    return [float(found[1]), float(found[2])]


def test_the_demo_can_be_interrupted_and_still_ships_a_better_model(tmp_path):
    directory = tmp_path / "demo"
    arguments = command(directory, "--rounds", "8")
    # Tests that run in the background of a shell ignore it, and their children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:  # until its first round is over
            if line.startswith("  round"):
                break
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()
    assert demo.returncode == 130, rest
    assert "interrupted" in rest
    assert processes_of(directory) == []

    other = command(directory, "--rounds", "9")
    refused = subprocess.run(other, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert refused.returncode == 1
    assert "unfinished demo with other settings" in refused.stderr

    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "resuming" in done.stdout
    assert "every device that is ever charged serves it" in done.stdout
    released = rates(done.stdout, "released model")
    for baseline in ("initial model", "commonest words"):
        assert all(
            ours > theirs + 2
            for ours, theirs in zip(released, rates(done.stdout, baseline), strict=True)
        )
    assert processes_of(directory) == []

    assert_what_happened_to_single_devices_is_told(done.stdout)
    assert_releases_went_their_ways(done.stdout, directory)
    assert_only_sums_were_seen(done.stdout, directory)
    served = set()
    for root in sorted((directory / "devices").glob("[0-9]*/")):
        policy = Home(root).settings().policy
        assert (policy.allow_plain, policy.min_group) == (False, MIN_GROUP)
        assert list((root / "work").glob("*")) == []
    assert len(statuses(directory)) == NUM_DEVICES
    for status in statuses(directory):
        assert status.peak_memory_bytes < 120e6
        assert status.peak_child_memory_bytes < 200e6
        served |= {slot.checkpoint for slot in status.served.values()}
    assert len(served) == 1
    assert [status.served for status in statuses(directory)].count({}) == 1  # it is never charging


def assert_what_happened_to_single_devices_is_told(text: str) -> None:
    """In the device's own words and figures."""
    stopped = [float(s) for s in re.findall(r"work stopped within ([\d.]+) s", text)]
    assert len(stopped) == 2, text
    assert max(stopped) <= 2.0
    assert re.search(r"^picked up .* went on from its step checkpoint .* and reported$", text, re.M)
    assert re.search(r"^straggler .* in the group of round \d+, with weight 0.71$", text, re.M)
    assert re.search(r"^refused .* \d relevant examples, the task needs 20$", text, re.M)
    assert re.search(r"^refused .*: not asking the server for work: .* not charging$", text, re.M)
    assert "nothing of any training is left" in text


def assert_releases_went_their_ways(text: str, directory: Path) -> None:
    """What the screen says is what is on record, with evidence for every step that needs one."""
    store = Store(f"sqlite:///{directory / 'server' / 'homespun.db'}")
    releases = {release.request.version: release for release in store.releases.all()}
    steps = {v: store.releases.history(r.release_id)[1] for v, r in releases.items()}
    store.close()
    assert {version: str(release.state) for version, release in releases.items()} == {
        "1-initial": "superseded",
        "2-fragile": "rolled_back",
        "3-trained": "deployed",
        "4-noisy": "rejected",
    }
    for version, state in (
        ("2-fragile", "passed"),
        ("2-fragile", "rolling_back"),
        ("3-trained", "passed"),
        ("3-trained", "deployed"),
        ("4-noisy", "rejected"),
    ):
        (step,) = (step for step in steps[version] if step.state == state)
        assert step.findings
        assert step.reason in text
    num_able = NUM_DEVICES - 1
    for version in ("1-initial", "3-trained"):
        assert f"{version} on all {num_able} devices" in text


def assert_only_sums_were_seen(text: str, directory: Path) -> None:
    """What the summary says about secure aggregation is what the server has on record, and makes sense."""
    store = Store(f"sqlite:///{directory / 'server' / 'homespun.db'}")
    tasks, rounds = store.tasks.all(), store.rounds.summaries(SystemClock().now())
    store.close()
    assert {(str(view.spec.aggregation), view.spec.min_group) for view in tasks} == {
        ("secure", MIN_GROUP)
    }
    committed = [view for view in rounds if view.committed_at is not None]
    opened = [g for view in rounds for g in view.groups if g.state is GroupState.OPENED]
    assert len(committed) == 8 + 1 + 2 + 2  # training, test, two evaluations, two watches
    assert all(view.groups for view in committed)
    for view in committed:
        reported = [g.num_masked for g in view.groups if g.state is GroupState.OPENED]
        assert sum(reported) == view.num_reported
    num_sums, smallest, num_reports = figures(r"secure +(\d+) sums .* least (\d+) .* (\d+) ", text)
    assert num_sums == len(opened) >= len(committed)
    assert smallest == min(g.num_masked for g in opened) >= MIN_GROUP
    assert num_reports == sum(g.num_masked for g in opened)
    before, between, after = figures(
        r"drop-outs +(\d+) before .* (\d+) before .* (\d+) after", text
    )
    assert before == sum(g.num_devices - g.num_shared for g in opened)
    assert between == sum(g.num_shared - g.num_masked for g in opened)
    assert after == sum(g.num_masked - g.num_agreed for g in opened)
    # Three devices vanish in their first group. In so short a run it may be one that is broken off, but whoever was
    # told that it had dropped out is counted.
    sessions = [session for status in statuses(directory) for session in status.sessions]
    assert before + between >= [s.reason for s in sessions].count("dropped out of its group")


def statuses(directory: Path) -> list[Status]:
    """What the devices of a demo tell their owners."""
    found = [read_status(Home(root)) for root in sorted((directory / "devices").glob("[0-9]*/"))]
    return [status for status in found if status is not None]


def figures(pattern: str, text: str) -> list[int]:
    """The numbers of a line of the summary."""
    found = re.search(pattern, text)
    assert found is not None, text
    return [int(number) for number in found.groups()]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("nowhere", "there is no file or folder"), ("empty", "no text"), ("few", "the demo needs 40")],
)
def test_unusable_text_is_one_clear_line(tmp_path, text, complaint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "ann.txt").write_text("I write to nobody.")
    arguments = command(tmp_path / "demo", "--text", str(tmp_path / text))
    demo = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert demo.returncode == 1
    first, *hint = demo.stderr.splitlines()
    assert first.startswith("error: ")
    assert complaint in first
    assert len(hint) <= 1


def test_a_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    arguments = command(tmp_path, "--fresh")
    demo = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert demo.returncode == 1
    assert "holds something else" in demo.stderr
    assert (tmp_path / "thesis.txt").read_text() == "precious"
