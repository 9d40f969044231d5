"""`homespun device`: every command on a real directory; the running ones as real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from homespun.cli.device import app
from homespun.clock import ManualClock
from homespun.device.home import Home, Settings
from homespun.device.identity import Identity
from homespun.device.status import read_status
from homespun.errors import HomespunError, InvalidConfig, NotFound, Unreachable
from homespun.protocol.eligibility import Policy
from tests.unit.device_server import Device, FakeServer
from tests.unit.test_device_models import FIRST, KEYBOARD


def invoke(*arguments: str | Path) -> str:
    """What a command prints; raises what it raises, which the program turns into one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, HomespunError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def enrolled(root: Path, server: str = "http://127.0.0.1:9") -> Home:
    """A device's directory as enrolling leaves it."""
    home = Home(root)
    identity = Identity.load_or_create(home.identity_file)
    home.write_settings(
        Settings(
            server=server,
            population="tests",
            device_id=identity.device_id,
            policy=Policy(unknown_is_met=True),
            conditions=(),  # whatever the machine that runs the tests is doing
        )
    )
    return home


def test_predicting_needs_no_server(tmp_path: Path):
    server = FakeServer(ManualClock())
    device = Device(tmp_path, server)
    server.release(KEYBOARD, FIRST, 1)
    for _ in range(6):
        device.step()
    device.kill()
    words = json.loads(invoke("predict", "thank you for the", "--dir", tmp_path, "--json"))
    assert len(words) == 3
    assert set(words[0]) == {"word", "probability"}
    assert words[0]["word"] in invoke("predict", "thank you for the", "--dir", tmp_path)


def test_predicting_without_a_model_says_so(tmp_path: Path):
    enrolled(tmp_path)
    with pytest.raises(NotFound, match="no model is served"):
        invoke("predict", "thank you", "--dir", tmp_path)


def test_examples_are_added_from_arguments_and_files(tmp_path: Path):
    home = enrolled(tmp_path / "device")
    assert "2 added; the store holds 2" in invoke("add", "one", "two", "--dir", home.root)
    (tmp_path / "notes.txt").write_text("First paragraph.\n\nSecond\nparagraph.\n\n\n")
    assert "2 added" in invoke("add", "--file", tmp_path / "notes.txt", "--dir", home.root)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("text of a")
    assert "the store holds 5" in invoke("add", "--file", tmp_path / "folder", "--dir", home.root)


def test_what_is_wrong_is_said(tmp_path: Path):
    with pytest.raises(InvalidConfig, match="not the directory of a device") as caught:
        invoke("add", "text", "--dir", tmp_path)
    assert "enroll" in caught.value.hint
    enrolled(tmp_path)
    with pytest.raises(InvalidConfig, match="nothing to add"):
        invoke("add", "--dir", tmp_path)
    (tmp_path / "device.json").write_text("{")
    with pytest.raises(InvalidConfig, match=r"device\.json"):
        invoke("status", "--dir", tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--server", "nowhere"], "not the address"),
        (["--server", "http://x", "--retry-s", "3"], "not a window"),
        (["--server", "http://x", "--retry-s", "3,1"], "not a window"),
        (["--server", "http://x", "--conditions", "missing.json"], "cannot be read"),
    ],
)
def test_enrolling_checks_what_it_is_given(extra: list[str], message: str, tmp_path: Path):
    with pytest.raises(InvalidConfig, match=message):
        invoke("enroll", "--token", "t", "--population", "p", "--dir", tmp_path / "new", *extra)
    assert not (tmp_path / "new").exists()


def test_enrolling_without_a_server_leaves_no_device(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(Unreachable, match="does not answer"):
            invoke(
                "enroll", "--server", url, "--token", "t", "--population", "p", "--dir", tmp_path
            )
    assert not Home(tmp_path).settings_file.exists()


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers: a long poll without end."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def running(home: Home) -> Iterator[subprocess.Popen[str]]:
    """`homespun device run` as a process, until it has written that it waits for the server."""
    program = "from homespun.cli.device import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "run", "--dir", str(home.root)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(400):
            status = read_status(home)
            if status is not None and status.verdict.startswith("ready"):
                break
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)  # another process cannot be waited for in a better way
        yield process
    finally:
        process.kill()
        process.communicate()


def test_sigterm_ends_a_long_poll_at_once(tmp_path: Path):
    with silent_server() as url, running(home := enrolled(tmp_path, url)) as process:
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
        assert time.monotonic() - began < 2.0
        assert process.returncode == 0
        assert errors == ""
        status = read_status(home)
        assert status is not None
        assert status.state == "stopped"


def test_a_killed_process_leaves_a_directory_to_carry_on_with(tmp_path: Path):
    with silent_server() as url, running(home := enrolled(tmp_path, url)) as process:
        process.kill()
        process.communicate(timeout=10)
        with running(home):
            status = read_status(home)
            assert status is not None
            assert status.verdict.startswith("ready")


def test_status_explains(tmp_path: Path):
    home = enrolled(tmp_path)
    assert "has not run yet" in invoke("status", "--dir", tmp_path)
    server = FakeServer(ManualClock())
    device = Device(home.root, server)
    server.open_round()
    device.run_session()
    device.kill()
    printed = invoke("status", "--dir", tmp_path)
    assert "acknowledged" in printed
    assert json.loads(invoke("status", "--dir", tmp_path, "--json"))["num_examples"] == 60


def test_a_device_needs_little_to_start():
    """No ONNX Runtime before there is work; never a web framework, PyTorch or pyarrow."""
    program = (
        "import sys, homespun.device.runtime, homespun.cli.device\n"
        "print(*[name for name in ('onnxruntime', 'torch', 'fastapi', 'starlette', 'sqlalchemy',"
        " 'pyarrow', 'scipy', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
