"""The device's HTTP: signed, retried when the connection broke, limited, counted, and never a stack trace."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from homespun.clock import ManualClock
from homespun.device.connection import PAUSES_S, Connection, http_client
from homespun.device.identity import Identity
from homespun.device.stopping import Stop, Stopped
from homespun.errors import (
    BadFrame,
    Expired,
    InvalidConfig,
    NotAuthentic,
    NotFound,
    StorageFailure,
    TooLarge,
    Unreachable,
)
from homespun.protocol.messages import CheckIn
from tests.unit.device_server import POPULATION, TOKEN, FakeServer

CHECK_IN = CheckIn(population=POPULATION)
DATA = bytes(range(256)) * 400


def never() -> bool:
    return False


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def connection(server: FakeServer) -> Connection:
    return connect(server)


def connect(server: FakeServer, stop: Stop | None = None) -> Connection:
    client = httpx.Client(transport=server, base_url="http://server")
    connection = Connection(client, Identity(bytes(range(32))), server.clock, stop)
    connection.enroll(POPULATION, TOKEN)
    connection.take_traffic()
    return connection


def fail(server: FakeServer, *errors: Exception) -> None:
    """The next requests fail like this."""
    left = list(errors)

    def failure(request: httpx.Request) -> None:
        if left:
            raise left.pop(0)

    server.failure = failure


def test_a_request_is_answered_and_its_bytes_are_counted(connection: Connection):
    reply = connection.check_in(CHECK_IN)
    assert (reply.offers, reply.releases) == ((), ())
    up, down = connection.take_traffic()
    assert 20 < up < 200
    assert 20 < down < 200
    assert connection.take_traffic() == (0, 0)


def test_problems_become_our_exceptions(connection: Connection, server: FakeServer):
    fail(server, Expired("too late", hint="next time", deadline=3))
    with pytest.raises(Expired, match="too late") as caught:
        connection.check_in(CHECK_IN)
    assert (caught.value.hint, caught.value.details) == ("next time", {"deadline": 3})
    with pytest.raises(NotFound):
        connection.receipt("nobody")


def test_a_wrong_token_is_refused(server: FakeServer):
    client = httpx.Client(transport=server, base_url="http://server")
    with pytest.raises(NotAuthentic, match="token"):
        Connection(client, Identity(bytes(32)), server.clock).enroll(POPULATION, "guess")


def test_a_server_in_trouble_is_unreachable(connection: Connection, server: FakeServer):
    fail(server, StorageFailure("disk full"))
    with pytest.raises(Unreachable, match="disk full"):
        connection.check_in(CHECK_IN)


def test_a_broken_connection_is_tried_again_at_once(connection: Connection, server: FakeServer):
    before = server.clock.now()
    fail(server, httpx.ReadError("reset"), httpx.RemoteProtocolError("closed"))
    connection.check_in(CHECK_IN)
    assert server.clock.now() == pytest.approx(before + sum(PAUSES_S), abs=1e-3)


def test_trying_again_ends(connection: Connection, server: FakeServer):
    fail(server, *[httpx.ConnectError("refused")] * 10)
    server.log.clear()
    with pytest.raises(Unreachable, match="refused") as caught:
        connection.check_in(CHECK_IN)
    assert caught.value.hint
    assert len(server.log) == 1 + len(PAUSES_S)


def test_a_slow_server_is_not_asked_twice(connection: Connection, server: FakeServer):
    fail(server, httpx.ReadTimeout("slow"))
    server.log.clear()
    with pytest.raises(Unreachable):
        connection.check_in(CHECK_IN)
    assert len(server.log) == 1


def test_an_answer_that_is_none_is_a_named_error(server: FakeServer):
    def garbage(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=b"<html>login</html>")

    client = httpx.Client(transport=httpx.MockTransport(garbage), base_url="http://server")
    with pytest.raises(BadFrame):
        Connection(client, Identity(bytes(32)), server.clock).check_in(CHECK_IN)


def test_an_answer_without_end_is_cut(server: FakeServer):
    def flood(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=(b"x" * 2**20 for _ in range(100)))

    client = httpx.Client(transport=httpx.MockTransport(flood), base_url="http://server")
    with pytest.raises(TooLarge):
        Connection(client, Identity(bytes(32)), server.clock).check_in(CHECK_IN)


@pytest.mark.parametrize("skew_s", [4_000.0, -4_000.0])
def test_a_wrong_clock_is_put_right(skew_s: float, connection: Connection, server: FakeServer):
    server.skew_s = skew_s
    connection.check_in(CHECK_IN)
    server.log.clear()
    connection.check_in(CHECK_IN)
    assert len(server.log) == 1  # it stays right


def test_a_download_has_the_hash_that_was_asked_for(
    connection: Connection, server: FakeServer, tmp_path: Path
):
    address = server.put(DATA)
    assert connection.fetch(address, tmp_path / "work" / "blob", len(DATA), never)
    assert (tmp_path / "work" / "blob").read_bytes() == DATA
    server.blobs[address] = DATA[:-1] + b"!"
    with pytest.raises(BadFrame, match="not what was asked for"):
        connection.fetch(address, tmp_path / "other", len(DATA), never)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_a_broken_download_goes_on_where_it_was(
    connection: Connection, server: FakeServer, tmp_path: Path
):
    address = server.put(DATA)
    server.break_after = 10_000
    connection.take_traffic()
    assert connection.fetch(address, tmp_path / "blob", len(DATA), never)
    assert (tmp_path / "blob").read_bytes() == DATA
    assert connection.take_traffic()[1] == len(DATA)  # no byte came twice
    assert server.log.count(f"GET /v1/blobs/{address}") == 2


def test_a_download_goes_on_after_the_server_was_away(
    connection: Connection, server: FakeServer, tmp_path: Path
):
    address = server.put(DATA)
    server.break_after = 10_000
    calls = iter([None, *[httpx.ConnectError("refused")] * 2])

    def failure(request: httpx.Request) -> None:
        if error := next(calls, None):
            raise error

    server.failure = failure
    with pytest.raises(Unreachable):
        connection.fetch(address, tmp_path / "blob", len(DATA), never)
    assert (tmp_path / "blob.tmp").stat().st_size == 10_000
    assert connection.fetch(address, tmp_path / "blob", len(DATA), never)
    assert (tmp_path / "blob").read_bytes() == DATA


def test_a_download_is_limited(connection: Connection, server: FakeServer, tmp_path: Path):
    with pytest.raises(TooLarge):
        connection.fetch(server.put(DATA), tmp_path / "blob", len(DATA) - 1, never)
    assert not (tmp_path / "blob").exists()


def test_a_download_stops_when_asked(connection: Connection, server: FakeServer, tmp_path: Path):
    assert not connection.fetch(server.put(DATA), tmp_path / "blob", len(DATA), lambda: True)
    assert not (tmp_path / "blob").exists()


def test_a_disk_that_refuses_is_a_clear_failure(
    connection: Connection, server: FakeServer, tmp_path: Path
):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StorageFailure) as caught:
        connection.fetch(server.put(DATA), tmp_path / "file" / "blob", len(DATA), never)
    assert caught.value.hint


def test_stopping_interrupts_waiting(server: FakeServer):
    stop = Stop()
    connection = connect(server, stop)

    def stop_now(request: httpx.Request) -> None:
        stop.request()  # as a signal would, in the middle of a long poll

    server.failure = stop_now
    with pytest.raises(Stopped):
        connection.check_in(CHECK_IN)
    with pytest.raises(Stopped):
        connection.check_in(CHECK_IN)


@pytest.mark.parametrize("server", ["", "localhost:80", "ftp://x", "http://", "http://x/base"])
def test_an_address_that_is_none_is_refused(server: str):
    with pytest.raises(InvalidConfig) as caught:
        http_client(server)
    assert "http://" in caught.value.hint
