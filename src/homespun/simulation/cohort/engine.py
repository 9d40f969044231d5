"""The cohort engine: a chunk of clients trains as one program, whichever strategy does it fastest.

CohortEngine -> choices (measured once) -> Rows (data) -> a strategy: reference | eager | cohort -> update
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from homespun.errors import InvalidConfig
from homespun.learning.method import LocalResult, LocalRule
from homespun.learning.metrics import MetricSum
from homespun.simulation.arena import Arena
from homespun.simulation.batches import Batches
from homespun.simulation.cohort import evaluation, reference, tuning
from homespun.simulation.cohort.cohort import factorable
from homespun.simulation.cohort.gather import Rows, spans
from homespun.simulation.cohort.local import Local, resolve
from homespun.simulation.cohort.objective import Objective, Totals
from homespun.simulation.cohort.results import Choice, Partial
from homespun.simulation.task import Task

STRATEGIES = ("auto", "reference", "eager", "sequential", "compiled", "stacked", "factored")


class CohortEngine:
    """Trains a task's clients on one device; see `results.Engine`.

    `strategy`: "auto" measures which is fastest, the others are forced; `chunk`: clients that train together. What
    the first training finds is kept in `choices`, and nothing is measured where these are given.
    `train_metrics`: measure the author's metrics before each step too, not only the loss.
    """

    def __init__(
        self,
        task: Task,
        arena: Arena,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        strategy: str = "auto",
        chunk: int | None = None,
        train_metrics: bool = False,
    ) -> None:
        """Raises `InvalidConfig` for an unknown strategy or a chunk that is not positive."""
        if strategy not in STRATEGIES:
            raise InvalidConfig(
                f"unknown strategy {strategy!r}", hint=f"one of: {', '.join(STRATEGIES)}"
            )
        if chunk is not None and chunk < 1:
            raise InvalidConfig("chunk must be at least 1", got=chunk)
        self.task, self.arena = task, arena
        self.device, self.dtype = torch.device(device), dtype
        self.objective = Objective(task, self.device, dtype)
        self.rows = Rows(arena, task.scales, self.device, dtype)
        self.strategy, self.chunk, self.train_metrics = strategy, chunk, train_metrics
        self.choices: tuple[Choice, ...] = ()
        self._built: dict[Choice, tuning.Strategy] = {}

    def initial(self) -> Tensor:
        """[d]: the parameters of the task's module, in the order of its `named_parameters`."""
        parts = [
            parameter.detach().reshape(-1) for _, parameter in self.task.model.named_parameters()
        ]
        return torch.cat(parts).to(self.device, self.dtype)

    def mean_path(
        self, model: Tensor, batches: Batches, weights: Tensor, rule: LocalRule
    ) -> Partial:
        """See `results.Engine`."""
        model = self._vector(model)
        local, _, _ = self._local(model, batches, rule)
        totals = self._totals()
        weights = torch.as_tensor(weights).to(self.device, self.dtype)
        update = self._train(batches, local, totals, weights)
        return Partial({"update": update}, {}, totals.read())

    def train(
        self, model: Tensor, batches: Batches, rule: LocalRule
    ) -> tuple[LocalResult, dict[str, MetricSum]]:
        """See `results.Engine`."""
        model = self._vector(model)
        local, losses, choice = self._local(model, batches, rule)
        totals = self._totals()
        gradient = None
        if rule.wants_gradient:
            epoch = self.rows.steps(self._first_epoch(batches))
            gradient = reference.gradients(self.objective, epoch, local.start)
        update = self._train(batches, local, totals, None)
        result = LocalResult(
            update=update,
            num_examples=torch.from_numpy(batches.num_examples).to(self.device, self.dtype),
            num_steps=torch.from_numpy(batches.num_steps).to(self.device, self.dtype),
            learning_rate=self.task.optimizer.learning_rate,
            losses=losses,
            choice=choice,
            gradient=gradient,
        )
        return result, totals.read()

    def evaluate(
        self, parameters: Tensor, clients: npt.NDArray[np.int64] | None = None
    ) -> dict[str, MetricSum]:
        """Loss and metrics over all rows of these clients (None: of all), with the model [d] or each with its own
        parameters [m, d]."""
        sums = self.evaluate_each(parameters, clients)
        return {name: MetricSum(*each.sum(0).tolist()) for name, each in sums.items()}

    def evaluate_each(
        self, parameters: Tensor, clients: npt.NDArray[np.int64] | None = None
    ) -> dict[str, Tensor]:
        """Name -> [m, 2], float64: every client's sum and count of the loss and each metric."""
        everyone = np.arange(self.arena.num_clients) if clients is None else np.asarray(clients)
        parameters = self._vector(parameters)
        return evaluation.measure(self.objective, self.arena, self.rows, parameters, everyone)

    def _train(
        self, batches: Batches, local: Local, totals: Totals, weights: Tensor | None
    ) -> Tensor:
        """Updates [m, d]; with weights [m]: their weighted sum [d]."""
        mean = None if weights is None else torch.zeros_like(local.model)
        parts = [local.model.new_zeros(0, self.objective.dimension)]
        clients = len(batches.clients)
        if clients:
            strategy = self._strategy(batches, local, totals)
            for first, last in spans(clients, strategy.chunk):
                steps, mine = self.rows.steps(batches, first, last), local.part(first, last)
                share = None if weights is None else weights[first:last]
                update = strategy.run(steps, mine, totals, mean, share)
                if update is not None:
                    parts.append(update)
        return torch.cat(parts) if mean is None else mean

    def _strategy(self, batches: Batches, local: Local, totals: Totals) -> tuning.Strategy:
        """Raises `InvalidConfig` if a strategy is forced that this model or rule cannot be trained with."""
        if not self.choices:
            self.choices = tuning.Tuning(
                self.task, self.arena, self.objective, self.rows, batches, local, totals.names
            ).choices(self.strategy, self.chunk)
        usable = (choice for choice in self.choices if not choice.factored or factorable(local))
        choice = next(usable, None)
        if choice is None:
            raise InvalidConfig(
                f"the strategy {self.strategy!r} cannot train this model with this method",
                hint="leave strategy at auto",
            )
        if choice not in self._built:
            self._built[choice] = tuning.build(self.objective, choice)
        return self._built[choice]

    def _local(
        self, model: Tensor, batches: Batches, rule: LocalRule
    ) -> tuple[Local, Tensor | None, Tensor | None]:
        """The rule for this chunk; if there are candidates, their losses [m, k] and each client's choice [m]."""
        clients = len(batches.clients)
        if rule.candidates is None:
            return resolve(rule, self.task.optimizer, model, clients), None, None
        candidates = self._vector(torch.as_tensor(rule.candidates))
        losses = torch.stack([self._losses(candidate, batches) for candidate in candidates], 1)
        choice = losses.argmin(1)
        rule = replace(rule, start=candidates[choice], candidates=None)
        return resolve(rule, self.task.optimizer, model, clients), losses, choice

    def _losses(self, parameters: Tensor, batches: Batches) -> Tensor:
        """[m]: mean loss of each client's rows of the round."""
        epoch = self.rows.steps(self._first_epoch(batches))
        return reference.losses(self.objective, epoch, parameters)

    def _first_epoch(self, batches: Batches) -> Batches:
        """Every row of the round once."""
        per_epoch = batches.num_steps // self.task.local_epochs
        steps = int(per_epoch.max(initial=0))
        inside = np.arange(steps)[:, None] < per_epoch
        return replace(
            batches,
            rows=batches.rows[:steps],
            present=batches.present[:steps] & inside[:, :, None],
            active=inside.sum(1),
            num_steps=per_epoch,
        )

    def _totals(self) -> Totals:
        return Totals(self.objective.names(self.train_metrics))

    def _vector(self, tensor: Any) -> Tensor:
        """Raises `InvalidConfig` if it is not as long as the model."""
        vector = torch.as_tensor(tensor).detach().to(self.device, self.dtype)
        if vector.shape[-1] != self.objective.dimension:
            raise InvalidConfig(
                "these parameters are not this model's",
                expected=self.objective.dimension,
                got=vector.shape[-1],
            )
        return vector
