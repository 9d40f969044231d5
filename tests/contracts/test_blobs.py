"""What every blob store must do, run against each of them."""

from __future__ import annotations

import errno
import os

import pytest

from homespun.errors import NotFound, StorageFailure, TooLarge
from homespun.server.blobs import LocalBlobs
from homespun.tensors.codec import digest

LIMIT = 1000


@pytest.fixture(params=["local"])
def blobs(request, tmp_path):
    return LocalBlobs(tmp_path / "blobs", LIMIT)


def test_what_was_put_can_be_read_back(blobs):
    address = blobs.put(b"hello ", bytearray(b"wor"), memoryview(b"ld"))
    assert address == digest(b"hello world")
    assert blobs.get(address) == b"hello world"
    assert blobs.size(address) == 11
    assert blobs.read(address, 6, 3) == b"wor"
    assert blobs.read(address, 9, 100) == b"ld"


def test_the_same_bytes_are_one_blob(blobs):
    assert blobs.put(b"a") == blobs.put(b"a")
    assert list(blobs.addresses()) == [digest(b"a")]


def test_an_empty_blob(blobs):
    assert blobs.get(blobs.put()) == b""


def test_what_is_read_can_be_changed_without_changing_the_blob(blobs):
    address = blobs.put(b"abc")
    blobs.get(address)[0] = 0
    assert blobs.get(address) == b"abc"


def test_absent_and_malformed_addresses(blobs):
    for address in ("0" * 64, "../../etc/passwd", "", "A" * 64):
        for look in (blobs.get, blobs.size, lambda a: blobs.read(a, 0, 1)):
            with pytest.raises(NotFound):
                look(address)


def test_a_blob_beyond_the_limit(blobs):
    blobs.put(bytes(LIMIT))
    with pytest.raises(TooLarge):
        blobs.put(bytes(LIMIT), b"x")
    assert len(list(blobs.addresses())) == 1


def test_deleting(blobs):
    address = blobs.put(b"a")
    blobs.delete(address)
    blobs.delete(address)
    with pytest.raises(NotFound):
        blobs.get(address)


def test_scopes_do_not_share(blobs):
    one, two = blobs.scope("one"), blobs.scope("two")
    address = one.put(b"a")
    assert two.put(b"a") == blobs.put(b"a") == address
    assert sorted(blobs.scopes()) == ["one", "two"]
    one.clear()
    one.clear()
    with pytest.raises(NotFound):
        one.get(address)
    assert two.get(address) == blobs.get(address) == b"a"
    assert list(blobs.scopes()) == ["two"]


# --- of files only ---------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path):
    return LocalBlobs(tmp_path / "blobs", LIMIT)


def test_damage_is_noticed(local, tmp_path):
    address = local.put(b"abc")
    (tmp_path / "blobs" / address).write_bytes(b"abd")
    with pytest.raises(StorageFailure, match="damaged"):
        local.get(address)


def test_a_blob_of_the_wrong_size_is_written_again(local, tmp_path):
    address = local.put(b"abc")
    (tmp_path / "blobs" / address).write_bytes(b"ab")
    assert local.get(local.put(b"abc")) == b"abc"


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_nothing_half_written(local, tmp_path, monkeypatch, call):
    local.put(b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageFailure, match="No space left") as caught:
        local.put(b"abc")
    monkeypatch.undo()
    assert "free some disk space" in caught.value.hint
    assert [file.name for file in (tmp_path / "blobs").iterdir()] == [digest(b"before")]


def test_leftovers_of_a_crash_are_swept(local, tmp_path):
    address = local.scope("round-1").put(b"abc")
    leftover = tmp_path / "blobs" / "round-1" / f"{address}.00.part"
    leftover.write_bytes(b"ab")
    local.sweep()
    assert not leftover.exists()
    assert local.scope("round-1").get(address) == b"abc"
