"""Starting: what stands in the way is one clear error, and nothing is left half-made."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from homespun.clock import ManualClock
from homespun.errors import InvalidConfig, StorageFailure
from homespun.server.app import _listen, create_app, serve
from homespun.server.deployment import lock_directory
from homespun.server.settings import Settings


def test_a_port_in_use(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfig, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            serve(Settings(data_dir=tmp_path, port=port))
    assert "--port" in caught.value.hint
    assert not (tmp_path / "server.json").exists()
    assert not (tmp_path / "homespun.db").exists()


def test_an_address_that_is_not_ours(tmp_path: Path):
    with pytest.raises(InvalidConfig, match="cannot listen"):
        serve(Settings(data_dir=tmp_path, host="192.0.2.1", port=0))


def test_a_data_directory_that_cannot_be_one(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidConfig, match="cannot be written"):
        serve(Settings(data_dir=file / "data", port=0))


def test_one_server_per_data_directory(tmp_path: Path):
    lock_directory(tmp_path)
    with pytest.raises(InvalidConfig, match="another server"):
        serve(Settings(data_dir=tmp_path, port=0))


def test_a_damaged_database_is_named(tmp_path: Path):
    (tmp_path / "homespun.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(StorageFailure, match="database"):
        create_app(Settings(data_dir=tmp_path), ManualClock())


def test_answers_do_not_wait_for_acknowledgements():
    """asyncio turns Nagle's algorithm off only for sockets that say that they are TCP."""
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
