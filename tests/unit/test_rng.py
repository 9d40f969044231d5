"""Named streams: the name selects the numbers, nothing else does."""

from __future__ import annotations

import hashlib

from homespun import rng


def test_a_seed_is_the_first_53_bits_of_a_hash():
    whole = int(hashlib.sha256(b"7/round/3").hexdigest(), 16)
    assert rng.derive_seed(7, "round", 3) == whole >> (256 - 53)


def test_streams_do_not_depend_on_what_was_drawn_before():
    first = rng.stream(1, "a").random(3).tolist()
    rng.stream(1, "b").random(1000)
    assert rng.stream(1, "a").random(3).tolist() == first


def test_names_and_seeds_separate_streams():
    drawn = {
        rng.stream(seed, *path).random()
        for seed in (0, 1, 10)
        for path in ((), ("a",), ("b",), ("a", 1), ("a", 10), (1, "a"))
    }
    assert len(drawn) == 18


def test_unit_interval_is_a_point_below_one():
    points = [rng.unit_interval("salt", index) for index in range(2000)]
    assert all(0.0 <= point < 1.0 for point in points)
    assert abs(sum(points) / 2000 - 0.5) < 4 * (1 / 12 / 2000) ** 0.5


def test_unit_interval_of_the_largest_hash_is_below_one(monkeypatch):
    class Ones:
        def digest(self) -> bytes:
            return b"\xff" * 32

    monkeypatch.setattr(hashlib, "sha256", lambda _: Ones())
    assert rng.unit_interval("any") == 1 - 2.0**-53
