"""The first checkpoint of a model, from the initializers in the manifest: no PyTorch needed."""

from __future__ import annotations

import math

import numpy as np

from homespun import rng
from homespun.plan.manifest import Constant, Manifest, Normal, ParameterSpec, Zipf
from homespun.types import FloatArray


def initial_checkpoint(manifest: Manifest, seed: int) -> dict[str, FloatArray]:
    """Parameters in the manifest's order; each has a stream of its own."""
    return {spec.name: _draw(spec, seed) for spec in manifest.parameters}


def _draw(spec: ParameterSpec, seed: int) -> FloatArray:
    if isinstance(spec.initial, Constant):
        return np.full(spec.shape, spec.initial.value, np.float32)
    if isinstance(spec.initial, Zipf):
        return _zipf(spec.initial, spec.shape)
    generator = rng.stream(seed, "initial", spec.name)
    if isinstance(spec.initial, Normal):
        return (generator.standard_normal(spec.shape) * spec.initial.std).astype(np.float32)
    return generator.uniform(-spec.initial.bound, spec.initial.bound, spec.shape).astype(np.float32)


def _zipf(zipf: Zipf, shape: tuple[int, ...]) -> FloatArray:
    ranks = np.maximum(np.arange(math.prod(shape)) - zipf.first, 0)
    logits = -np.log(ranks + 1 + zipf.shift)
    logits[: zipf.first] = logits.min()
    centred: FloatArray = (logits - logits.mean()).reshape(shape).astype(np.float32)
    return centred
