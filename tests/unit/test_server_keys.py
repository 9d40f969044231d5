"""Keys: made once, kept, readable by their owner only, refused when damaged."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from homespun.errors import StorageFailure
from homespun.protocol import signing
from homespun.protocol.messages import ReleaseManifest, decode
from homespun.server.keys import load_keys


def test_keys_are_made_once(tmp_path: Path):
    first, second = load_keys(tmp_path), load_keys(tmp_path)
    assert first.operator_token == second.operator_token
    assert first.publisher_public == second.publisher_public
    assert sorted(file.name for file in tmp_path.iterdir()) == ["operator.token", "publisher.key"]
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_whoever_makes_them_first_wins(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        tokens = {keys.operator_token for keys in pool.map(load_keys, [tmp_path] * 16)}
    assert len(tokens) == 1


@pytest.mark.parametrize("content", ["", "zz", "abcd"])
def test_a_damaged_key_is_refused(tmp_path: Path, content: str):
    load_keys(tmp_path)
    (tmp_path / "publisher.key").write_text(content)
    with pytest.raises(StorageFailure, match=r"publisher\.key"):
        load_keys(tmp_path)


def test_a_release_is_signed_over_its_exact_bytes(tmp_path: Path):
    keys = load_keys(tmp_path)
    manifest = ReleaseManifest(
        population="p",
        slot="s",
        sequence=1,
        version="1",
        plan_hash="0" * 64,
        checkpoint="1" * 64,
        issued_at=5.0,
    )
    signed = keys.sign_release(manifest)
    data = base64.b64decode(signed.manifest)
    found: ReleaseManifest = decode(data, ReleaseManifest)
    assert found == manifest
    signing.verify(keys.publisher_public, signed.signature, signing.RELEASE_CONTEXT + data)
