"""The few types that everything shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]
"""Model numbers: parameters, updates, metrics in flight."""

AnyArray: TypeAlias = npt.NDArray[Any]

Tree: TypeAlias = Mapping[str, FloatArray]
"""Named float32 arrays: a checkpoint, an update, an optimizer's state. Order is by the plan, not by the mapping."""

Hash: TypeAlias = str
"""SHA-256 in lower-case hexadecimal, 64 characters: the address of a blob."""
