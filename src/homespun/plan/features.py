"""From stored examples to batches: the declared features of a plan, applied with numpy.

Rows are what training counts: a window of text, or one example. A batch always has the plan's batch
size, because the graphs are fixed; the last one is filled up with copies of a real row whose
`weight` is 0, so that they add exactly nothing and can never produce a number that is not finite.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from homespun.corpora.vocabulary import Vocabulary
from homespun.errors import InvalidExample, PlanError
from homespun.plan.manifest import Manifest, TensorFeature, TensorSpec, TextFeature
from homespun.types import AnyArray, FloatArray

Rows = dict[str, AnyArray]
"""Input name -> array [num_rows, *row shape]; every array has the same num_rows."""

Example = Mapping[str, Any]


def encode(manifest: Manifest, assets: Mapping[str, bytes], examples: Sequence[Example]) -> Rows:
    """Turn stored examples into rows for the plan's inputs.

    Raises InvalidExample if an example lacks a field or does not fit, PlanError if an asset is
    missing or is not right for the model. Messages never contain the example's content.
    """
    specs = {spec.name: spec for spec in manifest.inputs}
    rows: Rows = {}
    for feature in manifest.features:
        values = [_field(example, feature.field) for example in examples]
        if isinstance(feature, TextFeature):
            x, y = windows(vocabulary(assets, feature), values, feature)
            rows |= {feature.input: x, feature.target: y}
        else:
            rows[feature.input] = _tensors(feature, specs[feature.input], values)
    return rows


def vocabulary(assets: Mapping[str, bytes], feature: TextFeature) -> Vocabulary:
    """The vocabulary that the plan carries. Raises PlanError if it is missing."""
    if feature.asset not in assets:
        raise PlanError(
            f"the plan has no asset {feature.asset!r}, which its text feature needs",
            hint="add it with Plan.with_assets before publishing",
        )
    return Vocabulary.from_bytes(assets[feature.asset])


def windows(
    words: Vocabulary, texts: Sequence[str], feature: TextFeature
) -> tuple[AnyArray, AnyArray]:
    """int32 `x` and `y` of shape [num_windows, length]: y[i, t] is the token after x[i, t].

    The token ids of all texts form one stream; window i starts at token i * length, so windows
    share only their border token and every pair of neighbours is predicted exactly once. The tail
    is padding.
    """
    ids: list[int] = []
    for text in texts:
        if not isinstance(text, str):
            raise InvalidExample(
                f"field {feature.field!r} of an example is {type(text).__name__}, expected text",
                hint="store it as a string",
            )
        ids += words.encode(text)
    if ids and not 0 <= max(ids) < feature.vocabulary_size:
        raise PlanError(
            f"the vocabulary has ids up to {max(ids)}, the model knows {feature.vocabulary_size}",
            hint=f"publish the plan with a vocabulary of at most {feature.vocabulary_size} entries",
        )
    num_windows = -(-max(len(ids) - 1, 0) // feature.length)
    stream = np.full(num_windows * feature.length + 1, words.pad_id, np.int32)
    stream[: len(ids)] = ids[: len(stream)]
    shape = (num_windows, feature.length)
    return stream[:-1].reshape(shape), stream[1:].reshape(shape)


def num_rows(rows: Mapping[str, AnyArray]) -> int:
    """How many rows there are."""
    return len(next(iter(rows.values())))


def batches(
    rows: Mapping[str, AnyArray],
    batch_size: int,
    order: np.random.Generator | None = None,
    limit: int | None = None,
) -> Iterator[tuple[Rows, FloatArray]]:
    """Batches of exactly `batch_size` rows and their weights float32 [batch_size], 1 for a real
    row.

    In the rows' order, or shuffled by `order`.
    """
    count = num_rows(rows)
    indices = np.arange(count) if order is None else order.permutation(count)
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        weight = np.zeros(batch_size, np.float32)
        weight[: len(chosen)] = 1
        filled = np.concatenate([chosen, np.repeat(chosen[:1], batch_size - len(chosen))])
        yield {name: array[filled] for name, array in rows.items()}, weight


def _field(example: Example, name: str) -> Any:
    if name not in example:
        raise InvalidExample(
            f"an example has no field {name!r}, it has {sorted(example)}",
            hint="store the fields that the plan's features name",
        )
    return example[name]


def _tensors(feature: TensorFeature, spec: TensorSpec, values: Sequence[Any]) -> AnyArray:
    stacked = np.empty((len(values), *feature.shape), spec.dtype)
    for row, value in enumerate(values):
        stacked[row] = _tensor(feature, value) * np.asarray(feature.scale, spec.dtype)
    if not np.isfinite(stacked).all():
        raise InvalidExample(
            f"field {feature.field!r} of an example has a number that is not finite",
            hint="store finite numbers",
        )
    return stacked


def _tensor(feature: TensorFeature, value: Any) -> AnyArray:
    dtype = np.dtype(feature.dtype).newbyteorder("<")
    try:
        if isinstance(value, str):
            value = base64.b64decode(value, validate=True)
        if isinstance(value, bytes | bytearray | memoryview):
            return np.frombuffer(value, dtype).reshape(feature.shape)
        array = np.asarray(value)
        if not np.can_cast(array.dtype, np.float64) or array.shape != feature.shape:
            raise ValueError(f"{array.dtype}{list(array.shape)}")
        if dtype.kind in "iu":
            bounds = np.iinfo(dtype)
            if array.size and not bounds.min <= array.min() <= array.max() <= bounds.max:
                raise ValueError(f"numbers outside {bounds.min}..{bounds.max}")
        return array.astype(dtype)
    except (ValueError, TypeError, binascii.Error) as error:
        raise InvalidExample(
            f"field {feature.field!r} of an example is not "
            f"{feature.dtype}{list(feature.shape)}: {error}",
            hint="store nested lists, or bytes of little-endian numbers",
        ) from error
