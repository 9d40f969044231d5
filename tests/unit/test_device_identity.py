"""The device's key."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from homespun.device.identity import Identity
from homespun.errors import StorageFailure
from homespun.protocol.signing import device_id, verify


def test_a_key_is_made_once_and_kept_private(tmp_path: Path):
    path = tmp_path / "identity.key"
    first, again = Identity.load_or_create(path), Identity.load_or_create(path)
    assert first.device_id == again.device_id == device_id(first.public_key)
    assert path.stat().st_mode & 0o777 == 0o600
    signature = base64.b64encode(again.sign(b"data")).decode()
    verify(first.public_key, signature, b"data")


def test_keys_differ_unless_a_seed_says_otherwise(tmp_path: Path):
    seeds = (None, None, 1, 1, 2)
    ids = [
        Identity.load_or_create(tmp_path / str(number), seed).device_id
        for number, seed in enumerate(seeds)
    ]
    assert ids[2] == ids[3]
    assert len(set(ids)) == 4


def test_a_seed_does_not_replace_a_key(tmp_path: Path):
    path = tmp_path / "identity.key"
    assert Identity.load_or_create(path).device_id == Identity.load_or_create(path, 1).device_id


@pytest.mark.parametrize("content", [None, b"", b"x" * 31])
def test_a_missing_or_damaged_key_is_a_clear_failure(content: bytes | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "identity.key").write_bytes(content)
    with pytest.raises(StorageFailure, match=r"identity\.key"):
        Identity.load(tmp_path / "identity.key")
