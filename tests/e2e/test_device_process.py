"""A device as a real process: its whole life, what stays of it on the disk, and what it does when things go wrong.

It is summed with two synthetic companions, in a population of its own.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun import zoo
from homespun.corpora.vocabulary import Vocabulary
from homespun.device.home import Home
from homespun.device.status import Status
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.messages import Criteria, RetryWindow, TaskKind
from homespun.protocol.session import Session
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import TaskView
from homespun.server.blobs import LocalBlobs
from homespun.server.keys import load_keys
from homespun.server.store import Store
from homespun.tensors.codec import decode_tree, encode_tree
from tests.e2e.companions import companions
from tests.e2e.processes import CLOCK, MIN_GROUP, Device, Server, eventually, homespun, printed

PUBLIC = "thank you for the fish and the bread that you gave to the cat"
CANARY = "zanzibarquokka"
SLOT = "default"

VOCABULARY = Vocabulary.build([PUBLIC], 4000)
KEYBOARD = zoo.load("keyboard").with_assets({"vocabulary": VOCABULARY.to_bytes()})
INITIAL = initial_checkpoint(KEYBOARD.manifest, 0)
ENDLESS = KEYBOARD.with_settings(local_epochs=1000)

NEVER_S = 600.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("device-process") / "server")
    yield server
    server.kill()


def make_device(root: Path, server: Server) -> Device:
    """A device made by commands alone, in a population of its own name."""
    texts = root.with_suffix(".txt")
    texts.write_text("\n\n".join(f"thank you for the {CANARY} number {n}" for n in range(80)))
    script = root.with_suffix(".json")
    script.write_text("[]")
    printed(
        *("device", "enroll", "--dir", root, "--server", server.url, "--seed", 3),
        *("--population", root.name, "--token", server.token(root.name)),
        *("--min-group", MIN_GROUP, "--conditions", script),
        *("--poll-s", 2, "--retry-s", "0.2,0.5"),
    )
    assert "80 added" in printed("device", "add", "--dir", root, "--file", texts)
    return Device(root)


@pytest.fixture
def device(server: Server, tmp_path: Path) -> Iterator[Device]:
    """A running device in a population of its own."""
    device = make_device(tmp_path / tmp_path.name, server)
    device.start()
    yield device
    device.process.kill()


def create_task(
    server: Server,
    device: Device,
    plan_hash: str,
    name: str = "train",
    over_selection: float = 1.0,
) -> TaskView:
    """One round of training that the device and its companions fill."""
    checkpoint = server.client.push_checkpoint(encode_tree(INITIAL), plan_hash).hash
    spec = TaskSpec(
        name=name,
        population=device.home.settings().population,
        kind=TaskKind.TRAIN,
        plan_hash=plan_hash,
        checkpoints=(checkpoint,),
        goal=MIN_GROUP,
        minimum=MIN_GROUP,
        min_group=MIN_GROUP,
        over_selection=over_selection,
        pool_target=round(MIN_GROUP * over_selection),
        selection_s=NEVER_S,
        deadline_s=NEVER_S,
        retry=RetryWindow(earliest_s=0.1, latest_s=0.2),
        criteria=Criteria(min_examples=10),
    )
    return server.client.create_task(spec)


def train(server: Server, device: Device, name: str = "train") -> TaskView:
    """A whole round, until the device knows that its report is in the checkpoint."""
    plan_hash = server.client.push_plan(KEYBOARD.to_bytes()).hash
    task = create_task(server, device, plan_hash, name)
    with companions(server, KEYBOARD) as others:
        others.take_part(task)
    task_id = task.task_id
    eventually(lambda: server.client.task(task_id).state == "finished", "the task is finished")
    eventually(lambda: (name, 1, "included") in device.outcomes(), "the receipt is final")
    return server.client.task(task_id)


# --- a whole life -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Life:
    """What could be seen of a device that took part, got a release, predicted offline, and was stopped."""

    home: Home
    after_session: dict[str, bytes]
    at_the_end: dict[str, bytes]
    parameters: list[bytes]
    predicted: str
    stopped: tuple[int, float]
    status: Status
    server_memory_bytes: int
    log: str


@pytest.fixture(scope="module")
def life(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Life:
    device = make_device(tmp_path_factory.mktemp("life") / "life", server)
    home = device.home
    device.start()
    try:
        task = train(server, device)
        after_session = contents(home.root)
        trained = decode_tree(server.client.checkpoint(task.head))
        server.client.create_release(
            population="life",
            slot=SLOT,
            plan_hash=task.spec.plan_hash,
            checkpoint=task.head,
            version="v1",
        )
        eventually(lambda: device.status().served, "the release is served")
        server_memory = server.process.peak_memory_bytes()
        stopped = device.process.terminate()
    finally:
        device.process.kill()
    server.kill()
    predicted = printed("device", "predict", "thank you for the", "--dir", home.root, "--json")
    server.start()
    return Life(
        home=home,
        after_session=after_session,
        at_the_end=contents(home.root),
        parameters=samples(INITIAL) + samples(trained),
        predicted=predicted,
        stopped=stopped,
        status=device.status(),
        server_memory_bytes=server_memory,
        log=device.log.read_text(),
    )


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root`."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def samples(checkpoint: dict[str, np.ndarray]) -> list[bytes]:
    """A few bytes out of the middle of every parameter that is not constant."""
    flat = [array.ravel() for array in checkpoint.values()]
    return [
        array[array.size // 2 :][:8].tobytes() for array in flat if np.ptp(array[array.size // 2 :])
    ]


def holding(files: dict[str, bytes], *needles: bytes) -> set[str]:
    """Names of the files that contain one of these."""
    return {name for name, data in files.items() if any(needle in data for needle in needles)}


OWN = {"device.json", "identity.key", "store.key", "examples.db", "journal.db", "status.json"}
COMPANIONS = {"journal.db-wal", "journal.db-shm"}


def model(life: Life) -> str:
    """The folder of what it serves."""
    served = life.status.served[SLOT]
    return f"models/{SLOT}/{served.plan_hash[:32]}-{served.checkpoint[:32]}"


def test_nothing_of_a_session_stays(life: Life):
    assert OWN <= set(life.after_session) <= OWN | COMPANIONS
    files = {f"{model(life)}/{name}" for name in ("plan.zip", "checkpoint.safetensors")}
    assert set(life.at_the_end) == OWN | files | {"models/serving.db"}
    assert not list(life.home.work.iterdir())


def test_no_parameters_are_anywhere_but_in_the_served_model(life: Life):
    assert len(life.parameters) >= 8
    assert holding(life.after_session, *life.parameters) == set()
    served = holding(life.at_the_end, *life.parameters)  # so the search finds what is there
    assert served == {f"{model(life)}/checkpoint.safetensors"}


def test_examples_are_never_in_clear_on_the_disk(life: Life):
    assert life.status.num_examples == 80
    for text in (CANARY, "thank you"):
        for form in (text.encode(), text.encode("utf-16-le"), text.encode().hex().encode()):
            assert holding(life.after_session, form) == set()
    assert CANARY not in life.log
    assert holding(life.at_the_end, b"gave") == {f"{model(life)}/plan.zip"}  # the public words


def test_private_files_are_for_their_owner_only(life: Life):
    for name in ("identity.key", "store.key", "examples.db", "device.json", "status.json"):
        assert (life.home.root / name).stat().st_mode & 0o077 == 0, name


def test_the_journal_holds_hashes_and_numbers_only(life: Life):
    found: dict[str, list[dict[str, Any]]] = {}
    with sqlite3.connect(life.home.journal_file) as journal:
        journal.row_factory = sqlite3.Row
        for (table,) in journal.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            found[table] = [dict(row) for row in journal.execute(f"SELECT * FROM {table}")]
    journal.close()
    for row in found["session"]:  # a new one may have begun
        session = msgspec.json.decode(bytes(row["record"]), type=Session)
        assert (session.offer, session.assigned, session.digest, session.reason) == (None,) * 3 + (
            "",
        )
    assert found["refused_plan"] == []
    (participation,) = found["participation"]
    assert participation.pop("task_name") == "train"
    assert participation.pop("outcome") == "included"
    assert participation.pop("assignment_id") is None
    assert participation.pop("reason") == ""
    for name in ("plan_hash", "digest", "checkpoint"):
        assert re.fullmatch("[0-9a-f]{64}", str(participation.pop(name)))
    assert re.fullmatch("[0-9a-f]{16}", str(participation.pop("session_id")))
    numbers = [participation, *found["traffic"], *found["retry"]]
    assert all(isinstance(value, int | float) for row in numbers for value in row.values())


def test_predicting_works_with_the_server_down(life: Life):
    words = [suggestion["word"] for suggestion in json.loads(life.predicted)]
    assert len(set(words)) == 3
    assert set(words) <= set(VOCABULARY.words)


def test_stopping_takes_no_time(life: Life):
    code, seconds = life.stopped
    assert code == 0
    assert seconds < 2.0
    assert life.status.state == "stopped"
    assert life.log == ""


def test_memory_stays_small(life: Life):
    assert 20e6 < life.status.peak_memory_bytes < 200e6
    assert 20e6 < life.server_memory_bytes < 300e6


# --- when things go wrong -----------------------------------------------------------------------------


def test_a_server_that_vanishes_is_waited_for(server: Server, device: Device):
    eventually(lambda: device.status().verdict.startswith("ready"), "the device waits for offers")
    server.kill()
    try:
        eventually(
            lambda: "does not answer" in printed("device", "status", "--dir", device.home.root),
            "the device misses the server",
        )
    finally:
        server.start()
    train(server, device)
    device.process.check()


def unsigned(server: Server) -> bytes:
    return KEYBOARD.to_bytes()


def from_a_stranger(server: Server) -> bytes:
    return KEYBOARD.sign(Ed25519PrivateKey.generate()).to_bytes()


def of_a_future_format(server: Server) -> bytes:
    """Properly signed by our publisher, so that nothing but the format is wrong."""
    future = replace(KEYBOARD, manifest=msgspec.structs.replace(KEYBOARD.manifest, format=9))
    return future.sign(load_keys(server.data).publisher).to_bytes()


BAD_PLANS: list[tuple[Callable[[Server], bytes], str]] = [
    (unsigned, "is not signed"),
    (from_a_stranger, "not trusted"),
    (of_a_future_format, "format"),
]


def smuggle(server: Server, packed: bytes) -> str:
    """Put a plan that the server would not take into its blobs and its catalogue."""
    blobs = LocalBlobs(server.data / "blobs", 2**28)
    store = Store(f"sqlite:///{server.data / 'homespun.db'}")
    address = blobs.put(packed)
    manifest = KEYBOARD.manifest.to_bytes()
    store.catalogue.add_plan(address, "keyboard", len(packed), manifest, CLOCK.now())
    store.close()
    return address


@pytest.mark.parametrize(("make", "why"), BAD_PLANS, ids=["unsigned", "stranger", "format"])
def test_a_plan_that_must_not_run_is_refused_and_the_next_one_runs(
    make: Callable[[Server], bytes], why: str, server: Server, device: Device
):
    task = create_task(server, device, smuggle(server, make(server)), "bad")
    with companions(server, KEYBOARD) as others:
        others.give_up(task)
    eventually(lambda: "refused_plan" in device.status().refusal_counts, "the plan is refused")
    (session,) = device.status().sessions
    assert (session.task_name, session.outcome) == ("bad", "void")
    assert session.reason.startswith("plan refused")
    assert why in session.reason
    shown = printed("device", "status", "--dir", device.home.root)
    assert re.search(f"took part +bad, round 1: void plan refused: .*{why}", shown)
    device.process.check()
    train(server, device, "good")
    assert [name for name, _, outcome in device.outcomes() if outcome != "void"] == ["good"]
    assert not list(device.home.work.iterdir())
    assert device.log.read_text() == ""


def start_endless_training(server: Server, device: Device) -> TaskView:
    plan_hash = server.client.push_plan(ENDLESS.to_bytes()).hash
    task = create_task(server, device, plan_hash)
    with companions(server, ENDLESS) as others:
        others.give_up(task)
    eventually(lambda: device.status().state == "training", "the device trains")
    (session,) = device.home.work.iterdir()
    files = contents(session)
    assert set(files) == {"plan.zip", "checkpoint-0.safetensors"}
    assert holding(files, *samples(INITIAL)) == {"checkpoint-0.safetensors"}
    return task


def test_stopping_in_the_middle_of_training_leaves_nothing(server: Server, device: Device):
    task = start_endless_training(server, device)
    code, seconds = device.process.terminate()
    assert (code, device.log.read_text()) == (0, "")
    assert seconds < 2.0
    assert device.status().state == "stopped"
    assert device.outcomes() == [("train", 1, "void")]
    assert not list(device.home.work.iterdir())
    assert set(contents(device.home.root)) == OWN
    first = eventually(
        lambda: [r for r in server.client.rounds(task.task_id) if r.state == "abandoned"],
        "the server knows that the device gave up",
    )
    assert (first[0].num_assigned, first[0].groups) == (MIN_GROUP, ())


def test_what_a_kill_in_the_middle_of_training_leaves_is_gone_when_the_session_ends(
    server: Server, device: Device
):
    task = start_endless_training(server, device)
    device.process.kill()
    assert list(device.home.work.rglob("*.safetensors"))
    device.start()
    eventually(lambda: device.status().state == "training", "the device carries on")
    code, _ = device.process.terminate()
    assert code == 0
    assert not list(device.home.work.iterdir())
    assert device.outcomes() == [("train", 1, "void")]
    server.client.stop_task(task.task_id)
    device.start()
    train(server, device, "again")


def test_two_processes_are_never_one_device(device: Device):
    second = homespun("device", "run", "--dir", device.home.root)
    assert second.returncode == 1
    assert "another process is running the device" in second.stderr
    assert "Traceback" not in second.stderr
    device.process.check()
