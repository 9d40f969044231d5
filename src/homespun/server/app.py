"""The server's front: the ASGI application, and the process that serves it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from homespun import __version__
from homespun.clock import Clock, SystemClock
from homespun.errors import InvalidConfig, StorageFailure
from homespun.server.api.device import DeviceApi
from homespun.server.api.operator import OperatorApi
from homespun.server.api.problems import Problems, from_http
from homespun.server.deployment import Deployment, lock_directory, open_deployment
from homespun.server.settings import Settings

_STOPPING = (signal.SIGINT, signal.SIGTERM)
READY_FILE = "server.json"
"""In the data directory while the server is up: its URL and process id."""


def create_app(settings: Settings, clock: Clock) -> Starlette:
    """The application over one data directory, which is made if needed; `app.state.deployment` is its inside.

    Raises `InvalidConfig` or `StorageFailure` when the data directory cannot be used.
    """
    deployment = open_deployment(settings, clock)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(deployment.scheduler.run(settings.tick_s))
        try:
            yield
        finally:
            deployment.notices.close()
            await running
            await deployment.intake.drain()
            await deployment.groups.drain()
            with suppress(StorageFailure):  # what was saved a minute ago will do
                deployment.paces.save()
            deployment.store.close()

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "version": __version__})

    app = Starlette(
        routes=[
            Route("/v1/health", health),
            *DeviceApi(deployment).routes(),
            Mount("/v1/operator", OperatorApi(deployment).app()),
        ],
        middleware=[Middleware(Problems)],
        exception_handlers={HTTPException: from_http},
        lifespan=lifespan,
    )
    app.state.deployment = deployment
    return app


def serve(settings: Settings, on_ready: Callable[[str], None] = print) -> None:
    """Run until SIGINT or SIGTERM. `on_ready` gets one line once requests are answered.

    Raises `InvalidConfig` when the address is in use, the data directory is another server's or cannot be
    written; `StorageFailure` when what is in it is damaged or the disk is full.
    """
    _configure_logging()
    lock = lock_directory(settings.data_dir)
    listener = _listen(settings.host, settings.port)
    try:
        app = create_app(settings, SystemClock())
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        ready = settings.data_dir / READY_FILE
        server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=10,
            ),
            app.state.deployment,
            lambda: _announce(ready, url, on_ready),
        )
        try:
            server.run(sockets=[listener])
        finally:
            ready.unlink(missing_ok=True)
    finally:
        listener.close()
        os.close(lock)


class _Server(uvicorn.Server):
    """Says when it is ready, and lets long polls go before it waits for requests to end."""

    def __init__(
        self, config: uvicorn.Config, deployment: Deployment, announce: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._deployment = deployment
        self._announce = announce

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the server in good order, and are then done with."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._deployment.notices.close()
        await super().shutdown(sockets)


def _announce(ready: Path, url: str, on_ready: Callable[[str], None]) -> None:
    temporary = ready.with_suffix(".part")
    temporary.write_text(json.dumps({"url": url, "pid": os.getpid()}) + "\n", encoding="utf-8")
    temporary.replace(ready)
    on_ready(f"Homespun server ready at {url}")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `InvalidConfig` when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Without the protocol's number, asyncio would leave Nagle's algorithm on: 40 ms per answer.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise InvalidConfig(f"cannot listen on {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise InvalidConfig(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="another program uses this port? choose another with --port",
            port=port,
        ) from error
    return listener


def _configure_logging() -> None:
    """Plain lines on standard error: what happened to rounds and releases, never bodies or tokens."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s"
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
