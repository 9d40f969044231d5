"""`homespun device install-service`: systemd runs the device of a user, while the machine is on mains power.

The timer looks now and then; the service begins only on mains power; from there on the device's own conditions decide,
every second. The sandbox is what a user's systemd can enforce without privileges: filters of system calls, no new
privileges, limits. Options that need a mount namespace of their own (`ProtectSystem=` and its kind) are left out: they
keep a service from starting where users may not make one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from homespun.cli.device.options import DirOption
from homespun.cli.output import out
from homespun.errors import Conflict, NotFound

if TYPE_CHECKING:
    from homespun.device.home import Settings

UnitsOption = typer.Option(
    None, "--user-unit-dir", help="Put the units here, and do not tell systemd: for packages."
)

SERVICE = """\
[Unit]
Description=Homespun device of {population}
ConditionACPower=true
ConditionPathExists={directory}/device.json
StartLimitIntervalSec=1h
StartLimitBurst=5

[Service]
Type=exec
ExecStart={command}
Restart=on-failure
RestartSec=1min
TimeoutStopSec=15s

Nice=19
CPUSchedulingPolicy=batch
CPUWeight=10
IOSchedulingClass=idle
IOWeight=10
MemoryMax=1G
TasksMax=64
OOMScoreAdjust=500

UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""

TIMER = """\
[Unit]
Description=Now and then, if the machine is on mains power: Homespun device of {population}

[Timer]
OnStartupSec=5min
OnCalendar=*:0/15
RandomizedDelaySec=5min

[Install]
WantedBy=timers.target
"""


def install_service(
    directory: Path = DirOption,
    unit_directory: Path | None = UnitsOption,
    print_only: bool = typer.Option(False, "--print", help="Print the units, install nothing."),
) -> None:
    """Let systemd run the device whenever this machine is on mains power."""
    units = unit_texts(directory.resolve(), _settings(directory))
    if print_only:
        for name, text in units.items():
            out.print(f"# {name}\n{text}", markup=False)
        return
    if unit_directory is None:
        _systemctl("show", "--property=Version")
    folder = unit_directory or _user_unit_directory()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in units.items():
        (folder / name).write_text(text)
    service, timer = units
    if unit_directory is None:
        _systemctl("daemon-reload")
        _systemctl("enable", "--now", timer)
    out.print(f"{service} and {timer} are in {folder}", markup=False)
    out.print("to run while nobody is logged in, too: loginctl enable-linger", markup=False)


def uninstall_service(
    directory: Path = DirOption, unit_directory: Path | None = UnitsOption
) -> None:
    """Undo `install-service`; the device and its directory stay."""
    service, timer = unit_names(_settings(directory))
    folder = unit_directory or _user_unit_directory()
    if not (folder / timer).exists():
        raise NotFound(f"there is no {timer} in {folder}", hint="it is not installed")
    if unit_directory is None:
        _systemctl("disable", "--now", timer)
        _systemctl("stop", service)
    for name in (service, timer):
        (folder / name).unlink(missing_ok=True)
    if unit_directory is None:
        _systemctl("daemon-reload")
    out.print(f"{service} and {timer} are removed", markup=False)


def unit_names(settings: Settings) -> tuple[str, str]:
    """Names of the service and of its timer: one pair for each device."""
    name = f"homespun-{settings.device_id[:12]}"
    return f"{name}.service", f"{name}.timer"


def unit_texts(directory: Path, settings: Settings) -> dict[str, str]:
    """The units by name, the service first."""
    words = (sys.executable, "-m", "homespun.cli.main", "device", "run", "--dir", str(directory))
    service, timer = unit_names(settings)
    return {
        service: SERVICE.format(
            population=settings.population,
            directory=str(directory).replace("%", "%%"),
            command=" ".join(map(_quoted, words)),
        ),
        timer: TIMER.format(population=settings.population),
    }


def _quoted(word: str) -> str:
    """A word of a command line as systemd reads it (systemd.service, "Command lines"): % and $ are its own."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _settings(directory: Path) -> Settings:
    from homespun.device.home import Home

    return Home(directory).settings()


def _user_unit_directory() -> Path:
    """Where systemd looks for units that a user made."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "systemd" / "user"


def _systemctl(*arguments: str) -> None:
    if shutil.which("systemctl") is None:
        raise NotFound(
            "this machine has no systemd",
            hint="start the device by other means: homespun device run --dir DIR",
        )
    command = ("systemctl", "--user", *arguments)
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Conflict(
            f"{' '.join(command)}: {reason[0]}",
            hint="this needs the systemd of your login: run it in a normal session, not with sudo",
        )
