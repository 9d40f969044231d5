"""Worlds that are stopped when their test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from homespun.protocol.messages import Aggregation
from tests.fleet.world import World, scratch


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    with scratch() as directory:

        def make(num_devices: int = 4, **settings: Any) -> World:
            root = Path(directory) / f"server-{len(worlds)}"
            worlds.append(World(root, num_devices, **settings))
            return worlds[-1]

        yield make
        for world in worlds:
            world.stop()


@pytest.fixture(params=list(Aggregation))
def aggregation(request: pytest.FixtureRequest) -> Aggregation:
    """For tests of rounds in general: as plain sums, and with secure aggregation."""
    return Aggregation(request.param)
