"""A simulation as a TOML file.

[task]
model = "package.module:function"     # gives a Task or a Plan; or the name of a model of the zoo
settings = { hidden = 32 }            # arguments of that function

[data]
source = "package.module:function"    # gives an Arena, or a pair: to train on, to evaluate on
settings = {}

[simulation]
rounds = 50                           # and every other word of homespun.simulate
cohort = 20

[method]
name = "FedAdam"
settings = { learning_rate = 0.01 }

[early_stopping]                      # optional, as are [target] and
metric = "loss"
patience = 5

[durations]                           # optional: virtual time; with [method] name = "FedBuff" nobody waits for anybody
seconds = 60
[cluster]                             # simulation.workers are actors of Ray
address = "auto"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from homespun.errors import InvalidConfig


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class TaskSection(_Section, frozen=True, kw_only=True):
    model: str
    settings: dict[str, Any] = {}


class DataSection(_Section, frozen=True, kw_only=True):
    source: str
    settings: dict[str, Any] = {}


class MethodSection(_Section, frozen=True, kw_only=True):
    name: str = "FedAvg"
    settings: dict[str, Any] = {}


class SimulationSection(_Section, frozen=True, kw_only=True):
    """The words of `homespun.simulate`, with its defaults. `directory`: relative to the file's own."""

    rounds: int
    cohort: int
    evaluate_every: int = 1
    seed: int = 0
    dropout: float = 0.0
    aggregation: Literal["float", "fixed-point", "secure"] | None = None
    clip_norm: float | None = None
    max_weight: int = 0
    bits: int = 16
    rotate: bool = True
    directory: str | None = None
    checkpoint_every: int = 1
    keep: int = 2
    workers: int = 0
    shards: int | None = None
    strategy: str = "auto"
    chunk: int | None = None
    train_metrics: bool = False
    device: str = "cpu"


class StoppingSection(_Section, frozen=True, kw_only=True):
    metric: str = "loss"
    patience: int = 10
    min_delta: float = 0.0
    mode: Literal["min", "max"] | None = None


class TargetSection(_Section, frozen=True, kw_only=True):
    metric: str
    value: float
    mode: Literal["min", "max"] | None = None


class DurationsSection(_Section, frozen=True, kw_only=True):
    """Those of `asynchronous.Durations`."""

    seconds: float = 60.0
    per_example: float = 0.0
    spread: float = 1.0
    jitter: float = 0.0
    measured: list[float] | None = None
    slot_seconds: float = 3600.0


class ClusterSection(_Section, frozen=True, kw_only=True):
    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None


class Config(_Section, frozen=True, kw_only=True):
    """The whole file."""

    task: TaskSection
    data: DataSection
    simulation: SimulationSection
    method: MethodSection = MethodSection()
    early_stopping: StoppingSection | None = None
    target: TargetSection | None = None
    durations: DurationsSection | None = None
    cluster: ClusterSection | None = None


SECTIONS: Mapping[str, type[_Section]] = {
    "task": TaskSection,
    "data": DataSection,
    "simulation": SimulationSection,
    "method": MethodSection,
    "early_stopping": StoppingSection,
    "target": TargetSection,
    "durations": DurationsSection,
    "cluster": ClusterSection,
}


def read_config(path: Path, changes: Sequence[str] = ()) -> Config:
    """The file with `changes`, each `section.key=value`.

    Raises `InvalidConfig` naming the file, the key and what is allowed.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfig(
            f"{path} cannot be read: {error.strerror}", hint="give the path of a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} is not TOML: {error}") from error
    for change in changes:
        _apply(data, change)
    return parse(data, str(path))


def parse(data: Mapping[str, Any], origin: str) -> Config:
    """A configuration from plain data. Raises `InvalidConfig`, calling the data `origin`."""
    _known(data, Config, origin, "")
    for name, section in SECTIONS.items():
        if isinstance(data.get(name), Mapping):
            _known(data[name], section, origin, f"{name}.")
    try:
        return msgspec.convert(data, Config)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        where = where.rstrip("`")
        missing = "missing required field" in what
        raise InvalidConfig(
            f"{origin}: {where + ': ' if where else ''}{what[0].lower()}{what[1:]}",
            hint="add it to the file" if missing else _allowed(where),
        ) from error


def _known(data: Mapping[str, Any], struct: type[_Section], origin: str, prefix: str) -> None:
    names = struct.__struct_fields__
    if unknown := sorted(data.keys() - set(names)):
        kind = "key" if prefix else "section"
        raise InvalidConfig(
            f"{origin}: there is no {kind} {prefix}{unknown[0]}", hint=f"one of: {', '.join(names)}"
        )


def _allowed(where: str) -> str:
    section, _, key = where.partition(".")
    struct = SECTIONS.get(section)
    if struct is None or key not in struct.__struct_fields__:
        return ""
    return f"{key} is {struct.__annotations__[key]}"


def _apply(data: dict[str, Any], change: str) -> None:
    """`section.key=value` or `section.settings.key=value`, where a value that is no TOML is text."""
    path, equals, text = change.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not sections or not key:
        raise InvalidConfig(
            f"--set {change} is not understood", hint="as in --set simulation.rounds=5"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = data
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InvalidConfig(f"--set {change}: {section} is not a section")
    table[key] = value
