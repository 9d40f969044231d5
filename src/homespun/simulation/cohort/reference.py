"""The sequential reference: one client after another, any module, nothing clever.

It is what every other strategy is held equal to, and what does the work where no other strategy can. A step is that
of the plan's train graph (`homespun.plan.build.steps`), with the rule's terms before it: see `Local`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from homespun.plan.build.steps import weighted_sum
from homespun.simulation.cohort.gather import Step, Steps
from homespun.simulation.cohort.local import Local
from homespun.simulation.cohort.objective import Objective, Totals, client_sums


class Reference:
    """Trains chunks of clients; used as `Cohort` is."""

    def __init__(self, objective: Objective, chunk: int) -> None:
        self.objective, self.chunk = objective, chunk

    def run(
        self,
        steps: Steps,
        local: Local,
        totals: Totals,
        mean: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | None:
        """The clients' updates [m, d]; with `mean` [d] and `weights` [m], their weighted sum is added to `mean`."""
        update = updates(self.objective, steps, local, totals)
        if mean is None or weights is None:
            return update
        mean += weights @ update
        return None


def updates(objective: Objective, steps: Steps, local: Local, totals: Totals) -> Tensor:
    """[m, d]: what each client's steps changed."""
    # Lockstep order serves the other strategies; here the clients only have to be told apart.
    current = list(local.start.expand(steps.num_clients, -1).clone())
    velocity: list[Tensor | None] = [None] * len(current)
    for step in steps:
        for client, (batch, weight) in enumerate(_clients(step)):
            gradient = _gradient(objective, current[client], batch, weight, totals)
            current[client], velocity[client] = stepped(
                gradient, current[client], velocity[client], local.part(client, client + 1)
            )
    return torch.stack(current) - local.start


def stepped(
    gradient: Tensor, current: Tensor, velocity: Tensor | None, local: Local
) -> tuple[Tensor, Tensor | None]:
    """Parameters [d] and velocity after one step of one client; see `Local` for its terms."""
    optimizer = local.optimizer
    gradient = local.scale * gradient
    if local.correction is not None:
        gradient = gradient + local.correction.view(-1)
    if local.proximal:
        gradient = gradient + local.proximal * (current - local.anchor.view(-1))
    if optimizer.proximal:
        gradient = gradient + optimizer.proximal * (current - local.model)
    if optimizer.max_grad_norm:
        norm = gradient.square().sum().sqrt()
        gradient = gradient * (optimizer.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    if optimizer.weight_decay:
        gradient = gradient + optimizer.weight_decay * current
    if optimizer.momentum:
        if velocity is not None:
            gradient = gradient + optimizer.momentum * velocity
        velocity = gradient
    return current - optimizer.learning_rate * gradient, velocity


def gradients(objective: Objective, steps: Steps, start: Tensor) -> Tensor:
    """[m, d]: the gradient of each client's mean loss over all its rows at `start`, [d] or [m, d]."""
    points = start.expand(steps.num_clients, -1)
    sums = torch.zeros_like(points)
    counts = points.new_zeros(len(points))
    for step in steps:
        for client, (batch, weight) in enumerate(_clients(step)):
            with torch.enable_grad():
                point = points[client].detach().requires_grad_()
                outputs = objective.forward(objective.named(point), batch)
                total, count = weighted_sum(objective.task.loss(outputs, batch), weight)
                (gradient,) = torch.autograd.grad(total, point)
            sums[client] += gradient
            counts[client] += count
    return sums / counts.clamp(min=1)[:, None]


def _gradient(
    objective: Objective, point: Tensor, batch: Mapping[str, Tensor], weight: Tensor, totals: Totals
) -> Tensor:
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        outputs = objective.forward(objective.named(point), batch)
        for index, name in enumerate(totals.names):
            total, count = weighted_sum(objective.functions[name](outputs, batch), weight)
            totals.add(index, total, count)
            if name == "loss":
                loss = total / count.clamp(min=1)
        (gradient,) = torch.autograd.grad(loss, point)
    return gradient


def _clients(step: Step) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    size = len(step.weight) // step.active
    for begin in range(0, len(step.weight), size):
        rows = slice(begin, begin + size)
        yield {name: tensor[rows] for name, tensor in step.batch.items()}, step.weight[rows]


def losses(objective: Objective, steps: Steps, point: Tensor) -> Tensor:
    """[m]: mean loss of each client's rows with the same parameters [d]."""
    sums = point.new_zeros(steps.num_clients, 2)
    named = objective.named(point)
    with torch.inference_mode():
        for step in steps:
            outputs = objective.forward(named, step.batch)
            values = objective.task.loss(outputs, step.batch)
            sums[: step.active] += torch.stack(client_sums(values, step.weight, step.active), 1)
    return sums[:, 0] / sums[:, 1].clamp(min=1)
