"""A device inside an application: a real app, a real child process, a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from homespun import zoo
from homespun.corpora.vocabulary import Vocabulary
from homespun.device import Device
from homespun.device.home import Home
from homespun.device.status import read_status
from homespun.errors import InvalidConfig, InvalidExample, NotAuthentic, NotFound
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.eligibility import refusals
from homespun.tensors.codec import encode_tree
from tests.e2e.processes import ENVIRONMENT, POPULATION, Server, eventually

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed.py"
WORDS = Vocabulary.build(["thank you for the fish and the bread"], 4000)
KEYBOARD = zoo.load("keyboard").with_assets({"vocabulary": WORDS.to_bytes()})

APP = """
import sys
from homespun.device import Device

device = Device(sys.argv[1])
device.start()
print(device._process.pid, flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("embedding") / "server")
    server.token()
    plan = server.client.push_plan(KEYBOARD.to_bytes()).hash
    checkpoint = server.client.push_checkpoint(
        encode_tree(initial_checkpoint(KEYBOARD.manifest, 0)), plan
    ).hash
    server.client.create_release(
        population=POPULATION, slot="default", plan_hash=plan, checkpoint=checkpoint, version="v1"
    )
    yield server
    server.kill()


@pytest.fixture
def device(server: Server, tmp_path: Path) -> Iterator[Device]:
    """Enrolled by an app; this machine is idle, charging and so on."""
    with Device.enroll(
        tmp_path / "device",
        server=server.url,
        population=POPULATION,
        token=server.token(),
        conditions=(),
    ) as device:
        yield device


def state(device: Device) -> str | None:
    status = device.status()
    return status.state if status else None


def is_running(device: Device) -> bool:
    return device.is_running


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_importing_it_loads_nothing_heavy(tmp_path: Path):
    heavy = ("onnxruntime", "httpx", "numpy", "sqlite3", "cryptography", "asyncio", "homespun.cli")
    program = f"import sys, homespun.device; homespun.device.Device; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_storing_examples_loads_neither_onnx_runtime_nor_http(device: Device):
    program = (
        "import sys; from homespun.device import Device; device = Device(sys.argv[1])\n"
        "device.store.add({'text': 'thank you'}); print(device.store.count(), device.status(), device.why().state)\n"
        "print([m for m in ('onnxruntime', 'httpx') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(device._home.root)]
    assert subprocess.check_output(command, text=True) == "1 None stopped\n[]\n"


def test_a_device_in_ten_lines(device: Device):
    assert not device.why().is_running
    with pytest.raises(NotFound):
        device.predict("thank you for the")
    device.start()
    device.start()  # it runs already
    device.store.add({"text": "thank you for the flowers"})
    eventually(lambda: (status := device.status()) and status.served, "the release is served")
    assert is_running(device)
    assert len(device.predict("thank you for the")) == 3
    assert device.predict("", 1, prefix="fi")[0].word == "fish"
    why = device.why()
    assert why.is_running
    assert not refusals(why.checks)
    assert device.store.add_many([{"text": "one"}, {"text": "two"}]) == 2
    assert device.store.count() == 3
    device.stop()
    assert not is_running(device)
    assert device.why().waiting_for.startswith("a process that runs the device")
    assert len(device.predict("thank you for the")) == 3
    device.start()  # and again
    eventually(lambda: state(device) != "stopped", "it runs again")
    assert (device._home.root / "run.log").read_bytes() == b""


def test_what_is_wrong_is_said(device: Device, server: Server, tmp_path: Path):
    with pytest.raises(InvalidConfig, match="not the directory of a device"):
        Device(tmp_path / "nothing")
    with pytest.raises(NotAuthentic):
        Device.enroll(tmp_path / "x", server=server.url, population=POPULATION, token="wrong")
    with pytest.raises(InvalidExample):
        device.store.add({})


@pytest.mark.parametrize("how", ["ends", "is killed", "ends at once"])
def test_the_device_ends_with_the_app(how: str, device: Device):
    program = APP + ("" if how == "ends at once" else "sys.stdin.read()\n")
    app = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, str(device._home.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert app.stdin is not None
    assert app.stdout is not None
    pid = int(app.stdout.readline())
    if how != "ends at once":
        eventually(lambda: state(device), "it runs")
        assert not is_gone(pid)
    if how == "is killed":
        app.kill()
    app.communicate()
    eventually(lambda: is_gone(pid), "the background process has ended")
    if how != "ends at once":
        assert state(device) == "stopped"  # in good order


def test_the_next_app_waits_for_its_turn(device: Device):
    device.start()
    eventually(lambda: state(device), "it runs")
    with Device(device._home.root) as other:
        other.start()
        assert other._process is not None
        pid = other._process.pid
        eventually(lambda: len(psutil.Process(pid).threads()) > 1, "it waits")
        device.stop()
        (device._home.root / "status.json").unlink()
        eventually(lambda: state(device) not in (None, "stopped"), "the other one runs it")
        assert other.is_running
    assert state(device) == "stopped"


def test_ctrl_c_is_the_apps(device: Device):
    device.start()
    assert device._process is not None
    assert os.getpgid(device._process.pid) != os.getpgid(0)
    eventually(lambda: state(device), "it runs")
    device._process.send_signal(signal.SIGTERM)  # whoever stops it directly is obeyed
    eventually(lambda: not device.is_running, "it ends")


def test_the_example(server: Server, tmp_path: Path):
    folder = tmp_path / "notes"
    enrolment = (
        *("--server", server.url, "--population", POPULATION),
        *("--token", server.token()),
    )

    def run(*arguments: str) -> str:
        command = [sys.executable, str(EXAMPLE), str(folder), *arguments]
        notes = "thank you for the\nand the\n\n"
        return subprocess.check_output(command, input=notes, text=True, env=ENVIRONMENT)

    first = run(*enrolment)
    assert first.count("next: no model yet") == 2
    assert "The device: it has not checked in yet, so no task is known." in first
    home = Home(folder)
    settings = json.loads(home.settings_file.read_bytes()) | {"conditions": []}
    home.settings_file.write_text(json.dumps(settings))
    with Device(folder) as device:
        assert device.store.count() == 2
        device.start()
        eventually(lambda: (status := read_status(home)) and status.served, "it is served")
    lines = [line for line in run().splitlines() if "next:" in line]
    assert len(lines) == 2
    assert all(len(line.split(", ")) == 3 for line in lines)
    assert len(EXAMPLE.read_text().splitlines()) < 120
