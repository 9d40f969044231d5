"""Simulation of many clients in one process or many: to learn what will work on devices before there are any."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_SHOWN = {
    "simulate": "api",
    "Result": "api",
    "Task": "task",
    "Arena": "arena",
    "EarlyStopping": "stopping",
    "Target": "stopping",
    "Cluster": "ray",
    "Participation": "participation",
    "Traces": "participation",
    "DayNight": "participation",
    "Durations": "asynchronous",
}


def __getattr__(name: str) -> Any:
    """Loaded when it is asked for: some of it needs PyTorch."""
    if name not in _SHOWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_SHOWN[name]}"), name)
