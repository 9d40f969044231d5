"""The main job as a newcomer runs it, only shorter: real processes, real HTTP, real text."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from homespun.device.home import Home
from homespun.device.status import read_status

TIMEOUT_S = 400


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
    arguments = command(directory, "--devices", "24", "--rounds", "3")
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

    other = command(directory, "--devices", "24", "--rounds", "5")
    refused = subprocess.run(other, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert refused.returncode == 1
    assert "unfinished demo with other settings" in refused.stderr

    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "resuming" in done.stdout
    assert "all 24 devices serve it" in done.stdout
    released = rates(done.stdout, "released model")
    for baseline in ("initial model", "commonest words"):
        assert all(
            ours > theirs + 2
            for ours, theirs in zip(released, rates(done.stdout, baseline), strict=True)
        )
    assert processes_of(directory) == []

    served = set()
    for root in sorted((directory / "devices").glob("[0-9]*/")):
        status = read_status(Home(root))
        assert status is not None
        assert list((root / "work").glob("*")) == []
        assert status.peak_memory_bytes < 200e6
        served |= {slot.checkpoint for slot in status.served.values()}
    assert len(served) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("nowhere", "there is no file or folder"), ("empty", "no text"), ("few", "the demo needs 24")],
)
def test_unusable_text_is_one_clear_line(tmp_path, text, complaint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "ann.txt").write_text("I write to nobody.")
    arguments = command(tmp_path / "demo", "--devices", "24", "--text", str(tmp_path / text))
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
