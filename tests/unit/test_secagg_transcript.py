"""The bytes that everybody must agree on."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from homespun.errors import BadRoster, WrongSurvivors
from homespun.secagg.graph import Adversary, Shape
from homespun.secagg.transcript import (
    bitmap,
    check_proof,
    commitment,
    fields,
    members,
    merkle_proof,
    merkle_tree,
    transcript_hash,
)
from tests.vectors.secagg import make_terms

SHAPE = Shape(10, 9, 7, 3)
ROOT = bytes(range(32))


def test_fields_by_hand():
    assert fields("ab", b"\xff", "é", 1, 0.5) == (
        b"\2\0\0\0ab" + b"\1\0\0\0\xff" + b"\2\0\0\0\xc3\xa9"
        b"\x08\0\0\0\0\0\0\0\0\0\xf0\x3f" + b"\x08\0\0\0\0\0\0\0\0\0\xe0\x3f"
    )


def test_no_two_lists_are_the_same_bytes():
    lists: list[tuple[Any, ...]] = [
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        ("a", "b", "c"),
        ("", "abc"),
    ]
    assert len({fields("label", *values) for values in lists}) == len(lists)


def test_whole_numbers_are_the_same_whatever_they_are_called():
    assert fields("x", 8) == fields("x", 8.0)


CHANGED = {
    "suite": "another",
    "task": "other",
    "round_number": 8,
    "attempt": 2,
    "checkpoint_hash": "d" * 64,
    "plan_hash": "d" * 64,
    "bits": 12,
    "dimension": 6,
    "num_aux": 3,
    "schema": "other",
    "clip": 4.0,
    "n_min": 4,
    "n_max": 99,
    "corrupt_fraction": 0.2,
    "drop_out_fraction": 0.1,
    "adversary": Adversary.SEMI_HONEST,
    "max_staleness": 1,
}


def test_the_transcript_binds_every_term():
    terms = make_terms()
    assert {"version", *CHANGED} == set(terms.__struct_fields__)
    hashes = {transcript_hash(terms, SHAPE, ROOT)}
    hashes |= {
        transcript_hash(msgspec.structs.replace(terms, **{name: value}), SHAPE, ROOT)
        for name, value in CHANGED.items()
    }
    hashes |= {
        transcript_hash(terms, shape, ROOT)
        for shape in (Shape(11, 9, 7, 3), Shape(10, 8, 7, 3), Shape(10, 9, 6, 3))
    }
    hashes.add(transcript_hash(terms, SHAPE, bytes(32)))
    assert len(hashes) == 1 + len(CHANGED) + 4


def test_a_commitment_binds_its_owner_and_group():
    values = {commitment(t, i, s) for t in (ROOT, b"x") for i in (0, 1) for s in (b"s", b"t")}
    assert len(values) == 8


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 4, 5, 6, 7, 8, 13, 100])
def test_every_leaf_has_a_proof_and_only_its_own(num_leaves):
    leaves = [hashlib.sha256(bytes([i])).digest() for i in range(num_leaves)]
    tree = merkle_tree(leaves)
    root = tree[-1][0]
    for index, node in enumerate(leaves):
        proof = merkle_proof(tree, index)
        check_proof(root, num_leaves, index, node, proof)
        with pytest.raises(BadRoster):
            check_proof(root, num_leaves, index, hashlib.sha256(b"forged").digest(), proof)
        with pytest.raises(BadRoster):
            check_proof(root, num_leaves, index, node, (*proof, root))
        if num_leaves > 1:
            with pytest.raises(BadRoster):
                check_proof(root, num_leaves, index ^ 1, node, proof)
            with pytest.raises(BadRoster):
                check_proof(root, num_leaves, index, node, proof[:-1])


def test_a_tree_by_hand():
    def sha(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    a, b, c = (sha(bytes([i])) for i in range(3))
    tree = merkle_tree([a, b, c])
    assert tree == [[a, b, c], [sha(b"\1" + a + b), c], [sha(b"\1" + sha(b"\1" + a + b) + c)]]
    assert merkle_proof(tree, 2) == (tree[1][0],)


def test_bitmaps_by_hand():
    assert bitmap({0, 3, 8}, 10) == b"\x09\x01"
    assert members(b"\x09\x01", 10) == {0, 3, 8}
    assert bitmap([], 3) == b"\0"


@pytest.mark.parametrize("bits", [b"", b"\0", b"\0\4", b"\0\0\0"])
def test_bitmaps_that_do_not_fit(bits):
    with pytest.raises(WrongSurvivors):
        members(bits, 10)
