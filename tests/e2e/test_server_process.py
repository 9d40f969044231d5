"""A server as a real process: what stands in its way is one clear line, and so is what an operator does wrong."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from homespun import zoo
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.messages import TaskKind
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import (
    CheckpointView,
    PopulationView,
    ReleaseView,
    RoundSummary,
    TaskView,
    TokenView,
)
from homespun.tensors.codec import encode_tree
from tests.e2e.processes import (
    COMMAND,
    Process,
    Server,
    assert_fails,
    homespun,
    printed,
)
from tests.fleet.world import synthetic_plan

DIGITS = zoo.load("digits")
INITIAL = encode_tree(initial_checkpoint(DIGITS.manifest, 0))

LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from homespun.cli.main import main
main()
"""
"""The command line, in a process whose files cannot grow beyond its first argument: a disk that is full."""


def limited(limit_bytes: int) -> tuple[str, ...]:
    return (sys.executable, "-c", LIMITED, str(limit_bytes))


def serve(data: Path, port: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Try to start a server; one that starts is ended when patience is."""
    return homespun("serve", "--data", data, "--port", port, **options)


def assert_starts(data: Path) -> None:
    """A server starts in `data`, and has everything that was created there before."""
    server = Server(data)
    try:
        assert server.client.populations() == []
        assert {path.name for path in data.iterdir()} >= {"homespun.db", "operator.token"}
        assert not list(data.rglob("*.part"))
    finally:
        server.kill()


# --- starts that fail ---------------------------------------------------------------------------------


def test_a_port_in_use(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve(tmp_path / "data", port)
    assert_fails(done, "invalid_config", f"127.0.0.1:{port}", "in use", "hint: ", "--port")
    assert not (tmp_path / "data" / "server.json").exists()
    assert_starts(tmp_path / "data")


def test_a_data_directory_that_is_a_file(tmp_path: Path):
    file = tmp_path / "data"
    file.write_text("precious")
    assert_fails(serve(file), "invalid_config", str(file), "hint: ", "--data")
    assert file.read_text() == "precious"


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a place that not even root may write")
def test_a_data_directory_that_cannot_be_written():
    data = Path("/sys/kernel/homespun")
    assert_fails(serve(data), "invalid_config", str(data), "hint: ", "permissions")
    assert not data.exists()


def test_another_server_in_the_same_directory(tmp_path: Path):
    server = Server(tmp_path / "data")
    try:
        assert_fails(serve(server.data), "invalid_config", "another server", "hint: ")
        server.process.check()
        assert server.client.populations() == []
        assert (server.data / "server.json").exists()
    finally:
        server.kill()


def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path):
    """However far a start comes before the disk is full, the next one with more room works."""
    data = tmp_path / "data"
    for limit in (0, 1024, 20_000, 60_000):
        done = serve(data, command=limited(limit))
        assert_fails(done, "storage_failure", "hint: ")
        assert not (data / "server.json").exists()
    assert_starts(data)


def test_a_disk_that_is_full_later(tmp_path: Path):
    """The server says so and goes on; nothing is half-written."""
    data, log = tmp_path / "data", tmp_path / "log"
    large = synthetic_plan((250_000,))  # a checkpoint that is larger than the database with its log
    initial = encode_tree(initial_checkpoint(large.manifest, 0))
    limit = len(initial) - 1
    process = Process(log, "serve", "--data", data, "--port", 0, command=limited(limit))
    try:
        process.wait_for(data / "server.json")
        here = ("--data", data)
        (tmp_path / "plan.zip").write_bytes(large.to_bytes())
        plan_hash = printed("plan", "push", tmp_path / "plan.zip", *here).strip()
        (tmp_path / "initial").write_bytes(initial)
        before = {path for path in (data / "blobs").rglob("*") if path.is_file()}
        done = homespun("model", "push", plan_hash, tmp_path / "initial", *here)
        assert_fails(done, "storage_failure", "cannot store a blob", "hint: ")
        assert {path for path in (data / "blobs").rglob("*") if path.is_file()} == before
        assert listed(list[PopulationView], "population", "ls", *here) == []
        process.check()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
    server = Server(data)
    try:
        server.client.push_checkpoint(initial, plan_hash)
    finally:
        server.kill()


def stopped_data(tmp_path: Path) -> Path:
    """The data directory of a server that has run and was stopped."""
    server = Server(tmp_path / "data")
    server.client.create_population("people")
    server.stop()
    return server.data


def test_a_database_of_a_newer_version(tmp_path: Path):
    data = stopped_data(tmp_path)
    file = data / "homespun.db"

    def set_version(number: str) -> str:
        with sqlite3.connect(file) as database:
            (before,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
            database.execute("UPDATE alembic_version SET version_num = ?", (number,))
        database.close()
        return str(before)

    ours = set_version("9999_from_the_future")
    assert_fails(serve(data), "storage_failure", "newer version", "hint: ")
    assert set_version(ours) == "9999_from_the_future"
    server = Server(data)
    try:
        assert [view.name for view in server.client.populations()] == ["people"]
    finally:
        server.kill()


@pytest.mark.parametrize("start", [0, 100, 4096], ids=["header", "schema", "pages"])
def test_a_damaged_database(start: int, tmp_path: Path):
    data = stopped_data(tmp_path)
    file = data / "homespun.db"
    good = file.read_bytes()
    bad = good[:start] + b"\xa5" * (len(good) - start)
    file.write_bytes(bad)
    assert_fails(serve(data), "storage_failure", "database", "hint: ")
    file.write_bytes(good)
    server = Server(data)
    try:
        assert [view.name for view in server.client.populations()] == ["people"]
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("name", "content"),
    [("publisher.key", b"abc"), ("operator.token", b""), ("operator.token", b"\xff\xfe")],
    ids=["key", "empty-token", "token"],
)
def test_a_damaged_secret(name: str, content: bytes, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    (data / name).write_bytes(content)
    assert_fails(serve(data), "storage_failure", name, "hint: ")
    assert (data / name).read_bytes() == content
    (data / name).unlink()
    assert_starts(data)


def test_a_wrong_setting(tmp_path: Path):
    done = serve(tmp_path, command=("env", "HOMESPUN_SERVER_TICK_S=soon", *COMMAND))
    assert_fails(done, "invalid_config", "tick_s", "HOMESPUN_SERVER_TICK_S")


# --- commands that fail -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a population, a plan, a checkpoint and two tasks, of which one is stopped."""
    server = Server(tmp_path_factory.mktemp("server-process") / "server")
    client = server.client
    client.create_population("people")
    plan_hash = client.push_plan(DIGITS.to_bytes()).hash
    checkpoint = client.push_checkpoint(INITIAL, plan_hash).hash
    for name in ("first", "second"):
        task = client.create_task(
            TaskSpec(
                name=name,
                population="people",
                kind=TaskKind.TRAIN,
                plan_hash=plan_hash,
                checkpoints=(checkpoint,),
                goal=3,
                minimum=3,
                min_group=3,
            )
        )
    client.stop_task(task.task_id)
    yield server
    server.kill()


def listed(kind: Any, *arguments: object) -> Any:
    """What a command prints with --json, decoded strictly."""
    return msgspec.json.decode(printed(*arguments, "--json"), type=kind)


def test_an_unknown_task(server: Server):
    here = ("--data", server.data)
    for command in ("show", "stop"):
        assert_fails(homespun("task", command, "nothing", *here), "not_found", "task", "nothing")


def test_a_wrong_operator_token(server: Server):
    for command in (("task", "ls"), ("population", "create", "others")):
        done = homespun(*command, "--data", server.data, "--token", "guess")
        assert_fails(done, "not_authentic", "operator token", "hint: ")
    assert [view.name for view in server.client.populations()] == ["people"]


def test_no_server(tmp_path: Path, server: Server):
    assert_fails(
        homespun("task", "ls", "--data", tmp_path), "invalid_config", "no server", "hint: "
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = homespun("task", "ls", "--server", url, "--data", server.data)
    assert_fails(done, "unreachable", url, "homespun serve")


def test_a_revoked_join_token(server: Server, tmp_path: Path):
    here = ("--data", server.data)
    token = listed(TokenView, "token", "create", "people", *here)
    printed("token", "revoke", "people", token.token_id, *here)
    root = tmp_path / "device"
    enroll = ("device", "enroll", "--server", server.url, "--population", "people", "--dir", root)
    assert_fails(homespun(*enroll, "--token", token.token), "not_authentic", "token")
    assert not (root / "device.json").exists()
    assert_fails(
        homespun("token", "revoke", "people", "nothing", *here), "not_found", "token", "nothing"
    )
    fresh = listed(TokenView, "token", "create", "people", *here)
    printed(*enroll, "--token", fresh.token)
    assert (root / "device.json").exists()
    (people,) = listed(list[PopulationView], "population", "ls", *here)
    assert (people.name, people.num_devices) == ("people", 1)


def test_malformed_plans_and_checkpoints(server: Server, tmp_path: Path):
    here = ("--data", server.data)
    before = server.client.checkpoints()
    plan_hash = before[0].plan_hash
    bad = tmp_path / "bad"
    for content in (b"", b"not a zip", DIGITS.to_bytes()[:-100]):
        bad.write_bytes(content)
        assert_fails(homespun("plan", "push", bad, *here), "invalid_plan", "zip")
    for content, code in (
        (b"", "bad_frame"),
        (INITIAL[:-1], "bad_frame"),
        (
            encode_tree({"x": initial_checkpoint(DIGITS.manifest, 0)["output.bias"]}),
            "shape_mismatch",
        ),
    ):
        bad.write_bytes(content)
        assert_fails(homespun("model", "push", plan_hash, bad, *here), code)
    bad.write_bytes(INITIAL)
    assert_fails(homespun("model", "push", "0" * 64, bad, *here), "not_found", "plan", "hint: ")
    missing = tmp_path / "missing"
    assert_fails(homespun("model", "push", plan_hash, missing, *here), "invalid_input", "missing")
    assert_fails(homespun("plan", "push", missing, *here), "invalid_plan", "missing")
    release = ("model", "release", "people", plan_hash)
    assert_fails(homespun(*release, "0" * 64, "--version", "v1", *here), "not_found", "checkpoint")
    assert server.client.checkpoints() == before
    assert server.client.releases() == []


def test_malformed_task_descriptions(server: Server, tmp_path: Path):
    here = ("--data", server.data)
    spec = tmp_path / "task.toml"
    good = server.client.tasks()[0].spec
    lines = {
        "name": '"third"',
        "population": '"people"',
        "kind": '"train"',
        "plan_hash": f'"{good.plan_hash}"',
        "checkpoints": f'["{good.checkpoints[0]}"]',
        "goal": "3",
        "minimum": "3",
        "min_group": "3",
    }
    for changed, code, part in (
        ({"goal": "0"}, "invalid_config", "goal"),
        ({"minimum": "4"}, "invalid_config", "minimum"),
        ({"min_group": "2"}, "invalid_config", "min_group"),
        ({"min_group": "4"}, "invalid_config", "min_group"),
        ({"aggregation": '"open"'}, "invalid_config", "aggregation"),
        ({"colour": '"red"'}, "invalid_config", "colour"),
        ({"kind": "train"}, "invalid_config", "TOML"),
        ({"population": '"nobody"'}, "not_found", "nobody"),
        ({"plan_hash": f'"{"0" * 64}"'}, "not_found", "plan"),
    ):
        spec.write_text(
            "\n".join(f"{name} = {value}" for name, value in {**lines, **changed}.items())
        )
        assert_fails(homespun("task", "create", spec, *here), code, part)
    assert [view.spec.name for view in server.client.tasks()] == ["first", "second"]


def test_listings_are_complete(server: Server):
    here, client = ("--data", server.data), server.client
    assert listed(list[PopulationView], "population", "ls", *here) == client.populations()
    tasks = listed(list[TaskView], "task", "ls", *here)
    assert tasks == client.tasks()
    assert [(task.spec.name, task.state) for task in tasks] == [
        ("first", "active"),
        ("second", "stopped"),
    ]
    rounds = listed(list[RoundSummary], "rounds", *here)
    assert rounds == client.recent_rounds(20)
    assert sorted((r.task_name, r.state) for r in rounds) == [
        ("first", "open"),
        ("second", "cancelled"),
    ]
    shown = json.loads(printed("task", "show", tasks[1].task_id, *here, "--json"))
    assert msgspec.convert(shown["task"], TaskView) == tasks[1]
    assert msgspec.convert(shown["rounds"], list[RoundSummary]) == client.rounds(tasks[1].task_id)
    models = json.loads(printed("model", "ls", *here, "--json"))
    assert models.keys() == {"checkpoints", "releases"}
    assert msgspec.convert(models["checkpoints"], list[CheckpointView]) == client.checkpoints()
    assert msgspec.convert(models["releases"], list[ReleaseView]) == []
    assert len(models["checkpoints"]) == 1
