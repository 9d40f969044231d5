"""Wake-ups for long polls, inside one process: who waits holds a bell, who changes something rings a topic.

Listen first, look second, wait third: a change between looking and waiting has already rung the bell, so none
is missed and nobody polls the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

SCHEDULER = "scheduler"
EVENTS = "events"


def population_topic(name: str) -> str:
    """Offers or releases of a population changed."""
    return f"population {name}"


def round_topic(task_id: str, number: int) -> str:
    """A round of a task moved on."""
    return f"round {task_id} {number}"


def group_topic(group_id: int) -> str:
    """A group asks something new, or is over."""
    return f"group {group_id}"


class Bell:
    """Remembers that it was rung until it is waited for."""

    def __init__(self, closed: bool) -> None:
        self._rung = asyncio.Event()
        self.closed = closed

    def ring(self) -> None:
        self._rung.set()

    def close(self) -> None:
        self.closed = True
        self._rung.set()

    async def wait(self, timeout_s: float) -> bool:
        """True when rung; False after `timeout_s`, or when the server is stopping."""
        if self.closed or timeout_s <= 0:
            return False
        try:
            async with asyncio.timeout(timeout_s):
                await self._rung.wait()
        except TimeoutError:
            return False
        self._rung.clear()
        return not self.closed


class Notices:
    """Topics and the bells on them. Used from the event loop only."""

    def __init__(self) -> None:
        self._bells: dict[str, set[Bell]] = {}
        self._closed = False

    @contextmanager
    def listen(self, topic: str) -> Iterator[Bell]:
        bell = Bell(self._closed)
        bells = self._bells.setdefault(topic, set())
        bells.add(bell)
        try:
            yield bell
        finally:
            bells.discard(bell)
            if not bells and self._bells.get(topic) is bells:
                del self._bells[topic]

    def ring(self, *topics: str) -> None:
        for topic in topics:
            for bell in self._bells.get(topic, ()):
                bell.ring()

    def close(self) -> None:
        """The server is stopping: every wait ends now, and later ones end at once."""
        self._closed = True
        for bells in self._bells.values():
            for bell in bells:
                bell.close()
