"""Checkpoints of a run: all that the next round depends on, so that a resumed run goes on to the same bits.

    checkpoints/round-000012/model.safetensors     the parameters, as any server or device takes them
                             server.safetensors    the server's vectors: moments, control variates, ...
                             clients.safetensors   what clients keep between participations, if they do
                             state.json            the round, what was settled once for the run, and what a run
                                                   must have in common with it

A checkpoint is written beside the others and gets its name by one rename: it is there as a whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.numpy

from homespun.errors import Conflict, InvalidInput, StorageFailure
from homespun.types import AnyArray

Arrays = Mapping[str, AnyArray]


@dataclass(frozen=True)
class Snapshot:
    """The state after `round` rounds. `model`: name -> parameter; `server` and `clients`: any arrays.

    `identity`: settings under which alone these arrays continue the same run; `settled`: what the run itself found out
    once, and goes on with.
    """

    round: int
    model: Arrays
    server: Arrays = field(default_factory=dict)
    clients: Arrays = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    settled: Mapping[str, Any] = field(default_factory=dict)


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    round: int
    identity: dict[str, Any]
    settled: dict[str, Any] = msgspec.field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoints:
    """The newest `keep` checkpoints in `directory`, and the best one."""

    directory: Path
    keep: int = 2

    def save(self, snapshot: Snapshot, best_round: int | None = None) -> Path:
        """Write a checkpoint, then drop those that are neither new nor the best. Raises `StorageFailure`."""
        path = self._path(snapshot.round)
        unfinished = path.with_suffix(".tmp")
        head = _Head(
            round=snapshot.round,
            identity=dict(snapshot.identity),
            settled=dict(snapshot.settled),
        )
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for name in ("model", "server", "clients"):
                data = safetensors.numpy.save(_contiguous(getattr(snapshot, name)))
                _write(unfinished / f"{name}.safetensors", data)
            _write(unfinished / "state.json", msgspec.json.encode(head))
            shutil.rmtree(path, ignore_errors=True)  # of a run that was cut off after this round
            unfinished.rename(path)
            self._drop(keep={snapshot.round, best_round})
        except OSError as error:
            raise StorageFailure(
                f"the checkpoint of round {snapshot.round} cannot be written: {error.strerror}",
                hint=f"is there room at {self.directory}?",
            ) from error
        return path

    def rounds(self) -> list[int]:
        """Rounds of which there is a checkpoint, oldest first."""
        names = [path.name for path in self.directory.glob("round-*") if not path.suffix]
        return sorted(int(name.removeprefix("round-")) for name in names)

    def load(self, number: int, identity: Mapping[str, Any] | None = None) -> Snapshot:
        """The checkpoint of a round.

        Raises `InvalidInput` if it is damaged, `Conflict` if it is of a run with another `identity`.
        """
        path = self._path(number)
        try:
            head = msgspec.json.decode((path / "state.json").read_bytes(), type=_Head)
            model, server, clients = (
                safetensors.numpy.load((path / f"{name}.safetensors").read_bytes())
                for name in ("model", "server", "clients")
            )
        except (OSError, msgspec.MsgspecError, safetensors.SafetensorError) as error:
            raise InvalidInput(
                f"the checkpoint {path} cannot be read: {error}",
                hint="remove its folder to go on from an earlier one",
            ) from error
        for key, value in (identity or {}).items():
            if head.identity.get(key) != value:
                raise Conflict(
                    f"{path} was written by a run with another {key}",
                    hint="resume with the same settings, or begin in another directory",
                    expected=str(head.identity.get(key)),
                    got=str(value),
                )
        return Snapshot(head.round, model, server, clients, head.identity, head.settled)

    def newest(self, identity: Mapping[str, Any] | None = None) -> Snapshot | None:
        """The last checkpoint, None if there is none. Raises as `load`."""
        rounds = self.rounds()
        return self.load(rounds[-1], identity) if rounds else None

    def _path(self, number: int) -> Path:
        return self.directory / f"round-{number:06d}"

    def _drop(self, keep: set[int | None]) -> None:
        rounds = self.rounds()
        for number in rounds[: -self.keep]:
            if number not in keep:
                shutil.rmtree(self._path(number))


def _contiguous(arrays: Arrays) -> dict[str, AnyArray]:
    # safetensors reads a view's memory as if it were contiguous
    return {name: array.copy(order="C") for name, array in arrays.items()}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
