"""ONNX Runtime, behind three small classes: the only file that imports it.

One thread and no spinning, because the device is somebody's; graphs from bytes, never from a path.
A trainer keeps two sets of parameters. Every step reads one and writes the other (IO binding), then
they swap, so nothing of the model's size is copied or allocated per step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime as ort

from homespun.errors import InvalidExample, InvalidInput, UnsupportedPlan
from homespun.learning.metrics import MetricSum
from homespun.plan.manifest import Manifest
from homespun.types import AnyArray, FloatArray, Tree

Sums = dict[str, MetricSum]
"""The loss (always named `loss`) and the metrics of some rows."""

_DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
_NEXT = {"p.": "n.", "m.": "v."}
"""Prefix of what a step reads -> prefix of what it writes in its place: parameters, momentum."""


class Trainer:
    """The train graph of one plan with its buffers, ready to step.

    Graph inputs: p.<parameter>, m.<parameter> (momentum), a.<parameter> (the checkpoint, for the
    proximal term), the batch, `weight` [B], and one scalar per optimizer setting. Outputs:
    n.<parameter>, v.<parameter> (new momentum), sum.<metric> and count.<metric>.
    """

    def __init__(self, manifest: Manifest, graph: bytes) -> None:
        self._session = _session("train", graph)
        inputs, outputs = _arrays(self._session.get_inputs()), _arrays(self._session.get_outputs())
        self._names = [spec.name for spec in manifest.parameters]
        carried = [name for name in inputs if name[:2] in _NEXT]
        self._slots = (
            {name: inputs.pop(name) for name in carried},
            {name: outputs.pop(_NEXT[name[:2]] + name[2:]) for name in carried},
        )
        self._feeds, self._sums = inputs, outputs
        for name, value in optimizer_feeds(manifest).items():
            if name in inputs:
                inputs[name][...] = value
        self._bindings = [self._bind(*self._slots), self._bind(*reversed(self._slots))]
        self._current = 0

    def _bind(self, reads: dict[str, AnyArray], writes: dict[str, AnyArray]) -> Any:
        binding = self._session.io_binding()
        for name, array in (reads | self._feeds).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        renamed = {_NEXT[name[:2]] + name[2:]: array for name, array in writes.items()}
        for name, array in (renamed | self._sums).items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        return binding

    def start(self, checkpoint: Tree, state: Tree | None = None) -> None:
        """Begin at `checkpoint` with momentum 0, or where another trainer from there was: at its `state`."""
        for name, array in self._slots[self._current].items():
            at_first = checkpoint[name[2:]] if name.startswith("p.") else 0
            array[...] = at_first if state is None else state[name]
        for name, array in self._feeds.items():
            if name.startswith("a."):
                array[...] = checkpoint[name[2:]]

    def state(self) -> dict[str, FloatArray]:
        """Parameters (p.) and momentum (m.) now: views, valid until the next step."""
        return dict(self._slots[self._current])

    def step(self, batch: Mapping[str, AnyArray], weight: FloatArray) -> Sums:
        """One step of the client optimizer; the sums are of the batch before the step."""
        _fill(self._feeds, batch, weight)
        with _data_fits():
            self._session.run_with_iobinding(self._bindings[self._current])
        self._current ^= 1
        return _sums(self._sums)

    def parameters(self) -> dict[str, FloatArray]:
        """The parameters now: views, valid until the next step."""
        return {name: self._slots[self._current][f"p.{name}"] for name in self._names}


class Evaluator:
    """The evaluate graph of one plan at one checkpoint."""

    def __init__(self, graph: bytes, checkpoint: Tree) -> None:
        self._session = _session("evaluate", graph)
        self._feeds = _arrays(self._session.get_inputs())
        self._names = [output.name for output in self._session.get_outputs()]
        _load(self._feeds, checkpoint)

    def evaluate(self, batch: Mapping[str, AnyArray], weight: FloatArray) -> Sums:
        """Sums of one batch."""
        _fill(self._feeds, batch, weight)
        with _data_fits():
            outputs = self._session.run(None, self._feeds)
        return _sums(dict(zip(self._names, outputs, strict=True)))


RUNTIME = f"onnxruntime {ort.__version__}"


class Predictor:
    """The predict graph of one plan at one checkpoint; the graph's batch is 1."""

    def __init__(self, graph: bytes, checkpoint: Tree) -> None:
        self._session = _session("predict", graph)
        self._feeds = _arrays(self._session.get_inputs())
        self._names = [output.name for output in self._session.get_outputs()]
        _load(self._feeds, checkpoint)

    def predict(self, inputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Outputs by name, for inputs with the shapes of `manifest.predict_inputs`."""
        _fill(self._feeds, inputs)
        with _data_fits():
            outputs = self._session.run(None, self._feeds)
        return dict(zip(self._names, outputs, strict=True))


def optimizer_feeds(manifest: Manifest) -> dict[str, float]:
    """The optimizer's settings as scalars of the train graph; no gradient bound is infinity."""
    optimizer = manifest.optimizer
    bound = optimizer.max_grad_norm
    return {
        "learning_rate": optimizer.learning_rate,
        "momentum": optimizer.momentum,
        "weight_decay": optimizer.weight_decay,
        "proximal": optimizer.proximal,
        "max_grad_norm": np.inf if bound is None else bound,
    }


def _session(name: str, graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # a fifth less memory at the peak, and no slower
    options.log_severity_level = 4  # failures arrive as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        _raise_if_out_of_memory(error)
        raise UnsupportedPlan(
            f"ONNX Runtime {ort.__version__} cannot load the {name} graph: {error}",
            hint="update onnxruntime on the device, or build the plan for this version",
        ) from error


@contextmanager
def _data_fits() -> Iterator[None]:
    """A graph that loaded fails only on data: an index outside its table. Its message quotes the data,
    so it is not passed on. Or there was no memory left, which is nobody's data."""
    try:
        yield
    except Exception as error:
        _raise_if_out_of_memory(error)
        raise InvalidExample(
            "a row has a number that the model cannot take",
            hint="labels and tokens must be within the model's classes and vocabulary",
        ) from error


def _raise_if_out_of_memory(error: Exception) -> None:
    """ONNX Runtime says it in words only: those of std::bad_alloc, or of its own arena."""
    if isinstance(error, MemoryError) or re.search("bad.?alloc|allocate memory", str(error)):
        raise MemoryError from error


def _arrays(values: list[Any]) -> dict[str, AnyArray]:
    """Zeroed arrays for the inputs or outputs of a graph."""
    return {value.name: np.zeros(value.shape, _DTYPES[value.type]) for value in values}


def _load(feeds: dict[str, AnyArray], checkpoint: Tree) -> None:
    for name, array in feeds.items():
        if name.startswith("p."):
            array[...] = checkpoint[name[2:]]


def _fill(
    feeds: dict[str, AnyArray], batch: Mapping[str, AnyArray], weight: FloatArray | None = None
) -> None:
    for name, array in (batch if weight is None else {**batch, "weight": weight}).items():
        if name not in feeds:
            continue  # an input that this graph does not depend on
        if array.shape != feeds[name].shape:
            raise InvalidInput(
                f"input {name} has shape {array.shape}, the graph expects {feeds[name].shape}",
                hint="make batches with homespun.plan.features",
            )
        feeds[name][...] = array


def _sums(outputs: Mapping[str, AnyArray]) -> Sums:
    names = [name.removeprefix("sum.") for name in outputs if name.startswith("sum.")]
    return {
        name: MetricSum(float(outputs[f"sum.{name}"]), float(outputs[f"count.{name}"]))
        for name in names
    }
