"""Flower's client: in a module of its own, since Flower's actors are processes that import it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch

from benchmarks.peers.simulation_tasks import TASKS
from benchmarks.peers.simulation_torch import clients, network

TASK = "HOMESPUN_BENCHMARK_TASK"
DEVICE = "HOMESPUN_BENCHMARK_DEVICE"
DTYPE = "HOMESPUN_BENCHMARK_DTYPE"

flwr: Any = import_module("flwr.app")
app: Any = import_module("flwr.clientapp").ClientApp()
kept: dict[str, Any] = {}


@app.train()  # type: ignore[untyped-decorator]
def train(message: Any, context: Any) -> Any:
    task = TASKS[os.environ[TASK]]
    if not kept:  # data and network stay in the actor
        torch.set_num_threads(1)
        device, dtype = os.environ[DEVICE], os.environ[DTYPE]
        kept.update(data=clients(task.data(), device, dtype), network=network(task, device, dtype))
    net = kept["network"]
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = kept["data"][int(context.node_config["partition-id"])]
    optimizer = torch.optim.SGD(net.parameters(), lr=task.learning_rate)
    steps = 0
    for begin in range(0, len(y), task.batch_size):
        batch = slice(begin, begin + task.batch_size)
        optimizer.zero_grad()
        net.loss(x[batch], y[batch]).backward()
        optimizer.step()
        steps += 1
    content = {
        "arrays": flwr.ArrayRecord(net.state_dict()),
        "metrics": flwr.MetricRecord({"num-examples": len(y), "steps": steps}),
    }
    return flwr.Message(content=flwr.RecordDict(content), reply_to=message)
