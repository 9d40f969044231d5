"""The real command, in a process that dies where a test says, and whose conditions hold while a test says so.

`python -m tests.e2e.drill SCRIPT device run ...`: is killed right after the journal has recorded one of the states in
SCRIPT, which is then struck out. While SCRIPT.in-use exists, somebody uses the device. It asks often whether its report
is still wanted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from homespun.cli.main import main
from homespun.device import wanted
from homespun.device.conditions import ScriptedConditions
from homespun.device.journal import Journal
from homespun.protocol.eligibility import CONDITIONS, Conditions
from homespun.protocol.session import Session, SessionState

MASKED = "masked"
"""For REPORTING once more: after the masked input may have left."""


def in_use(script: Path) -> Path:
    return script.with_suffix(".in-use")


def write(script: Path, states: Iterable[str]) -> None:
    """Replace what is on the script; whoever reads it sees all of the old states or all of the new ones."""
    beside = script.with_suffix(".new")
    beside.write_text("\n".join(states))
    beside.replace(script)


def drill(script: Path) -> None:
    save, finish = Journal.save, Journal.finish

    def die_if_due(state: str) -> None:
        due = script.read_text().split()
        if state in due:
            write(script, (other for other in due if other != state))
            os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die(journal: Journal, session: Session, now: float) -> None:
        save(journal, session, now)
        masked = session.masked and session.state is SessionState.REPORTING
        die_if_due(MASKED if masked else session.state)

    def finish_and_die(journal: Journal, session: Session) -> None:
        finish(journal, session)
        die_if_due(SessionState.WAITING)

    def read(conditions: ScriptedConditions, now: float) -> Conditions:
        return dict.fromkeys(CONDITIONS, not in_use(script).exists())

    wanted.ASK_EVERY_S = 0.5
    Journal.save, Journal.finish = save_and_die, finish_and_die  # type: ignore[method-assign, assignment]
    ScriptedConditions.read = read  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    drill(Path(sys.argv.pop(1)))
    main()
