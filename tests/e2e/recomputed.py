"""What a device must have said: computed once more from its examples and from what is public."""

from __future__ import annotations

import base64
from pathlib import Path

from msgspec.structs import replace

from homespun.device.examples import open_examples
from homespun.device.work import Examples, Work
from homespun.learning.contribution import Contribution
from homespun.protocol.frame import decode_contribution
from homespun.protocol.messages import Assigned, TaskKind
from homespun.server.blobs import LocalBlobs
from homespun.types import Hash
from tests.e2e.processes import CLOCK, Device, Server

MAX_BLOB_BYTES = 2**28


def examples_for(device: Device, kind: TaskKind) -> Examples:
    """Those of its examples that the device would use for this."""
    store = open_examples(device.home, device.home.settings())
    select = store.training if kind is TaskKind.TRAIN else store.held_out
    found = select(CLOCK.now())
    store.close()
    return found


def contribution(
    device: Device, assigned: Assigned, examples: Examples, server: Server, scratch: Path
) -> Contribution:
    """Of this device in this round attempt, in files of an own directory."""
    settings, blobs = device.home.settings(), LocalBlobs(server.data / "blobs", MAX_BLOB_BYTES)
    trusted = tuple(base64.b64decode(key) for key in settings.publisher_keys)
    work = Work(scratch, assigned, trusted)
    scratch.mkdir(parents=True)

    def fetch(address: Hash, path: Path, max_bytes: int) -> bool:
        path.write_bytes(blobs.get(address))
        return True

    assert work.download(fetch)
    assert work.perform(examples, settings.seed, lambda: False) is not None
    return decode_contribution(work.report_file.read_bytes())


def encoded_again(
    device: Device,
    origin: Assigned,
    assigned: Assigned,
    examples: Examples,
    server: Server,
    scratch: Path,
) -> Contribution:
    """Of a device that trained for `origin` and was carried into the round of `assigned`."""
    contribution(device, origin, examples, server, scratch)
    settings = device.home.settings()
    trusted = tuple(base64.b64decode(key) for key in settings.publisher_keys)
    moved = replace(
        origin,
        round_number=assigned.round_number,
        attempt=assigned.attempt,
        encoding=assigned.encoding,
    )
    work = Work(scratch, moved, trusted)
    work.encode_again(assigned.round_number - origin.round_number)
    return decode_contribution(work.report_file.read_bytes())
