"""`verify` finds each kind of thing that could be left, and nothing else; `forget` leaves nothing."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from homespun.cli.device import app
from homespun.clock import ManualClock
from homespun.device import cleaning
from homespun.device.home import Home
from homespun.device.proof import Proof, free_pages, verify
from homespun.errors import Conflict, InvalidConfig
from homespun.protocol.messages import Receipt, ReportState
from homespun.protocol.session import Session
from homespun.protocol.session import SessionState as S
from tests.unit.device_server import Device, FakeServer
from tests.unit.test_device_cli import enrolled, invoke
from tests.unit.test_device_models import FIRST, KEYBOARD

ASSIGNMENT = "train-1-1"


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def device(tmp_path: Path, server: FakeServer):
    device = Device(tmp_path / "device", server)
    yield device
    device.kill()


def look(device: Device) -> Proof:
    return verify(device.home, ManualClock())


def found(home: Home) -> list[tuple[str, str]]:
    return [(each.path, each.what) for each in verify(home, ManualClock()).left]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device that took part, serves a release, and was stopped."""
    server = FakeServer(ManualClock())
    device = Device(tmp_path_factory.mktemp("lived") / "device", server)
    server.open_round()
    device.run_session()
    server.states[ASSIGNMENT] = Receipt(
        assignment_id=ASSIGNMENT, state=ReportState.INCLUDED, checkpoint="c" * 64
    )
    server.offers = []
    server.release(KEYBOARD, FIRST, 1)
    device.run_to(S.REJECTED)
    device.runtime.close()
    return device.home.root


@pytest.fixture
def life(lived: Path, tmp_path: Path) -> Home:
    """A copy of it to spoil."""
    return Home(shutil.copytree(lived, tmp_path / "device"))


# --- nothing is left ------------------------------------------------------------------------------------


def test_a_new_device_has_nothing(tmp_path: Path):
    home = enrolled(tmp_path)
    assert verify(home, ManualClock()).left == ()
    with pytest.raises(InvalidConfig, match="not the directory of a device"):
        verify(Home(tmp_path / "nowhere"), ManualClock())


def test_a_life_leaves_nothing(life: Home):
    before = {path: path.read_bytes() for path in life.root.rglob("*") if path.is_file()}
    proof = verify(life, ManualClock())
    after = {path: path.read_bytes() for path in life.root.rglob("*") if path.is_file()}
    assert after == before
    assert proof.left == ()
    assert proof.under_way == ""
    assert proof.num_files == 9  # six of the device, three of the release
    assert proof.size_bytes > 1_000_000
    assert proof.num_rows > 60


@pytest.mark.parametrize("state", [state for state in S if state not in (S.LATE, S.VOID)])
def test_the_session_under_way_is_left_out_in_every_state(
    state: S, device: Device, server: FakeServer
):
    """And what lies there is not overlooked: it is counted."""
    server.open_round()
    device.run_to(state)
    for is_running in (True, False):
        if not is_running:
            device.kill()
        proof = look(device)
        assert proof.left == ()
        is_under_way = state not in (S.WAITING, S.ELIGIBLE, S.CHECKED_IN, S.REJECTED)
        assert bool(proof.under_way) == is_under_way
        assert (proof.num_files_under_way > 0) == (
            state in (S.VERIFIED, S.TRAINING, S.PACKAGED, S.INTENT, S.REPORTING, S.ACKNOWLEDGED)
        )


def test_the_log_of_the_running_device_shows_nothing_of_a_session_that_is_over(
    device: Device, server: FakeServer
):
    """The assignment's id is what the server knows the session by."""
    log, journal = Path(f"{device.home.journal_file}-wal"), device.home.journal_file
    server.open_round()
    device.run_to(S.REPORTING)
    assert ASSIGNMENT.encode() in log.read_bytes()
    device.run_session()
    assert ASSIGNMENT.encode() in log.read_bytes() + journal.read_bytes()  # its receipt is open
    assert look(device).left == ()
    server.states[ASSIGNMENT] = Receipt(
        assignment_id=ASSIGNMENT, state=ReportState.VOID, reason="for a test"
    )
    device.run_to(S.REJECTED)
    assert ASSIGNMENT.encode() not in log.read_bytes() + journal.read_bytes()
    assert look(device).left == ()


# --- each kind of thing that could be left --------------------------------------------------------------


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"something of a session")
    return path


PLANTED = [
    ("work/0123456789abcdef/plan.zip", "work/0123456789abcdef"),
    ("work/report.bin", "work/report.bin"),
    ("device.json.tmp", "device.json.tmp"),
    ("store.key.tmp", "store.key.tmp"),
    ("models/default/2/checkpoint.safetensors", "models/default/2"),
    ("models/default/plan.zip.part", "models/default/plan.zip.part"),
    ("models/stray", "models/stray"),
    ("checkpoint-0.safetensors", "checkpoint-0.safetensors"),
    ("examples.db.backup", "examples.db.backup"),
    (".hidden", ".hidden"),
    ("deep/er/file", "deep/er/file"),
]


@pytest.mark.parametrize(("planted", "named"), PLANTED)
def test_a_file(planted: str, named: str, life: Home):
    write(life.root / planted)
    assert [path for path, _ in found(life)] == [named]


def test_a_file_beside_what_is_served(life: Home):
    (served,) = life.models.glob("default/*")
    write(served / "group.bin")
    assert [path for path, _ in found(life)] == [f"models/default/{served.name}/group.bin"]


