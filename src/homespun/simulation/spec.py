"""What a trainer of shards is made from, here or in another process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from homespun.learning.method import method
from homespun.simulation.arena import Arena
from homespun.simulation.batches import Batches, batches
from homespun.simulation.clients import Clients
from homespun.simulation.cohort.engine import CohortEngine
from homespun.simulation.shards import Adding, ShardTrainer
from homespun.simulation.task import Task


@dataclass(frozen=True, kw_only=True)
class TrainerSpec:
    """`task`: the task, or a function that makes it; `method`, `settings`: by name."""

    task: Task | Callable[[], Task]
    arena: Arena
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    adding: Adding = field(default_factory=Adding)
    seed: int = 0
    strategy: str = "auto"
    chunk: int | None = None
    train_metrics: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def build(self) -> ShardTrainer:
        """Raises `InvalidConfig` for a method, strategy or task that does not exist."""
        task = self.task if isinstance(self.task, Task) else self.task()
        self.arena.read_here_and_there()
        return ShardTrainer(
            engine=self.engine(task, self.arena),
            method=method(self.method, self.settings),
            batches=partial(_batches, task, self.arena, self.seed),
            adding=self.adding,
        )

    def engine(self, task: Task, arena: Arena) -> CohortEngine:
        """An engine over `arena`: that of training, or that of an evaluation."""
        return CohortEngine(
            task,
            arena,
            device=self.device,
            dtype=self.dtype,
            strategy=self.strategy,
            chunk=self.chunk,
            train_metrics=self.train_metrics,
        )


def _batches(task: Task, arena: Arena, seed: int, number: int, clients: Clients) -> Batches:
    return batches(
        arena.offsets,
        clients,
        batch_size=task.batch_size,
        local_epochs=task.local_epochs,
        max_rows=task.max_rows,
        seed=seed,
        round_number=number,
    )
