"""`homespun device install-service`: units that systemd accepts, for whatever directory the device is in."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from homespun.cli.device.service import unit_names
from homespun.device.home import Home
from homespun.errors import Conflict, InvalidConfig, NotFound
from tests.unit.test_device_cli import enrolled, invoke

TIMEOUT_S = 60.0


def units(folder: Path) -> dict[str, ConfigParser]:
    """The units in a folder, by kind. They have no key twice, which ConfigParser would refuse."""
    found = {}
    for path in sorted(folder.iterdir()):
        parser = ConfigParser(interpolation=None)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read_string(path.read_text())
        found[path.suffix] = parser
    return found


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return enrolled(tmp_path / "a device of 100% mine")


@pytest.fixture
def installed(home: Home, tmp_path: Path) -> Path:
    folder = tmp_path / "units"
    said = invoke("install-service", "--dir", home.root, "--user-unit-dir", folder)
    assert all(name in said for name in unit_names(home.settings()))
    return folder


def test_the_units_say_what_they_promise(installed: Path, home: Home):
    found = units(installed)
    assert set(found) == {".service", ".timer"}
    unit, service = found[".service"]["Unit"], found[".service"]["Service"]
    assert unit["ConditionACPower"] == "true"
    assert unit["ConditionPathExists"].replace("%%", "%") == str(home.settings_file)
    assert (service["Nice"], service["IOSchedulingClass"]) == ("19", "idle")
    assert {"CPUWeight", "MemoryMax", "NoNewPrivileges", "Restart"} <= set(service)
    needs_a_namespace = {"ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices"}
    assert not needs_a_namespace & set(service)
    assert found[".timer"]["Install"]["WantedBy"] == "timers.target"


def test_the_command_is_one_that_runs(installed: Path, home: Home):
    """What systemd would start, word by word; here it only says what it is."""
    line = units(installed)[".service"]["Service"]["ExecStart"]
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]
    assert words[0] == sys.executable
    assert words[-2:] == ["--dir", str(home.root)]
    done = subprocess.run([*words, "--help"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, "Be a device until stopped" in done.stdout) == (0, True)


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="no systemd-analyze here: the units are parsed, not verified by systemd",
)
def test_systemd_accepts_the_units(installed: Path):
    paths = [str(path) for path in installed.iterdir()]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", "--recursive-errors=no", *paths],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "XDG_RUNTIME_DIR": str(installed)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_installing_again_changes_nothing_and_uninstalling_leaves_nothing(
    installed: Path, home: Home
):
    before = {path.name: path.read_text() for path in installed.iterdir()}
    options = ("--dir", home.root, "--user-unit-dir", installed)
    invoke("install-service", *options)
    assert {path.name: path.read_text() for path in installed.iterdir()} == before
    assert "removed" in invoke("uninstall-service", *options)
    assert list(installed.iterdir()) == []
    assert home.settings().device_id
    with pytest.raises(NotFound, match=r"there is no homespun-\w+\.timer"):
        invoke("uninstall-service", *options)


def test_printing_installs_nothing(home: Home, tmp_path: Path):
    said = invoke(
        "install-service", "--dir", home.root, "--print", "--user-unit-dir", tmp_path / "no"
    )
    assert "ConditionACPower=true" in said
    assert "[Timer]" in said
    assert not (tmp_path / "no").exists()


def test_only_an_enrolled_device_can_be_a_service(tmp_path: Path):
    with pytest.raises(InvalidConfig, match="not the directory of a device"):
        invoke("install-service", "--dir", tmp_path, "--print")


def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str | None) -> Path:
    """Let `systemctl` be this script, or nothing; the folder where user units would go."""
    folder.mkdir()
    if script is not None:
        (folder / "systemctl").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin" if script else str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    return folder / "config" / "systemd" / "user"


def test_without_systemd_it_says_so(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = on_path(tmp_path / "bin", monkeypatch, None)
    with pytest.raises(NotFound, match="no systemd") as caught:
        invoke("install-service", "--dir", home.root)
    assert "device run" in caught.value.hint
    assert not folder.exists()


def test_a_systemd_that_does_not_answer_is_told(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = on_path(tmp_path / "bin", monkeypatch, "echo Failed to connect to bus >&2; exit 1")
    with pytest.raises(Conflict, match="Failed to connect to bus"):
        invoke("install-service", "--dir", home.root)
    assert not folder.exists()


def test_systemd_is_told(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = tmp_path / "log"
    folder = on_path(tmp_path / "bin", monkeypatch, f'echo "$@" >> "{log}"')
    service, timer = unit_names(home.settings())
    invoke("install-service", "--dir", home.root)
    assert {path.name for path in folder.iterdir()} == {service, timer}
    assert log.read_text().splitlines()[1:] == [
        "--user daemon-reload",
        f"--user enable --now {timer}",
    ]
    log.unlink()
    invoke("uninstall-service", "--dir", home.root)
    assert log.read_text().splitlines() == [
        f"--user disable --now {timer}",
        f"--user stop {service}",
        "--user daemon-reload",
    ]
