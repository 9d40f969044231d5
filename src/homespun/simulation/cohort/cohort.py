"""The cohort strategy: the author's unchanged module runs once per lockstep step, for all clients of a chunk.

A chunk of one client is the fused sequential step; a chunk of many uses batched products (`Dense`) or, for chosen
parameters under plain SGD, products with the shared model (`Factored`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from homespun.simulation.cohort.gather import Step
from homespun.simulation.cohort.local import Local
from homespun.simulation.cohort.objective import Objective, Totals, client_sums
from homespun.simulation.cohort.parameter import CohortParameter, Unsupported
from homespun.simulation.cohort.slots import Dense, Factored


class Cohort:
    """Trains chunks of at most `chunk` clients. `factored`: names of parameters kept as `Factored`."""

    def __init__(self, objective: Objective, chunk: int, factored: frozenset[str]) -> None:
        self.objective, self.chunk, self.factored = objective, chunk, factored
        self._module = copy.deepcopy(objective.module)
        self._like = next(self._module.parameters()).detach()
        self._token = self._like.new_zeros((), requires_grad=True)
        self._slices = objective.layout.slices
        self._slots: dict[str, Dense | Factored] = {}
        self._build(chunk)

    @torch.no_grad()
    def run(
        self,
        steps: Iterator[Step],
        local: Local,
        clients: int,
        totals: Totals,
        mean: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | None:
        """The clients' updates [m, d]; with `mean` [d] and `weights` [m], their weighted sum is added to `mean`.

        Raises `Unsupported` where the model does what this strategy cannot.
        """
        if self.factored and not factorable(local):
            raise Unsupported("factored parameters need plain steps from the model")
        if clients != self._clients:
            self._build(clients)
        parts = {name: local.start[..., bounds] for name, bounds in self._slices.items()}
        for name, slot in self._slots.items():
            slot.begin(parts[name])
        drift = self._drift(local)
        active = clients
        for step in steps:
            if step.active != active:
                active = step.active
                for slot in self._slots.values():
                    slot.active = active
            with torch.enable_grad():
                self._backward(step, totals)
            self._descend(local, drift)
        if mean is None or weights is None:
            return torch.cat([s.updates(parts[n]) for n, s in self._slots.items()], 1)
        for name, slot in self._slots.items():
            slot.add_mean(mean[self._slices[name]], parts[name], weights)
        return None

    def _backward(self, step: Step, totals: Totals) -> None:
        outputs = self._module(*self.objective.arguments(step.batch))
        for index, name in enumerate(totals.names):
            values = self.objective.functions[name](outputs, step.batch)
            total, count = client_sums(values, step.weight, step.active)
            totals.add(index, total, count)
            if name == "loss":
                loss = (total / count.clamp(min=1)).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    def _descend(self, local: Local, drift: dict[str, Tensor] | None) -> None:
        optimizer = local.optimizer
        if not local.linear:
            self._descend_with_memory(local)
            return
        rate, pull, shrink = optimizer.learning_rate, local.pull, local.shrink
        for name, slot in self._slots.items():
            if isinstance(slot, Factored):
                slot.descend(rate * local.scale, shrink, rate * pull)
            else:
                slot.descend(rate * local.scale, shrink, None if drift is None else drift[name])

    def _drift(self, local: Local) -> dict[str, Tensor] | None:
        """What a step adds besides the gradient and a multiple of the parameters, if anything."""
        drift = local.drift()
        return (
            drift
            if drift is None
            else {name: drift[..., bounds] for name, bounds in self._slices.items()}
        )

    def _descend_with_memory(self, local: Local) -> None:
        """Momentum and clipping need whole gradients; see `Local` for the terms and their order."""
        optimizer = local.optimizer
        slots: list[tuple[slice, Dense]] = [
            (self._slices[n], s) for n, s in self._slots.items() if isinstance(s, Dense)
        ]
        gradients = []
        for bounds, slot in slots:
            here = slot.stack[: slot.active].reshape(slot.active, -1)
            gradient = slot.gradient().reshape(slot.active, -1).mul_(local.scale)
            if local.correction is not None:
                gradient += local.correction[..., bounds].reshape(-1, here.shape[1])[: slot.active]
            if local.proximal:
                anchor = local.anchor[..., bounds].reshape(-1, here.shape[1])[: slot.active]
                gradient += local.proximal * (here - anchor)
            if optimizer.proximal:
                gradient += optimizer.proximal * (here - local.model[bounds])
            gradients.append(gradient)
        if optimizer.max_grad_norm:
            squares = torch.stack([gradient.square().sum(1) for gradient in gradients])
            factor = (optimizer.max_grad_norm / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1)
            gradients = [gradient * factor[:, None] for gradient in gradients]
        for (_, slot), gradient in zip(slots, gradients, strict=True):
            if optimizer.weight_decay:
                gradient += optimizer.weight_decay * slot.stack[: slot.active].reshape_as(gradient)
            if optimizer.momentum:
                if slot.velocity is not None:
                    gradient += optimizer.momentum * slot.velocity[: slot.active]
                slot.velocity = gradient
            shaped = gradient.view(slot.active, *slot.shape)
            slot.stack[: slot.active].sub_(shaped, alpha=optimizer.learning_rate)

    def _build(self, clients: int) -> None:
        """Slots for that many clients, in the module's places for parameters."""
        self._clients = clients
        for name, shape in self.objective.shapes.items():
            form = Factored if name in self.factored else Dense
            self._slots[name] = form(shape, clients, self._like)
        parameters = {
            name: CohortParameter.of(slot, self._token) for name, slot in self._slots.items()
        }
        if not hasattr(self, "_places"):
            self._places = _places(self._module)
        for name, places in self._places.items():
            for module, attribute in places:
                module._parameters[attribute] = parameters[name]  # type: ignore[assignment]
        for module in self._module.modules():
            if isinstance(module, nn.RNNBase):  # it keeps a second list of its parameters
                module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]


def factorable(local: Local) -> bool:
    """Every client's parameters stay the model's plus products: no memory, no vector but the model's own."""
    plain = local.start is local.model and local.anchor is local.model
    return local.linear and plain and local.correction is None


def _places(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each parameter hangs: a tied one in several places."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for attribute, parameter in part._parameters.items():
            if parameter is not None:
                places.setdefault(names[id(parameter)], []).append((part, attribute))
    return places
