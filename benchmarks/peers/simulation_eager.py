"""The loop that a careful person writes in PyTorch without any framework: the reference for the weights.

With two processes asked for, it uses two threads instead: a loop has nothing else. `--order homespun`: homespun's
shuffled batches instead of the stored order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.peers.simulation_run import Rounds, parse_request
from benchmarks.peers.simulation_tasks import Data, Task
from benchmarks.peers.simulation_torch import clients, inputs, network, synchronize, weights_of

Batch = tuple[Tensor, Tensor]


def stored(task: Task, data: Data, device: str, dtype: str) -> list[list[Batch]]:
    """Each client's batches."""
    size = task.batch_size
    return [
        [(x[begin : begin + size], y[begin : begin + size]) for begin in range(0, len(y), size)]
        for x, y in clients(data, device, dtype)
    ]


def shuffled(task: Task, data: Data, device: str, dtype: str, number: int) -> Iterator[list[Batch]]:
    from benchmarks.peers.simulation_homespun import batches_in_order

    x, y = inputs(data.x, device, dtype), torch.from_numpy(data.y).to(device)
    for batches in batches_in_order(task, data, number):
        yield [(x[rows], y[rows]) for rows in map(torch.from_numpy, batches)]


def main() -> None:
    request = parse_request()
    torch.set_num_threads(request.processes)
    task, device, dtype = request.task, request.device, request.dtype
    data = task.data()
    cut = stored(task, data, device, dtype)
    net = network(task, device, dtype)
    local = [parameter.data for parameter in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=task.learning_rate)
    rounds = Rounds(request, synchronize=lambda: synchronize(device))
    steps = 0
    for number in range(1, request.num_rounds + 2):
        rounds.begin()
        start = [parameter.clone() for parameter in local]
        mean = [torch.zeros_like(parameter) for parameter in local]
        own_order = request.order == "homespun"
        for batches in shuffled(task, data, device, dtype, number) if own_order else cut:
            torch._foreach_copy_(local, start)
            for x, y in batches:
                optimizer.zero_grad()
                torch.autograd.backward(net.loss(x, y))
                optimizer.step()
                steps += 1
            share = sum(len(y) for _, y in batches) / len(data.y)
            torch._foreach_add_(mean, local, alpha=share)
        torch._foreach_copy_(local, mean)
        rounds.end()
    rounds.finish(weights_of(net), steps)


if __name__ == "__main__":
    main()
