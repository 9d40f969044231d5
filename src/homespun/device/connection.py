"""The device's side of HTTP: every request signed, every failure one of `homespun.errors`, every byte counted.

All endpoints are idempotent, so a request whose connection broke is repeated at once, twice at most; a
server that stays away is `Unreachable`, and when to come back is the runtime's to decide. Answers are read
up to a limit, downloads go to a file and must have the hash they were asked for.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from homespun.clock import Clock
from homespun.device.home import TEMPORARY, storage
from homespun.device.identity import Identity
from homespun.device.stopping import Stop
from homespun.errors import (
    BadFrame,
    HomespunError,
    InvalidConfig,
    NotAuthentic,
    NotFound,
    TooLarge,
    Unreachable,
)
from homespun.protocol import messages
from homespun.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    Assigned,
    CheckIn,
    CheckInReply,
    Claim,
    ClaimReply,
    Enroll,
    Enrolled,
    GroupReply,
    Receipt,
    SignedRelease,
)
from homespun.protocol.problem import error_from_problem
from homespun.protocol.signing import request_headers
from homespun.types import Hash

TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 5.0
PAUSES_S = (0.1, 0.5)
"""Before the second and the third try of a request whose connection broke."""
MAX_REPLY_BYTES = 4 * 2**20

M = TypeVar("M")

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)


def http_client(server: str) -> httpx.Client:
    """An HTTP client for `server`, an URL. Raises `InvalidConfig`."""
    url = urlsplit(server)
    if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/"):
        raise InvalidConfig(
            f"{server!r} is not the address of a server", hint="write it like http://127.0.0.1:8080"
        )
    return httpx.Client(
        base_url=server,
        headers={"User-Agent": f"homespun/{PROTOCOL_VERSION}"},  # the same for every device
        verify=url.scheme == "https",  # without TLS there are no certificates to load
        trust_env=url.hostname not in _LOOPBACK,  # no proxy leads to this machine
    )


class Connection:
    """One device's requests. `bytes_up` and `bytes_down` count bodies since the last `take_traffic`."""

    def __init__(
        self, client: httpx.Client, identity: Identity, clock: Clock, stop: Stop | None = None
    ) -> None:
        self._client, self.identity, self._clock = client, identity, clock
        self._stop = stop or Stop()
        self._skew_s = 0.0
        self._bytes_up = self._bytes_down = 0

    def take_traffic(self) -> tuple[int, int]:
        """Bytes (up, down) of bodies since the last call."""
        counted = self._bytes_up, self._bytes_down
        self._bytes_up = self._bytes_down = 0
        return counted

    def enroll(self, population: str, token: str) -> Enrolled:
        public_key = base64.b64encode(self.identity.public_key).decode()
        message = Enroll(population=population, token=token, public_key=public_key)
        return self._call(Enrolled, "POST", "/v1/enroll", messages.encode(message))

    def check_in(self, message: CheckIn) -> CheckInReply:
        body = messages.encode(message)
        return self._call(CheckInReply, "POST", "/v1/check-in", body, wait_s=message.wait_s)

    def claim(self, message: Claim) -> ClaimReply:
        body = messages.encode(message)
        return self._call(ClaimReply, "POST", "/v1/claim", body, wait_s=message.wait_s)

    def report(self, assigned: Assigned, body: bytes) -> Receipt:
        return self._call(Receipt, "PUT", f"{_assignment(assigned.assignment_id)}/report", body)

    def group(self, assigned: Assigned, wait_s: float) -> GroupReply:
        """What the device's group asks of it next; the server may hold the answer for `wait_s`."""
        path = f"{_assignment(assigned.assignment_id)}/group"
        return self._call(GroupReply, "GET", path, wait_s=wait_s)

    def answer_group(self, assigned: Assigned, step: str, body: bytes, wait_s: float) -> GroupReply:
        """Answer one step; the answer to that is what is asked next."""
        path = f"{_assignment(assigned.assignment_id)}/group/{step}"
        return self._call(GroupReply, "PUT", path, body, wait_s)

    def receipt(self, assignment_id: str) -> Receipt:
        return self._call(Receipt, "GET", _assignment(assignment_id))

    def glance(self, assigned: Assigned) -> Receipt:
        """`receipt` in one quick try, which may run in another thread."""
        path = _assignment(assigned.assignment_id)
        return messages.decode(self._exchange("GET", path, b"", 5.0, {}), Receipt)

    def abort(self, assigned: Assigned) -> Receipt:
        """Give up, in one quick try: the device may be stopping."""
        body = messages.encode(Abort(assignment_id=assigned.assignment_id))
        path = f"{_assignment(assigned.assignment_id)}/abort"
        return messages.decode(self._exchange("POST", path, body, 1.0, {}), Receipt)

    def release(self, population: str, slot: str) -> SignedRelease:
        """The newest release of a slot, whichever share of the devices it is for."""
        return self._call(SignedRelease, "GET", _release(population, slot))

    def deployed(self, population: str, slot: str) -> SignedRelease | None:
        """The newest release of a slot that is for every device; None before there is one."""
        try:
            return self._call(SignedRelease, "GET", f"{_release(population, slot)}/deployed")
        except NotFound:
            return None

    def fetch(
        self, address: Hash, path: Path, max_bytes: int, should_stop: Callable[[], bool]
    ) -> bool:
        """Download the blob `address` into `path`; False if `should_stop` ended it.

        A broken download goes on where it was, now or at the next call. Raises `BadFrame` for content that
        was not asked for, `TooLarge` beyond `max_bytes`, `StorageFailure`, and what any request raises.
        """
        partial = path.with_name(path.name + TEMPORARY)
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not self._repeated(lambda: self._download(address, partial, max_bytes, should_stop)):
            return False
        with storage(path):
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != address:
                partial.unlink()
                raise BadFrame(
                    "a download is not what was asked for",
                    hint="it was damaged on the way; it will be fetched again",
                    expected=address,
                    got=found,
                )
            partial.replace(path)
        return True

    def _download(
        self, address: Hash, partial: Path, max_bytes: int, should_stop: Callable[[], bool]
    ) -> bool:
        with storage(partial):
            have = partial.stat().st_size if partial.exists() else 0
        ask = {"Range": f"bytes={have}-"} if have else {}
        with self._stream("GET", f"/v1/blobs/{address}", b"", TIMEOUT_S, ask) as response:
            if response.status_code != httpx.codes.PARTIAL_CONTENT:
                have = 0
            with storage(partial), partial.open("ab" if have else "wb") as file:
                for chunk in self._chunks(response, max_bytes - have):
                    if should_stop():
                        return False
                    file.write(chunk)
        return True

    def _call(
        self, kind: type[M] | Any, method: str, path: str, body: bytes = b"", wait_s: float = 0.0
    ) -> M:
        # RFC 7240, section 4.3. Where the message has a `wait_s` of its own it says the same.
        headers = {"Prefer": f"wait={int(wait_s)}"} if wait_s else {}
        timeout_s = wait_s + TIMEOUT_S
        reply = self._repeated(lambda: self._exchange(method, path, body, timeout_s, headers))
        message: M = messages.decode(reply, kind)
        return message

    def _repeated(self, once: Callable[[], M]) -> M:
        """Try again at once when the connection broke."""
        pauses = iter(PAUSES_S)
        while True:
            try:
                with self._stop.interruptible():
                    return self._in_time(once)
            except Unreachable as error:
                pause = next(pauses, None)
                if pause is None or not isinstance(error.__cause__, _BROKEN):
                    raise
            with self._stop.interruptible():
                self._clock.sleep(pause)

    def _in_time(self, once: Callable[[], M]) -> M:
        """Once more when the server says that it is our clock which is wrong, with its time."""
        try:
            return once()
        except NotAuthentic as error:
            server_time = error.details.get("server_time")
            if not isinstance(server_time, int | float):
                raise
            self._skew_s = server_time - self._clock.now()
        return once()

    def _exchange(
        self, method: str, path: str, body: bytes, timeout_s: float, headers: Mapping[str, str]
    ) -> bytes:
        with self._stream(method, path, body, timeout_s, headers) as response:
            return b"".join(self._chunks(response, MAX_REPLY_BYTES))

    @contextmanager
    def _stream(
        self, method: str, path: str, body: bytes, timeout_s: float, headers: Mapping[str, str]
    ) -> Iterator[httpx.Response]:
        """Send one signed request and give its answer, if it is a good one."""
        signed = request_headers(
            self.identity,
            self.identity.device_id,
            method,
            path,
            self._clock.now() + self._skew_s,
            body,
        )
        timeout = httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
        try:
            with self._client.stream(
                method, path, content=body, headers={**headers, **signed}, timeout=timeout
            ) as response:
                self._bytes_up += len(body)
                if not response.is_success:
                    problem = b"".join(self._chunks(response, MAX_REPLY_BYTES))
                    raise _refusal(response.status_code, problem)
                yield response
        except httpx.RequestError as error:
            raise Unreachable(
                f"the server at {self._client.base_url} does not answer: {str(error) or type(error).__name__}",
                hint="check the address and the network; a running device comes back by itself",
            ) from error

    def _chunks(self, response: httpx.Response, max_bytes: int) -> Iterator[bytes]:
        for chunk in response.iter_bytes():
            self._bytes_down += len(chunk)
            max_bytes -= len(chunk)
            if max_bytes < 0:
                raise TooLarge("the server's answer is larger than it may be")
            yield chunk


def _refusal(status: int, body: bytes) -> HomespunError:
    error = error_from_problem(status, body)
    if status >= httpx.codes.INTERNAL_SERVER_ERROR or status == httpx.codes.TOO_MANY_REQUESTS:
        return Unreachable(f"the server cannot answer now: {error.message}", status=status)
    return error


def _assignment(assignment_id: str) -> str:
    return f"/v1/assignments/{quote(assignment_id, safe='')}"


def _release(population: str, slot: str) -> str:
    return f"/v1/releases/{quote(population, safe='')}/{quote(slot, safe='')}"
