"""The eager strategy: the module's own autograd for one client after another, without the reference's flat vectors.

It can train whatever the reference can.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from homespun.plan.build.steps import weighted_sum
from homespun.simulation.cohort import reference
from homespun.simulation.cohort.gather import Step, Steps
from homespun.simulation.cohort.local import Local
from homespun.simulation.cohort.objective import Objective, Totals


class Eager:
    """Trains one client at a time; used as `Cohort` is."""

    chunk = 1

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._module = copy.deepcopy(objective.module).requires_grad_(True)
        self._leaves = list(self._module.parameters())
        for leaf in self._leaves:
            if leaf.dim() == 4 and not leaf.is_cuda:
                # Results then have channels last, too: with channels first, pooling on a CPU takes many times longer.
                leaf.data = leaf.data.contiguous(memory_format=torch.channels_last)
        # The same memory, outside of autograd: a client's steps and the next one's start change it in place.
        self._weights = [leaf.detach() for leaf in self._leaves]

    def run(
        self,
        steps: Steps,
        local: Local,
        totals: Totals,
        mean: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | None:
        """The client's update [1, d]; with `mean` [d] and `weights` [1], its weighted update is added to `mean`."""
        start = local.start.reshape(-1)
        torch._foreach_copy_(self._weights, self._split(start))
        drift = local.drift() if local.linear else None
        pieces = None if drift is None else self._split(drift.reshape(-1))
        velocity: Tensor | None = None
        for step in steps:
            gradients = self._gradients(step, totals)
            if local.linear:
                self._descend(gradients, local, pieces)
                continue
            gradient, current = _flat(gradients), _flat(self._weights)
            current, velocity = reference.stepped(gradient, current, velocity, local)
            torch._foreach_copy_(self._weights, self._split(current))
        if mean is None or weights is None:
            return (_flat(self._weights) - start)[None]
        moved = torch._foreach_sub(self._weights, self._split(start))
        torch._foreach_addcmul_(self._split(mean), moved, [weights] * len(moved))
        return None

    def _gradients(self, step: Step, totals: Totals) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            outputs = self._module(*self.objective.arguments(step.batch))
            for index, name in enumerate(totals.names):
                values = self.objective.functions[name](outputs, step.batch)
                total, count = weighted_sum(values, step.weight)
                totals.add(index, total, count)
                if name == "loss":
                    loss = total / count.clamp(min=1)
            return torch.autograd.grad(loss, self._leaves, materialize_grads=True)

    def _descend(
        self, gradients: tuple[Tensor, ...], local: Local, drift: list[Tensor] | None
    ) -> None:
        if local.shrink != 1:
            torch._foreach_mul_(self._weights, local.shrink)
        rate = local.optimizer.learning_rate * local.scale
        torch._foreach_add_(self._weights, gradients, alpha=-rate)
        if drift is not None:
            torch._foreach_add_(self._weights, drift)

    def _split(self, vector: Tensor) -> list[Tensor]:
        """[d] -> views of the shapes of the parameters."""
        return list(self.objective.named(vector).values())


def _flat(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
