"""A trial: a model runs on the operator's machine before its release is asked for.

The server has no runtime; here is one. The predictions on zeros are kept with the release, so that any other machine
or runtime can be compared with them.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from homespun.errors import NumericFailure
from homespun.plan.package import Plan
from homespun.protocol.release_request import (
    Trial,
)
from homespun.types import FloatArray

NUM_TIMED = 30
NUM_VALUES = 16
TOLERANCE = 1e-3
"""Of a prediction, relative and absolute: runtimes add up in different orders."""


def try_out(plan: Plan, checkpoint: dict[str, FloatArray]) -> Trial:
    """Predict on zeros. Raises `PlanError`, `ShapeMismatch` or `NumericFailure` for a model that cannot be served."""
    from homespun.plan.engine import RUNTIME, Predictor  # loads ONNX Runtime

    plan.manifest.check_checkpoint(checkpoint)
    zeros = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in plan.manifest.predict_inputs}
    predictor = Predictor(plan.graphs["predict"], checkpoint)
    outputs = predictor.predict(zeros)
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise NumericFailure(f"the model's output {name!r} is not finite on zeros")
    times = []
    for _ in range(NUM_TIMED):
        start = time.perf_counter()
        predictor.predict(zeros)
        times.append(time.perf_counter() - start)
    return Trial(
        runtime=RUNTIME,
        latency_s=median(times),
        outputs={name: _sample(values) for name, values in outputs.items()},
    )


def compare(trial: Trial, golden: Trial) -> None:
    """Raise `NumericFailure` unless both machines predict the same."""
    for name, wanted in golden.outputs.items():
        got = trial.outputs.get(name, ())
        if len(got) != len(wanted) or not np.allclose(got, wanted, TOLERANCE, TOLERANCE):
            raise NumericFailure(
                f"output {name!r} is not what {golden.runtime} predicted",
                hint="this runtime computes something else; do not serve the model on it",
                expected=str(list(wanted)),
                got=str(list(got)),
            )


def _sample(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> tuple[float, ...]:
    """At most NUM_VALUES of them, evenly spaced."""
    flat = np.asarray(values, np.float64).ravel()
    picked = np.linspace(0, flat.size - 1, min(flat.size, NUM_VALUES)).astype(int)
    return tuple(float(value) for value in flat[picked])
