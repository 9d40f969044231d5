"""A trainer for tests of workers, in a module where they find it: some clients kill its process, one is refused."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from homespun.errors import NumericFailure
from homespun.simulation.arena import Arena
from homespun.simulation.shards import Order, Shard, ShardSum

ROWS = 200_000
KILLS_TWICE, KILLS, FAILS = 2, 66, 99


@dataclass
class Odd:
    """A trainer that is killed by some clients; how often is counted by files, which outlive it."""

    marks: str
    arena: Arena

    def build(self):
        return self

    def close(self):
        pass

    def run(self, order, shards):
        (shard,) = shards
        client = int(shard.clients[0])
        for number in range({KILLS_TWICE: 2, KILLS: 100}.get(client, 0)):
            try:
                os.close(os.open(f"{self.marks}/{client}-{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        if client == FAILS:
            raise NumericFailure("shard 99", hint="as it should be", round=order.number)
        vector = order.model.numpy() * client + order.server["v"].numpy()
        mapped = {name: float(mapped_from_file(a)) for name, a in self.arena.inputs.items()}
        mapped["sum"] = float(sum(a[-1].sum() for a in self.arena.inputs.values()))
        return [
            ShardSum(vectors={"update": vector}, numbers=mapped, num_clients=len(shard.clients))
        ]


def mapped_from_file(array):
    """Whether the array's memory is that of a mapped file, by the kernel's own list."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(edge, 16) for edge in line.split()[0].split("-"))
        if begin <= address < end:
            return "/" in line
    return False


def half_mapped(folder):
    """An arena of which one input is a file, and the other in memory."""
    on_disk = Arena({"a": np.arange(ROWS)}, np.array([0, ROWS]))
    on_disk.save(folder)
    inputs = {"a": Arena.open(folder).inputs["a"], "b": np.arange(ROWS) * 3}
    return Arena(inputs, on_disk.offsets)


def order(number):
    return Order(number, 0, torch.arange(3.0) + number, {"v": torch.ones(3)})


def shards(*clients):
    return [Shard(np.array([client])) for client in clients]