def test_a_link(life: Home, tmp_path: Path):
    (life.root / "link").symlink_to(write(tmp_path / "elsewhere"))
    assert [path for path, _ in found(life)] == ["link"]
    (life.root / "link").unlink()
    (tmp_path / "folder").mkdir()
    (life.root / "work").mkdir(exist_ok=True)
    (life.root / "work" / "link").symlink_to(tmp_path / "folder")
    assert [path for path, _ in found(life)] == ["work/link"]


def in_journal(*statements: str) -> Callable[[Home], None]:
    def plant(home: Home) -> None:
        with sqlite3.connect(home.journal_file) as db:
            for statement in statements:
                db.execute(statement)
        db.close()

    return plant


def old_session(home: Home) -> None:
    record = Session(session_id="0ld", population="p", state=S.TRAINING, started_at=0.0)
    data = json.dumps({"session_id": record.session_id, "state": "training"}).replace(" ", "")
    with home.journal_file.open("r+b") as file:
        file.seek(-100, 2)
        file.write(data.encode())


def in_log(home: Home) -> None:
    Path(f"{home.journal_file}-wal").write_bytes(b'...{"session_id":"0ld","state":"training"}...')


ROWS = [
    (
        in_journal("UPDATE participation SET assignment_id = 'x'"),
        "the assignment of a session that is over",
    ),
    (in_journal("UPDATE participation SET digest = 'my text'"), "something else than a hash"),
    (in_journal("CREATE TABLE updates (v)"), "a table that the journal does not have: updates"),
    (in_journal("ALTER TABLE retry ADD COLUMN v"), "a table that the journal does not have: retry"),
    (old_session, "a record of session 0ld"),
]


@pytest.mark.parametrize(("plant", "what"), ROWS)
def test_a_row(plant: Callable[[Home], None], what: str, life: Home):
    plant(life)
    ((path, said),) = found(life)
    assert path == "journal.db"
    assert re.match(what, said)


def test_a_log(life: Home):
    in_log(life)
    assert found(life) == [("journal.db-wal", "a record of session 0ld")]


@pytest.mark.parametrize("name", ["examples.db", "journal.db"])
def test_what_was_deleted_and_not_overwritten(name: str, life: Home):
    with sqlite3.connect(life.root / name, isolation_level=None) as db:
        db.execute("PRAGMA secure_delete = OFF")
        db.execute("CREATE TABLE big (v)")
        db.executemany("INSERT INTO big VALUES (?)", [("x" * 3000,)] * 20)
        db.execute("DROP TABLE big")
    db.close()
    assert found(life) == [(name, "unused pages hold what was deleted")]


def test_what_was_deleted_and_overwritten_is_gone(life: Home):
    with sqlite3.connect(life.examples_file, isolation_level=None) as db:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("DELETE FROM example")
    db.close()
    proof = verify(life, ManualClock())
    assert proof.left == ()
    assert proof.num_free_pages > 3
    assert free_pages(life.examples_file) == (proof.num_free_pages, True)


def test_a_database_that_cannot_be_read(life: Home):
    life.examples_file.write_bytes(b"garbage" * 1000)
    ((path, what),) = found(life)
    assert path == "examples.db"
    assert "cannot be read" in what


def test_what_goes_while_it_is_looked_at_is_not_left(life: Home):
    passing = write(life.root / "status.json.tmp")

    class Clock(ManualClock):
        def sleep(self, seconds: float) -> None:
            passing.unlink(missing_ok=True)

    assert verify(life, Clock()).left == ()


def test_the_command(life: Home):
    printed = invoke("verify", "--dir", life.root)
    assert "looked at 9 files" in printed
    assert "nothing of past sessions is left" in printed
    write(life.root / "work" / "old" / "plan.zip")
    failed = CliRunner().invoke(app, ["verify", "--dir", str(life.root)])
    assert failed.exit_code == 1
    assert "work/old" in failed.output
    failed = CliRunner().invoke(app, ["verify", "--dir", str(life.root), "--json"])
    assert failed.exit_code == 1
    assert [each["path"] for each in json.loads(failed.output)["left"]] == ["work/old"]


# --- forgetting -----------------------------------------------------------------------------------------


def test_forgetting_needs_the_device_to_be_stopped(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.TRAINING)
    with pytest.raises(Conflict, match="another process is running the device"):
        cleaning.forget(device.home)
    assert device.home.store_key_file.exists()
    device.run_session()
    assert len(server.reports[ASSIGNMENT]) == 1


def test_what_is_forgotten_is_gone_and_the_device_goes_on_empty(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.REPORTING)
    device.kill()
    key = device.home.store_key_file.read_bytes()
    assert "forgotten" in invoke("forget", "--yes", "--dir", device.home.root)
    left = b"".join(path.read_bytes() for path in device.home.root.rglob("*") if path.is_file())
    assert key not in left
    assert device.files() == {"device.json", "identity.key", "journal.db"}
    device.run_session()  # the one that was interrupted: what it would report is gone
    assert server.reports == {}
    assert look(device).left == ()
    assert "1 added; the store holds 1" in invoke("add", "new", "--dir", device.home.root)


def test_the_key_is_overwritten_before_it_goes(life: Home, tmp_path: Path):
    other = tmp_path / "other"
    other.hardlink_to(life.store_key_file)  # the same bytes on the disk
    cleaning.forget(life)
    assert other.read_bytes() == bytes(32)


def test_forgetting_asks_first(life: Home):
    with pytest.raises(InvalidConfig, match="cannot be undone") as caught:
        invoke("forget", "--dir", life.root)
    assert "--yes" in caught.value.hint
    assert life.store_key_file.exists()
