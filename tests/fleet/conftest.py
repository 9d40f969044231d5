"""Worlds that are stopped when their test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.world import World


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(num_devices: int = 4, **settings: Any) -> World:
        worlds.append(World(tmp_path / f"server-{len(worlds)}", num_devices, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.stop()
