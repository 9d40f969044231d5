"""`homespun device`: be a device. Every command works on one directory, `--dir`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from homespun.cli.lifeline import stop_with_stdin
from homespun.cli.output import out, print_json, print_table, size
from homespun.errors import InvalidConfig

if TYPE_CHECKING:
    from homespun.device.conditions import Span
    from homespun.protocol.messages import RetryWindow

app = typer.Typer(no_args_is_help=True)

# What a command needs of homespun.device is imported inside it: `--help` should not load an HTTP client.

DirOption = typer.Option(..., "--dir", envvar="HOMESPUN_DEVICE", help="The device's directory.")
JsonOption = typer.Option(False, "--json", help="Print JSON.")


@app.command()
def enroll(
    server: str = typer.Option(..., envvar="HOMESPUN_SERVER", help="URL of the server."),
    token: str = typer.Option(..., envvar="HOMESPUN_JOIN_TOKEN", help="Join token."),
    population: str = typer.Option(..., help="Population to join."),
    directory: Path = DirOption,
    seed: int | None = typer.Option(
        None, help="Make identity and training reproducible: for experiments only."
    ),
    allow_plain: bool = typer.Option(
        False, "--allow-plain", help="Accept tasks without secure aggregation."
    ),
    unknown_is_met: bool = typer.Option(
        False, "--unknown-is-met", help="Count conditions that cannot be told as met."
    ),
    min_group: int = typer.Option(
        10, min=1, help="Smallest group whose sum may be formed; never below 3 if secure."
    ),
    conditions: Path | None = typer.Option(
        None, help="JSON script of conditions, for experiments."
    ),
    retry_s: str | None = typer.Option(
        None, help="A,B: come back after A to B seconds when the server is away."
    ),
    poll_s: float = typer.Option(20.0, min=0, help="How long the server may hold an answer."),
) -> None:
    """Make a directory a device of a population; again: with new settings, the same device."""
    from homespun.clock import SystemClock
    from homespun.device.enrolment import enroll as enroll_device
    from homespun.device.home import Home, Settings
    from homespun.protocol.eligibility import Policy
    from homespun.protocol.pacing import TRANSIENT_ERROR

    settings = Settings(
        server=server.rstrip("/"),
        population=population,
        policy=Policy(allow_plain=allow_plain, unknown_is_met=unknown_is_met, min_group=min_group),
        conditions=_script(conditions) if conditions else None,
        transient_error=_window(retry_s) if retry_s else TRANSIENT_ERROR,
        poll_s=poll_s,
    )
    enrolled = enroll_device(Home(directory), settings, token, SystemClock(), seed)
    out.print(f"device {enrolled.device_id} of {population}, in {directory}", markup=False)


@app.command()
def add(
    texts: list[str] | None = typer.Argument(None, help="Texts to learn from."),
    directory: Path = DirOption,
    file: Path | None = typer.Option(
        None, help="A text file, a folder of them, a table or a chat export."
    ),
) -> None:
    """Put examples into the device's private store."""
    from homespun.clock import SystemClock
    from homespun.device.examples import open_examples
    from homespun.device.home import Home

    home = Home(directory)
    found = [*(texts or ()), *(_read(file) if file else ())]
    if not found:
        raise InvalidConfig("nothing to add", hint="give texts, or --file PATH")
    store = open_examples(home, home.settings())
    try:
        now = SystemClock().now()
        store.add_many(({"text": text} for text in found), now)
        out.print(f"{len(found)} added; the store holds {store.count(now)}", markup=False)
    finally:
        store.close()


@app.command()
def run(
    directory: Path = DirOption,
    max_sessions: int | None = typer.Option(None, min=1, help="End after so many sessions."),
    until_eof: bool = typer.Option(False, help="Stop when standard input is closed."),
    vanish_after: str = typer.Option(
        "", hidden=True, help="A drill: die after this step of secure aggregation."
    ),
) -> None:
    """Be a device until stopped: take part, fetch releases, keep clean."""
    import logging

    from homespun.clock import SystemClock
    from homespun.device.conditions import ScriptedConditions
    from homespun.device.connection import Connection, http_client
    from homespun.device.home import Home
    from homespun.device.identity import Identity
    from homespun.device.measured import measured
    from homespun.device.memory import give_back_large_blocks
    from homespun.device.runtime import Runtime
    from homespun.device.stopping import Stop

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    give_back_large_blocks()
    stop, clock, home = Stop(), SystemClock(), Home(directory)
    stop.on_signals()
    if until_eof:
        stop_with_stdin()
    settings = home.settings()
    identity = Identity.load(home.identity_file)
    conditions = (
        measured(home.root)
        if settings.conditions is None
        else nullcontext(ScriptedConditions(settings.conditions, clock.now()))
    )
    with http_client(settings.server) as client, conditions as source:
        connection = Connection(client, identity, clock, stop)
        if vanish_after:
            from homespun.cli.demo.vanishing import VanishingConnection

            connection = VanishingConnection(client, identity, clock, stop)
            connection.vanish_after = vanish_after
        Runtime(home, connection, source, clock, stop).run(max_sessions)


@app.command()
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
            ("serves", f"{slot}: {s.version}, {s.checkpoint[:12]}")
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


@app.command("conditions")
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
    words = {True: "yes", False: "no", None: "unknown"}
    rows = [(name, words[found[name]], source.origins.get(name, "nobody")) for name in found]
    print_table(("", "now", "says"), rows, "")
    if scripted:
        out.print("this device follows a script instead", markup=False)
    return None


@app.command()
def predict(
    text: str = typer.Argument(..., help='For example "thank you for the".'),
    directory: Path = DirOption,
    k: int = typer.Option(3, "-k", min=1, help="How many words."),
    slot: str | None = typer.Option(None, help="Which model, if there are several."),
    as_json: bool = JsonOption,
) -> None:
    """The next word, from the model that the device serves; needs no server."""
    from homespun.device.home import Home
    from homespun.device.models import open_models

    home = Home(directory)
    found = open_models(home, home.settings()).predict(text, k, slot)
    if as_json:
        return print_json([{"word": s.word, "probability": s.probability} for s in found])
    rows = [(s.word, f"{100 * s.probability:.1f} %") for s in found]
    return print_table(("word", "probability"), rows, "no suggestion")


def _script(path: Path) -> tuple[Span, ...]:
    from homespun.device.conditions import parse_script

    try:
        return parse_script(path.read_bytes())
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error.strerror}") from error


def _window(text: str) -> RetryWindow:
    from homespun.protocol.messages import RetryWindow

    try:
        earliest, latest = (float(part) for part in text.split(","))
        if not 0 <= earliest <= latest < float("inf"):
            raise ValueError
    except ValueError as error:
        raise InvalidConfig(
            f"--retry-s {text!r} is not a window", hint="write it like 1,3"
        ) from error
    return RetryWindow(earliest_s=earliest, latest_s=latest)


def _read(path: Path) -> list[str]:
    """The texts of a file or folder; a plain text file gives one text per paragraph."""
    from homespun import corpora
    from homespun.corpora.sources import CHAT_LINE, read_text

    if path.suffix in (".txt", ".md", "") and path.is_file():
        text = read_text(path)
        if not CHAT_LINE.fullmatch(text.partition("\n")[0].rstrip("\r")):
            return [part.strip() for part in text.split("\n\n") if part.strip()]
    return [text for user in corpora.read(path) for text in user.texts]
