"""Reading bodies: with a limit, and only as much as was allowed."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from homespun.errors import BadFrame, TooLarge


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises `TooLarge`."""
    _check_length(request, limit)
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > limit:
            raise TooLarge("the body is too large", expected=limit)
        body += chunk
    return bytes(body)


async def read_exactly(request: Request, size: int, timeout_s: float) -> bytearray:
    """A body that must have `size` bytes, into memory of exactly that size.

    Raises `TooLarge`, or `BadFrame` when it is cut short or takes longer than `timeout_s`.
    """
    _check_length(request, size)
    body = bytearray(size)
    filled = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                if filled + len(chunk) > size:
                    raise TooLarge("the report is too large", expected=size)
                body[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
    except TimeoutError as error:
        raise BadFrame("the report took too long", expected=size, got=filled) from error
    except ClientDisconnect as error:
        raise BadFrame("the report is cut short", expected=size, got=filled) from error
    if filled < size:
        raise BadFrame("the report is cut short", expected=size, got=filled)
    return body


def _check_length(request: Request, limit: int) -> None:
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise TooLarge("the body is too large", expected=limit, got=int(length))
