"""`homespun device status`, `why`, `conditions`: what the device does, why, and what it knows of itself."""

from __future__ import annotations

from pathlib import Path

import typer

from homespun.cli.device.options import DirOption, JsonOption
from homespun.cli.output import out, print_json, print_table, size

WORDS = {True: "yes", False: "no", None: "unknown"}


def status(directory: Path = DirOption, as_json: bool = JsonOption) -> None:
    """What the device is doing, and why it does or does not take part."""
    from homespun.device.home import Home
    from homespun.device.status import read_status

    home = Home(directory)
    settings = home.settings()
    found = read_status(home)
    if as_json:
        return print_json(found)
    if found is None:
        return out.print(f"device {settings.device_id} has not run yet", markup=False)
    doing = f"{found.task}, round {found.round_number}" if found.task else "no session"
    rows: list[tuple[str, object]] = [
        ("device", f"{found.device_id} of {found.population}"),
        ("state", f"{found.state}: {found.verdict}"),
        ("session", doing),
        *(("refused", f"{r.task or 'everything'}: {r.text}") for r in found.refusals),
        *(("release", problem) for problem in found.release_problems),
        *(
            ("serves", f"{slot}: {s.version}, {s.checkpoint[:12]}; {s.in_words()}")
            for slot, s in found.served.items()
        ),
        ("examples", f"{found.num_examples}, of which {found.num_held_out} held out"),
        ("traffic", f"{size(found.bytes_up)} up, {size(found.bytes_down)} down"),
        ("memory", f"at most {size(found.peak_memory_bytes)}"),
        *(
            [("paused", f"{found.num_pauses} times, longest stop {found.longest_stop_s:.1f} s")]
            if found.num_pauses
            else []
        ),
        *(
            ("took part", f"{p.task_name}, round {p.round_number}: {p.outcome} {p.reason}".strip())
            for p in found.sessions
        ),
    ]
    return print_table(("", ""), rows, "")


def why(directory: Path = DirOption, as_json: bool = JsonOption) -> None:
    """Why the device does or does not take part: every condition, criterion and rule, as it is now."""
    from homespun.clock import SystemClock
    from homespun.device.home import Home
    from homespun.device.why import explain

    found = explain(Home(directory), SystemClock())
    if as_json:
        return print_json(found)
    for line in found.text:
        out.print(line, markup=False)
    out.print(f"waiting for {found.waiting_for}", markup=False)
    groups = [("", found.checks), *((task.task, task.checks) for task in found.tasks)]
    rows = [
        (task, check.name, WORDS[check.holds], check.text if check.code else f"({check.text})")
        for task, checks in groups
        for check in checks
    ]
    out.print()
    return print_table(("task", "asked for", "", "because"), rows, "")


def show_conditions(
    directory: Path = DirOption,
    record: Path | None = typer.Option(
        None, help="Write every change to this file until stopped: a script for --conditions."
    ),
    as_json: bool = JsonOption,
) -> None:
    """What this machine says of itself now, and who says it."""
    from homespun.clock import SystemClock
    from homespun.device import recording
    from homespun.device.home import Home
    from homespun.device.measured import measured
    from homespun.device.stopping import Stop

    clock, home = SystemClock(), Home(directory)
    scripted = home.settings().conditions is not None
    with measured(home.root) as source:
        if record:
            stop = Stop()
            stop.on_signals()
            return recording.record(source, record, clock, stop)
        found = source.read(clock.now())
    if as_json:
        return print_json(
            {name: {"value": found[name], "from": source.origins.get(name)} for name in found}
        )
    rows = [(name, WORDS[found[name]], source.origins.get(name, "nobody")) for name in found]
    print_table(("", "now", "says"), rows, "")
    if scripted:
        out.print("this device follows a script instead", markup=False)
    return None
