"""The loop that a careful person writes in PyTorch without any framework: the reference for the weights.

With two processes asked for, it uses two threads instead: a loop has nothing else.
"""

from __future__ import annotations

import torch

from benchmarks.peers.simulation_run import Rounds, parse_request
from benchmarks.peers.simulation_torch import clients, network, synchronize, weights_of


def main() -> None:
    request = parse_request()
    torch.set_num_threads(request.processes)
    task, device = request.task, request.device
    data = clients(task.data(), device)
    num_rows = sum(len(y) for _, y in data)
    net = network(task, device)
    local = [parameter.data for parameter in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=task.learning_rate)
    rounds = Rounds(request, synchronize=lambda: synchronize(device))
    steps = 0
    for _ in range(request.num_rounds + 1):
        rounds.begin()
        start = [parameter.clone() for parameter in local]
        mean = [torch.zeros_like(parameter) for parameter in local]
        for x, y in data:
            torch._foreach_copy_(local, start)
            for begin in range(0, len(y), task.batch_size):
                batch = slice(begin, begin + task.batch_size)
                optimizer.zero_grad()
                net.loss(x[batch], y[batch]).backward()
                optimizer.step()
                steps += 1
            torch._foreach_add_(mean, local, alpha=len(y) / num_rows)
        torch._foreach_copy_(local, mean)
        rounds.end()
    rounds.finish(weights_of(net), steps)


if __name__ == "__main__":
    main()
