"""FedJAX's federated averaging on its default backend, JIT-compiled, data in memory.

FedJAX fills a client's last batch with rows from the beginning: another algorithm. Here it is as short as everybody's.
Images are channels-last, as XLA likes them. With two processes asked for, XLA may use two threads.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.peers.simulation_run import Rounds, parse_request
from benchmarks.peers.simulation_tasks import Cnn, Lstm, Task, Weights

Arrays = dict[str, Any]


def to_jax(weight: Any) -> Any:
    """Convolutions [out, in, k, k] to [k, k, in, out]."""
    return np.transpose(weight, (2, 3, 1, 0)) if np.ndim(weight) == 4 else weight


def to_torch(weight: Any) -> Any:
    return np.transpose(weight, (3, 2, 0, 1)) if np.ndim(weight) == 4 else np.asarray(weight)


def rows_of(task: Task, dtype: str) -> list[Arrays]:
    """Each client's rows, images [n, side, side, channels]."""
    image, words = isinstance(task.model, Cnn), isinstance(task.model, Lstm)
    return [
        {
            "x": np.ascontiguousarray(
                np.moveaxis(x, 1, -1) if image else x, None if words else dtype
            ),
            "y": y.astype(np.int32),
        }
        for x, y in task.data().clients()
    ]


def loss_of(task: Task, jax: Any) -> Any:
    """(parameters, batch, rng) -> the batch's mean loss."""
    jnp, lax, model = jax.numpy, jax.lax, task.model

    def through(p: Arrays, x: Any) -> Any:
        layers = sum(name.startswith("dense.") for name in p) // 2
        for layer in range(layers):
            x = x @ p[f"dense.{layer}.weight"].T + p[f"dense.{layer}.bias"]
            if layer < layers - 1:
                x = jax.nn.relu(x)
        return x

    def convolutions(model: Cnn, p: Arrays, x: Any) -> Any:
        for layer, pooled in enumerate(model.pooled):
            x = lax.conv_general_dilated(
                x,
                p[f"conv.{layer}.weight"],
                (1, 1),
                [(model.padding, model.padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + p[f"conv.{layer}.bias"])
            if pooled:
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)  # flattened in PyTorch's order

    def recurrent(model: Lstm, p: Arrays, x: Any) -> Any:
        biases = p["lstm.bias_ih_l0"] + p["lstm.bias_hh_l0"]
        inputs = p["embedding.weight"][x] @ p["lstm.weight_ih_l0"].T + biases

        def step(state: tuple[Any, Any], at: Any) -> Any:
            h, c = state
            i, f, g, o = jnp.split(at + h @ p["lstm.weight_hh_l0"].T, 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((len(x), model.hidden))
        _, states = lax.scan(step, (zeros, zeros), jnp.swapaxes(inputs, 0, 1))
        states = jnp.swapaxes(states, 0, 1) @ p["projection.weight"].T + p["projection.bias"]
        return states @ p["output.weight"].T + p["output.bias"]

    def scores(p: Arrays, x: Any) -> Any:
        if isinstance(model, Lstm):
            return recurrent(model, p, x)
        return through(p, convolutions(model, p, x) if isinstance(model, Cnn) else x)

    def loss(p: Arrays, batch: Arrays, rng: Any) -> Any:
        logs = jax.nn.log_softmax(scores(p, batch["x"]))
        return -jnp.take_along_axis(logs, batch["y"][..., None], axis=-1).mean()

    return loss


def main() -> None:
    request = parse_request()
    threads = request.processes
    os.environ["JAX_PLATFORMS"] = "cuda" if request.device.startswith("cuda") else "cpu"
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        # XLA heeds no setting for its threads any more, only how many cores it sees.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    jax: Any = import_module("jax")
    if not hasattr(jax, "tree_map"):  # FedJAX 0.0.17 asks for it; JAX moved it
        jax.tree_map = jax.tree_util.tree_map
    jax.config.update("jax_enable_x64", request.dtype == "float64")
    fedjax: Any = import_module("fedjax")
    task, steps = request.task, 0

    class InOrder(fedjax.ClientDataset):  # type: ignore[misc]
        def shuffle_repeat_batch(self, *_: Any, **__: Any) -> Any:
            nonlocal steps
            for batch in self.batch(batch_size=task.batch_size, drop_remainder=False):
                steps += 1
                yield batch

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss_of(task, jax)),
        fedjax.optimizers.sgd(task.learning_rate),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=task.batch_size, num_epochs=1),
    )
    key = jax.random.PRNGKey(0)
    clients = [
        (str(number), InOrder(rows), key)
        for number, rows in enumerate(rows_of(task, request.dtype))
    ]
    initial: Weights = task.initial()
    state = algorithm.init(
        {n: jax.numpy.asarray(to_jax(w), request.dtype) for n, w in initial.items()}
    )
    rounds = Rounds(request)
    for _ in range(request.num_rounds + 1):
        rounds.begin()
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
        rounds.end()
    rounds.finish({n: to_torch(w) for n, w in state.params.items()}, steps)


if __name__ == "__main__":
    main()
