"""What a device does beside its sessions, whenever it has checked in: releases and receipts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from homespun.device.connection import Connection
from homespun.device.journal import Journal
from homespun.device.models import Models, Trial
from homespun.errors import HomespunError, NotFound
from homespun.protocol.messages import ReleaseNotice, ReportState
from homespun.types import Hash


def fetch_releases(
    notices: Sequence[ReleaseNotice],
    models: Models,
    connection: Connection,
    population: str,
    trial: Trial,
    should_stop: Callable[[], bool],
) -> list[str]:
    """Serve what is newer than what is served; the problems with releases that cannot be, which change nothing."""
    models.settle()

    def fetch(address: Hash, path: Path, max_bytes: int) -> bool:
        return connection.fetch(address, path, max_bytes, should_stop)

    problems = []
    for notice in notices:
        if notice.sequence > models.sequence(notice.slot):
            try:
                signed = connection.release(population, notice.slot)
                deployed = partial(connection.deployed, population, notice.slot)
                models.install(notice.slot, signed, fetch, deployed, trial)
            except HomespunError as error:
                problems.append(f"release {notice.sequence} of {notice.slot}: {error.message}")
    return problems


def resolve_receipts(journal: Journal, connection: Connection) -> None:
    """Ask what became of acknowledged reports: INCLUDED in a checkpoint, or VOID; never silence."""
    for session_id, assignment_id in journal.unresolved():
        try:
            receipt = connection.receipt(assignment_id)
        except NotFound as error:
            journal.resolve(session_id, "unknown", reason=error.message)
            continue
        if receipt.state is not ReportState.ACKNOWLEDGED:
            journal.resolve(session_id, str(receipt.state), receipt.checkpoint, receipt.reason)
