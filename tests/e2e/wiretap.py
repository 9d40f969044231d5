"""A wiretap: a TCP relay between devices and a server that keeps every byte, and can hold some back."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Conversation:
    """One connection: the bytes in both directions."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class Said:
    """One HTTP/1.1 message: its first line in three words, headers by lower-case name, body."""

    line: tuple[str, str, str]
    headers: dict[str, str]
    body: bytes


class Wiretap(socketserver.ThreadingTCPServer):
    """Relays to `port` of this machine. `before` sees what goes up before it is passed on, and may block."""

    def __init__(self, port: int, before: Callable[[bytes], None] = lambda data: None) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.port, self.before = port, before
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.conversations: list[Conversation] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        """Devices and server have to be gone."""
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Relay(socketserver.BaseRequestHandler):
    server: Wiretap
    request: socket.socket

    def handle(self) -> None:
        try:
            target = socket.create_connection(("127.0.0.1", self.server.port))
        except OSError:
            return  # the server is away: the device sees a connection that breaks
        conversation = Conversation()
        self.server.conversations.append(conversation)
        with target:
            back = threading.Thread(
                target=_pump, args=(target, self.request, conversation.down, lambda data: None)
            )
            back.start()
            _pump(self.request, target, conversation.up, self.server.before)
            back.join()


def _pump(
    source: socket.socket,
    target: socket.socket,
    kept: bytearray,
    before: Callable[[bytes], None],
) -> None:
    """Until either side is gone; then both are."""
    try:
        while data := source.recv(65536):
            kept += data
            before(data)
            target.sendall(data)
    except OSError:
        pass
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # it is gone already


def said(stream: bytes | bytearray) -> Iterator[Said]:
    """The messages of one direction; one that was cut short is left out."""
    rest = bytes(stream)
    while rest:
        head, end, rest = rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        headers = {
            name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)
        }
        assert "transfer-encoding" not in headers, "every length is known beforehand"
        length = int(headers.get("content-length", "0"))
        if not end or len(rest) < length:
            return
        one, two, three = first.split(" ", 2)
        yield Said((one, two, three), headers, rest[:length])
        rest = rest[length:]


def exchanges(conversation: Conversation) -> Iterator[tuple[Said, Said | None]]:
    """Every request with its answer, which is missing where the connection ended first."""
    answers = said(conversation.down)
    for request in said(conversation.up):
        yield request, next(answers, None)
