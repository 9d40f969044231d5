"""The step checkpoint: training that was stopped goes on where it was, to the last bit.

One file of the session, replaced atomically: a line of JSON, then the optimizer's state as a safetensors file. It
holds for the rows it was made with; damaged, or for other rows (examples have expired), it is as if it were not there.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from homespun.device.home import remove, storage, write_atomically
from homespun.errors import BadFrame, StorageFailure
from homespun.learning.metrics import MetricSum
from homespun.plan.features import Rows
from homespun.plan.run import Progress
from homespun.tensors.codec import decode_tree, digest, encode_tree
from homespun.types import Hash

KEEP_EVERY_S = 10.0
"""Of processor time: what being killed may cost."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """`rows`: digest of what is trained on; `state`: digest of what follows the header."""

    num_steps: int
    metrics: dict[str, MetricSum]
    rows: Hash
    state: Hash


class StepCheckpoint:
    """The step checkpoint of one training, in the file `path`."""

    def __init__(self, path: Path, rows: Rows) -> None:
        self._path, self._rows = path, _digest(rows)
        self._kept_at = time.process_time()

    def read(self) -> Progress | None:
        """Where an earlier process was; None: at the beginning."""
        with storage(self._path):
            data = self._path.read_bytes() if self._path.exists() else b""
        line, _, state = data.partition(b"\n")
        try:
            header = msgspec.json.decode(line, type=Header)
            if (header.rows, header.state) != (self._rows, digest(state)):
                return None
            return Progress(header.num_steps, decode_tree(state), header.metrics)
        except (msgspec.DecodeError, UnicodeDecodeError, BadFrame):
            return None

    def after_step(self, progress: Progress) -> None:
        """Keep it now and then."""
        if time.process_time() - self._kept_at >= KEEP_EVERY_S:
            self.write(progress)

    def write(self, progress: Progress) -> None:
        """Keep it; a full disk costs the steps since the last time, not the training."""
        state = encode_tree(progress.state)
        header = Header(
            num_steps=progress.num_steps,
            metrics=progress.metrics,
            rows=self._rows,
            state=digest(state),
        )
        with suppress(StorageFailure):
            data = msgspec.json.encode(header) + b"\n" + state
            write_atomically(self._path, data, durable=False)  # its digest tells what a crash broke
        self._kept_at = time.process_time()

    def remove(self) -> None:
        remove(self._path)


def _digest(rows: Rows) -> Hash:
    found = hashlib.sha256()
    for name, array in sorted(rows.items()):
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()
