"""Homespun: federated learning for real devices.

Models learn from data that never leaves the devices, and the server only ever sees sums.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_OF_SIMULATIONS = ("simulate", "Result", "Task", "Arena", "EarlyStopping", "Target", "Cluster")


def __getattr__(name: str) -> Any:
    """What simulations need is loaded when it is asked for: devices and servers have no PyTorch."""
    if name not in _OF_SIMULATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("homespun.simulation"), name)
