"""pfl's FederatedAveraging on its SimulatedBackend, data in memory and batches cut beforehand.

Several processes: `python -m torch.distributed.run --standalone --nproc-per-node N -m benchmarks.peers.simulation_pfl`.
"""

from __future__ import annotations

import asyncio
import os
from importlib import import_module
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.peers.simulation_run import Rounds, parse_request
from benchmarks.peers.simulation_torch import clients, network, synchronize, weights_of


def prepare(device: str) -> None:
    """What pfl 0.6 needs to run with today's PyTorch and, several processes together, on one GPU."""
    if not hasattr(torch.distributed, "reduce_op"):
        vars(torch.distributed)["reduce_op"] = torch.distributed.ReduceOp
    asyncio.set_event_loop(asyncio.new_event_loop())
    os.environ["PFL_PYTORCH_DEVICE"] = device
    # With a GPU in sight pfl gives every process one of its own and joins them by NCCL, which refuses to have two
    # processes on one GPU. Without it joins them by Gloo, which does not mind.
    with patch("torch.cuda.is_available", return_value=False):
        import_module("pfl.model.pytorch")


def main() -> None:
    request = parse_request()
    torch.set_num_threads(1)
    prepare(request.device)
    dataset = import_module("pfl.data.dataset").Dataset
    federated = import_module("pfl.data.federated_dataset").FederatedDataset
    hyper = import_module("pfl.hyperparam")
    metrics = import_module("pfl.metrics")
    callback: Any = import_module("pfl.callback.base").TrainingProcessCallback

    task, cohort = request.task, request.task.num_clients
    data = [dataset(raw_data=rows) for rows in clients(task.data(), request.device, request.dtype)]
    turn = count()
    users = federated(
        data.__getitem__,
        lambda: next(turn) % cohort,
        user_id_to_weight={user: len(rows) for user, rows in enumerate(data)},
    )
    net: Any = network(task, request.device, request.dtype)
    net.metrics = lambda x, y: {"loss": metrics.Weighted(float(net.loss(x, y)) * len(y), len(y))}
    central = torch.optim.SGD(net.parameters(), lr=1.0)
    steps = 0

    def count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal steps
        steps += optimizer is not central

    register_optimizer_step_post_hook(count_step)

    alone = request.processes == 1
    rounds = Rounds(
        request,
        root=None if alone else os.getppid(),  # torchrun, and with it the other processes
        synchronize=lambda: synchronize(request.device),
    )

    class Clock(callback):  # type: ignore[misc]
        def on_train_begin(self, *, model: Any) -> Any:
            rounds.begin()
            return metrics.Metrics()

        def after_central_iteration(self, *_: Any, **__: Any) -> Any:
            rounds.end()
            rounds.begin()
            return False, metrics.Metrics()

    import_module("pfl.algorithm.federated_averaging").FederatedAveraging().run(
        algorithm_params=import_module("pfl.algorithm.base").NNAlgorithmParams(
            central_num_iterations=request.num_rounds + 1,
            evaluation_frequency=10**9,  # at the first one, which warms up, and never again
            train_cohort_size=cohort,
            val_cohort_size=0,
        ),
        backend=import_module("pfl.aggregate.simulate").SimulatedBackend(
            training_data=users,
            val_data=users,
            postprocessors=[import_module("pfl.aggregate.weighting").WeightByDatapoints()],
        ),
        model=import_module("pfl.model.pytorch").PyTorchModel(
            net, local_optimizer_create=torch.optim.SGD, central_optimizer=central
        ),
        model_train_params=hyper.NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=task.learning_rate,
            local_batch_size=task.batch_size,
        ),
        model_eval_params=hyper.NNEvalHyperParams(local_batch_size=10**6),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    if not alone:
        total = torch.tensor(steps)
        torch.distributed.all_reduce(total)
        steps = int(total)
    if os.environ.get("RANK", "0") == "0":
        rounds.finish(weights_of(net), steps)


if __name__ == "__main__":
    main()
