"""Failures as answers: every exception of `errors` with its own status, everything else as 500 with a number.

The client of an unexpected failure gets that number and nothing about the inside; the log has the rest under it.
"""

from __future__ import annotations

import secrets

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from homespun.errors import Conflict, HomespunError, NotFound, ProtocolError
from homespun.protocol.problem import MEDIA_TYPE, encode_problem

log = structlog.get_logger()


class InternalError(HomespunError):
    """Something that nobody foresaw. `errors` does not list it: no caller can act on it."""

    code = "internal"
    http_status = 500


class Problems:
    """ASGI middleware that turns what handlers raise into problem documents."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            return  # nobody is left to answer
        except HomespunError as error:
            problem = error
        except Exception as error:
            number = secrets.token_hex(6)
            log.exception("unexpected failure", number=number, path=_route(scope))
            problem = InternalError(
                "something went wrong on the server",
                hint="look for this number in the server's log",
                number=number,
            )
            del error
        else:
            return
        if started:
            raise problem  # the answer is half out: only cutting the connection is honest
        await problem_response(problem)(scope, receive, send)


def problem_response(error: HomespunError) -> Response:
    """The problem document of `error`."""
    return Response(encode_problem(error), error.http_status, media_type=MEDIA_TYPE)


def from_http(_: object, error: Exception) -> Response:
    """What the router itself raises: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return problem_response(NotFound("there is nothing at this path"))
    if error.status_code == 405:
        response = problem_response(Conflict("this path does not take this method"))
        response.status_code = 405
        response.headers.update(error.headers or {})
        return response
    return problem_response(ProtocolError(str(error.detail)))


def _route(scope: Scope) -> str:
    """The route's pattern: paths themselves may hold ids that do not belong in a log."""
    return str(getattr(scope.get("route"), "path", "?"))
