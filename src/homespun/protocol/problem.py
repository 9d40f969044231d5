"""Failures on the wire: RFC 9457 problem documents, made from and turned back into `homespun.errors`.

{"type": "urn:homespun:expired", "title": "expired", "status": 410, "detail": "...", "code": "expired",
 "hint": "...", "details": {...}}
"""

from __future__ import annotations

import msgspec

from homespun import errors
from homespun.errors import HomespunError

MEDIA_TYPE = "application/problem+json"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Unknown members are ignored, as RFC 9457 section 3.2 asks."""

    status: int
    code: str
    detail: str = ""
    hint: str = ""
    details: dict[str, str | int | float | bool | None] = {}
    type: str = ""
    title: str = ""


def _classes(root: type[HomespunError]) -> dict[str, type[HomespunError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _classes(child)
    return found


CODES = _classes(errors.HomespunError)
"""Every stable code and its exception."""


def encode_problem(error: HomespunError) -> bytes:
    """The problem document of `error`, as JSON."""
    problem = Problem(
        type=f"urn:homespun:{error.code}",
        title=error.code.replace("_", " "),
        status=error.http_status,
        detail=error.message,
        code=error.code,
        hint=error.hint,
        details=error.details,
    )
    return msgspec.json.encode(problem)


def error_from_problem(status: int, body: bytes) -> HomespunError:
    """The exception that a peer's answer stands for, whatever its body holds."""
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return HomespunError(f"the server answered {status} without saying why", status=status)
    kind = CODES.get(problem.code, HomespunError)
    error = kind(problem.detail or problem.code, hint=problem.hint)
    error.details.update(
        problem.details
    )  # not as keywords: a peer may name one "message" or "self"
    return error
