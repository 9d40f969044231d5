"""The seam is a transport: an httpx transport that hands requests to an ASGI application in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx
from starlette.applications import Starlette

T = TypeVar("T")


class InProcess(httpx.BaseTransport):
    """Runs the application on an event loop in a thread of its own, from `__init__` to `stop` or `crash`."""

    def __init__(self, app: Starlette) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._asgi = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._lifespan = app.router.lifespan_context(app)
        self.run(self._lifespan.__aenter__())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the application's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response, body = self.run(self._exchange(request))
        return httpx.Response(response.status_code, headers=response.headers, content=body)

    async def _exchange(self, request: httpx.Request) -> tuple[httpx.Response, bytes]:
        response = await self._asgi.handle_async_request(request)
        return response, await response.aread()

    def stop(self) -> None:
        """As a server stops: everything in order."""
        self.run(self._lifespan.__aexit__(None, None, None))
        self._end()

    def crash(self) -> None:
        """As a process dies: nothing is finished or written any more, apart from what a thread is just doing."""
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(_cancel_all())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
