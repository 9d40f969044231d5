"""The cohort strategy: the author's unchanged module runs once per lockstep step, for all clients of a chunk.

A chunk of one client is the fused sequential step; a chunk of many uses batched products (`Dense`) or, for chosen
parameters under plain SGD, products with the shared model (`Factored`). A step is recorded, if it can be, as a
`Program`, so that its cost in Python is that of its tensor operations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from homespun.simulation.cohort.gather import Block, Step, Steps
from homespun.simulation.cohort.local import Local
from homespun.simulation.cohort.objective import Objective, Totals, client_sums
from homespun.simulation.cohort.parameter import CohortParameter, Unsupported
from homespun.simulation.cohort.program import MANY, Function, Program, record
from homespun.simulation.cohort.slots import Dense, Factored

SHARED_BYTES = 64 * 2**20
"""What a program shares is computed for all steps of a block at once if it is no larger."""
RECORDED_BYTES = 2**28
"""Larger parameters are not copied for a recording: what Python costs is nothing beside their arithmetic."""
Slots = dict[str, Dense | Factored]


class Cohort:
    """Trains chunks of at most `chunk` clients. `factored`: names of parameters kept as `Factored`."""

    def __init__(
        self, objective: Objective, chunk: int, factored: frozenset[str] = frozenset()
    ) -> None:
        self.objective, self.chunk, self.factored = objective, chunk, factored
        self._module = copy.deepcopy(objective.module)
        self._like = next(self._module.parameters()).detach()
        self._token = self._like.new_zeros((), requires_grad=True)
        self._slices = objective.layout.slices
        self._one = self._like.new_ones(())
        self._places = _places(self._module)
        self._programs: dict[Any, _Recorded | None] = objective.programs
        self._shared: tuple[Block, list[tuple[Tensor, ...]]] | None = None
        self._clients, self._slots = 0, Slots()

    @torch.no_grad()
    def run(
        self,
        steps: Steps,
        local: Local,
        totals: Totals,
        mean: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | None:
        """The clients' updates [m, d]; with `mean` [d] and `weights` [m], their weighted sum is added to `mean`.

        Raises `Unsupported` where the model does what this strategy cannot.
        """
        if self.factored and not factorable(local):
            raise Unsupported("factored parameters need plain steps from the model")
        active = steps.num_clients
        if active != self._clients:
            self._build(active)
        parts = {name: local.start[..., bounds] for name, bounds in self._slices.items()}
        plain = local.shrink == 1 and not local.pull
        for name, slot in self._slots.items():
            slot.begin(parts[name], plain)
        drift = self._drift(local)
        for step in steps:
            if step.active != active:
                active = step.active
                for slot in self._slots.values():
                    slot.narrow(active)
            sums = self._replayed(step, totals.names, plain)
            sums = sums or self._measured(step.batch, step.weight, active, totals.names)
            for index in range(len(totals.names)):
                totals.add(index, *sums[2 * index : 2 * index + 2])
            self._descend(local, drift)
        self._shared = None
        if mean is None or weights is None:
            return torch.cat([s.updates(parts[n]) for n, s in self._slots.items()], 1)
        for name, slot in self._slots.items():
            slot.add_mean(mean[self._slices[name]], parts[name], weights)
        return None

    def _measured(
        self, batch: Mapping[str, Tensor], weight: Tensor, active: int, names: tuple[str, ...]
    ) -> list[Tensor]:
        """Sum and count [a] of each measure; the slots have heard of the loss's gradient."""
        sums: list[Tensor] = []
        with torch.enable_grad():
            outputs = self._module(*self.objective.arguments(batch))
            for name in names:
                total, count = client_sums(
                    self.objective.functions[name](outputs, batch), weight, active
                )
                sums += [total.detach(), count.detach()]
                if name == "loss":
                    loss = (total / count.clamp(min=1)).sum()
            torch.autograd.backward(loss, self._one)
        return sums

    def _replayed(self, step: Step, names: tuple[str, ...], plain: bool) -> list[Tensor] | None:
        """What `_measured` gives and does, by the recorded program; None where there is none."""
        key = (self._clients == 1, self.factored, len(step.weight) // step.active, names, plain)
        if key not in self._programs:
            self._programs[key] = self._recorded(step, names, plain)
        recorded = self._programs[key]
        if recorded is None:
            return None
        state = (tensor for slot in self._slots.values() for tensor in slot.tensors())
        given = (*step.batch.values(), step.weight, *state)
        part = self._part(recorded.program, step, given)
        results = iter(recorded.program.each(step.active, *given, *part))
        sums = [next(results) for _ in range(2 * len(names))]
        for name, kind, number in recorded.records:
            self._slots[name].record(kind, *(next(results) for _ in range(number)))
        return sums

    def _part(
        self, program: Program, step: Step, given: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | Sequence[Tensor]:
        """The step's part of what the program shares among the steps of a block."""
        block, clients = step.block, sum(step.block.counts)
        if clients * program.shared_bytes > SHARED_BYTES:
            return program.shared(step.active, *given)
        if self._shared is None or self._shared[0] is not block:
            rows = (*block.batch.values(), block.weight)
            shared = program.shared(clients, *rows, *given[len(rows) :])
            self._shared = block, program.parts(shared, block.counts)
        return self._shared[1][step.place]

    def _recorded(self, step: Step, names: tuple[str, ...], plain: bool) -> _Recorded | None:
        """The step as a program, made of this step's rows; None if it cannot be one."""
        alone = self._clients == 1
        stacked = [
            shape.numel() for n, shape in self.objective.shapes.items() if n not in self.factored
        ]
        if (1 if alone else MANY) * sum(stacked) * self._like.element_size() > RECORDED_BYTES:
            return None
        each = self.recordable(step, names, plain)
        try:
            program = record(each.function, each.arguments, each.num_rows, each.fixed, alone)
            return _Recorded(program, each.records)
        except Exception:  # noqa: BLE001  whatever it is that cannot be recorded, the module itself can still run
            return None
        finally:
            self._put(self._slots)

    def recordable(self, step: Step, names: tuple[str, ...], plain: bool) -> Recordable:
        """`_measured` as a function of rows and of what slots know."""
        size = len(step.weight) // step.active
        rows = [*step.batch.values(), step.weight]
        records: Records = []
        parameters = dict(self.objective.module.named_parameters())

        def slots(clients: int) -> Slots:
            made = self._made(clients)
            for slot in made.values():
                if isinstance(slot, Factored):
                    slot.plain = plain
            return made

        def arguments(clients: int) -> list[Tensor]:
            noise = torch.Generator().manual_seed(clients)
            chosen = torch.arange(clients * size, device=step.weight.device) % len(step.weight)
            state = [
                tensor
                for name, slot in slots(clients).items()
                for tensor in slot.example(parameters[name].detach(), noise)
            ]
            return [tensor[chosen] for tensor in rows] + state

        def function(*given: Tensor) -> list[Tensor]:
            weight = given[len(step.batch)]
            batch = dict(zip(step.batch, given, strict=False))
            clients = len(weight) // size
            mine, state = slots(clients), iter(given[len(rows) :])
            for slot in mine.values():
                slot.bind(state)
            self._put(mine)
            results = self._measured(batch, weight, clients, names)
            records.clear()
            for name, slot in mine.items():
                for kind, tensors in slot.taken():
                    records.append((name, kind, len(tensors)))
                    results += tensors
            return results

        fixed, place = set(), len(rows)
        for slot in slots(1).values():
            if isinstance(slot, Factored):
                fixed.add(place)
            place += len(slot.example(torch.empty(slot.shape), torch.Generator()))
        return Recordable(function, arguments, len(rows), fixed, records)

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
            here = slot.here.reshape(slot.active, -1)
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
                gradient += optimizer.weight_decay * slot.here.reshape_as(gradient)
            if optimizer.momentum:
                if slot.velocity is not None:
                    gradient += optimizer.momentum * slot.velocity[: slot.active]
                slot.velocity = gradient
            shaped = gradient.view(slot.active, *slot.shape)
            slot.here.sub_(shaped, alpha=optimizer.learning_rate)

    def _build(self, clients: int) -> None:
        self._clients, self._slots = clients, self._made(clients)
        self._put(self._slots)

    def _made(self, clients: int) -> Slots:
        return {
            name: Factored(shape, clients, self._like)
            if name in self.factored
            else Dense(shape, clients, self._like)
            for name, shape in self.objective.shapes.items()
        }

    def _put(self, slots: Slots) -> None:
        """Into the module's places for parameters."""
        for name, places in self._places.items():
            parameter = CohortParameter.of(slots[name], self._token)
            for module, attribute in places:
                module._parameters[attribute] = parameter  # type: ignore[assignment]
        for module in self._module.modules():
            if isinstance(module, nn.RNNBase):  # it keeps a second list of its parameters
                module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]


Records = list[tuple[str, str, int]]
"""Slot, kind and number of tensors of what follows the sums of measures in the results of a recorded step."""


@dataclass(frozen=True)
class Recordable:
    """A step as `record` takes it; `records` are known when `function` was called."""

    function: Function
    arguments: Callable[[int], list[Tensor]]
    num_rows: int
    fixed: set[int]
    records: Records


@dataclass(frozen=True)
class _Recorded:
    program: Program
    records: Records


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
