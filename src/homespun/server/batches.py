"""Batches: what arrives at about the same time becomes durable together, and only then is anybody told."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from homespun.errors import HomespunError
from homespun.server.settings import Settings

T = TypeVar("T")
R = TypeVar("R")

log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[T, R]):
    item: T
    done: asyncio.Future[R]


class Batches(Generic[T, R]):
    """Calls `commit` with what came within `batch_s`, at most `batch_size` items, one call at a time.

    `commit` gives a result or an error for each item, or raises one for all of them.
    """

    def __init__(
        self,
        commit: Callable[[list[T]], Awaitable[Sequence[R | HomespunError]]],
        settings: Settings,
    ) -> None:
        self._commit = commit
        self._wait_s, self._size = settings.batch_s, settings.batch_size
        self._queue: deque[_Waiting[T, R]] = deque()
        self._full = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def add(self, item: T) -> R:
        """The item's result, when it is durable. Raises what `commit` said of it."""
        waiting = _Waiting[T, R](item, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if len(self._queue) >= self._size:
            self._full.set()
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await waiting.done

    async def drain(self) -> None:
        """Wait for what is under way."""
        if self._worker is not None:
            await self._worker

    async def _work(self) -> None:
        while self._queue:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s):
                    await self._full.wait()
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._size))]
            if len(self._queue) < self._size:
                self._full.clear()
            results: Sequence[R | Exception]
            try:
                results = await self._commit([waiting.item for waiting in batch])
            except HomespunError as error:
                log.warning("a batch was not taken", reason=error.message)
                results = [error] * len(batch)
            except Exception as error:  # the worker must go on; everybody who waits learns of it
                log.exception("a batch was not taken")
                results = [error] * len(batch)
            for waiting, result in zip(batch, results, strict=True):
                if waiting.done.done():  # whoever waited has gone
                    continue
                if isinstance(result, Exception):
                    waiting.done.set_exception(result)
                else:
                    waiting.done.set_result(result)
        self._worker = None
