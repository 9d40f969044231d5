"""Flower's FedAvg in its simulation on Ray: one actor per process asked for, no evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch

from benchmarks.peers.simulation_flower_client import DEVICE, DTYPE, TASK, app
from benchmarks.peers.simulation_run import Request, Rounds, parse_request
from benchmarks.peers.simulation_torch import network

FedAvg: Any = import_module("flwr.serverapp.strategy").FedAvg


class Timed(FedAvg):  # type: ignore[misc]
    """FedAvg with all clients; a round lasts from its configuration to that of the next."""

    def __init__(self, request: Request) -> None:
        everyone = request.task.num_clients
        super().__init__(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=everyone,
            min_available_nodes=everyone,
        )
        self.rounds, self.steps, self.started = Rounds(request), 0, False

    def configure_train(self, *arguments: Any, **named: Any) -> Any:
        if self.started:
            self.rounds.end()
        self.started = True
        self.rounds.begin()
        return super().configure_train(*arguments, **named)

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
        replies = list(replies)
        self.steps += sum(int(reply.content["metrics"]["steps"]) for reply in replies)
        return super().aggregate_train(server_round, replies)

    def configure_evaluate(self, *_: Any, **__: Any) -> Any:
        return []

    def aggregate_evaluate(self, *_: Any, **__: Any) -> Any:
        return None


def main() -> None:
    request = parse_request()
    os.environ[TASK], os.environ[DEVICE] = request.name, request.device
    os.environ[DTYPE] = request.dtype
    torch.set_num_threads(1)
    server: Any = import_module("flwr.serverapp").ServerApp()
    arrays: Any = import_module("flwr.app").ArrayRecord

    @server.main()  # type: ignore[untyped-decorator]
    def serve(grid: Any, context: Any) -> None:
        strategy = Timed(request)
        last = strategy.start(
            grid=grid,
            initial_arrays=arrays(network(request.task, dtype=request.dtype).state_dict()),
            num_rounds=request.num_rounds + 1,
        )
        strategy.rounds.end()
        strategy.rounds.finish(last.arrays.to_torch_state_dict(), strategy.steps)

    gpus = 1.0 / request.processes if request.device.startswith("cuda") else 0.0
    import_module("flwr.simulation").run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=request.task.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": gpus},
            "init_args": {
                "num_cpus": request.processes,
                "log_to_driver": False,
                "include_dashboard": False,
            },
        },
    )


if __name__ == "__main__":
    main()
