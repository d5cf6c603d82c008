"""Connections to relays for whatever is not timed: handshakes, logins, set-up, tear-down; `load.c` does the rest.

Both use the same sockets in turns, so no half-read message may be left when the other takes over (`Connection.settle`).
"""

import abc
import base64
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable

from bench.relay.frames import BINARY, PONG, TEXT, message

RECEIVE_BYTES = 256 * 1024
ANSWER_S = 10.0
_PING, _CLOSE = 9, 8

_shared = bytearray(RECEIVE_BYTES)
_view = memoryview(_shared)


class Connection(abc.ABC):
    """One connection to a relay; methods block only where they say so.

    Args:
        port: on loopback.
        receive_buffer: size of the kernel's receive buffer in bytes; None uses the default.
    """

    #: The protocol's number in `load.c`.
    KIND = 0

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(ANSWER_S)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        #: Called with each complete message.
        self.on_message: Callable[[bytes], None] = lambda _message: None
        self.received = bytearray()

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()

    def wait(self, write: bool = False) -> None:
        """Block until there is something to read, or room to write."""
        poll = select.poll()
        poll.register(self.sock, select.POLLOUT if write else select.POLLIN)
        if not poll.poll(1000 * ANSWER_S):
            raise RuntimeError("the relay did not answer")

    def send(self, data: bytes) -> None:
        """Send bytes, blocking."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                self.wait(write=True)

    def fill(self) -> bool:
        """Read once; returns False if there was nothing to read."""
        try:
            count = self.sock.recv_into(_shared)
        except BlockingIOError:
            return False
        if not count:
            raise RuntimeError("the relay closed the connection")
        self.received += _view[:count]
        return True

    def take(self) -> None:
        """Read once, and pass on the complete messages."""
        if self.fill():
            self.parse()

    @abc.abstractmethod
    def parse(self) -> None:
        """Pass on the complete messages in `received`."""

    def until(self, done: Callable[[], bool]) -> None:
        """Read, blocking, until `done`."""
        deadline = time.monotonic() + ANSWER_S
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError("the relay did not answer")
            self.wait()
            self.take()

    def settle(self) -> None:
        """Read until no incomplete message is left."""
        self.until(lambda: not self.received)


class WebSocket(Connection):
    """A WebSocket connection; text messages are passed on like binary ones."""

    def __init__(self, port: int, path: str, subprotocol: str | None = None, receive_buffer: int | None = None) -> None:
        super().__init__(port, receive_buffer)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
        ]
        if subprotocol:
            lines.append(f"Sec-WebSocket-Protocol: {subprotocol}")
        self.send("\r\n".join([*lines, "", ""]).encode())
        while b"\r\n\r\n" not in self.received:
            self.fill()
        head, _, rest = bytes(self.received).partition(b"\r\n\r\n")
        if b" 101 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(f"no upgrade: {head!r}")
        self.received = bytearray(rest)
        self.sock.setblocking(False)

    def parse(self) -> None:
        """See `Connection`."""
        received, at, have = self.received, 0, len(self.received)
        while have - at >= 2:
            first, size, begin = received[at], received[at + 1], at + 2
            if size == 126:
                if have - at < 4:
                    break
                size, begin = struct.unpack_from(">H", received, begin)[0], at + 4
            elif size == 127:
                if have - at < 10:
                    break
                size, begin = struct.unpack_from(">Q", received, begin)[0], at + 10
            if begin + size > have:
                break
            at = begin + size
            self._handle_frame(first, bytes(received[begin:at]))
        del received[:at]

    def _handle_frame(self, first: int, data: bytes) -> None:
        if first == 0x80 | TEXT and data == b"2":  # Engine.IO's ping
            self.send(message(b"3", TEXT))
        elif first in (0x80 | TEXT, 0x80 | BINARY):
            self.on_message(data)
        elif first == 0x80 | _PING:
            self.send(message(data, PONG))
        elif first == 0x80 | _CLOSE:
            raise RuntimeError(f"the relay closed the connection: {data!r}")
        elif first != 0x80 | PONG:
            raise RuntimeError(f"an unexpected WebSocket frame: {first:#x}")


class NatsLine(Connection):
    """A client of nats-server: https://docs.nats.io/reference/reference-protocols/nats-protocol."""

    KIND = 1

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.sock.setblocking(False)
        self._pongs = 0
        self.send(b'CONNECT {"verbose":false,"pedantic":false,"lang":"bench"}\r\n')
        self.ask(b"")

    def ask(self, command: bytes) -> None:
        """Send a command and wait, blocking, until the server has carried it out."""
        before = self._pongs
        self.send(command + b"PING\r\n")
        self.until(lambda: self._pongs > before)

    def parse(self) -> None:
        """See `Connection`."""
        while (end := self.received.find(b"\r\n")) >= 0:
            line = bytes(self.received[:end])
            del self.received[: end + 2]
            if line == b"PING":
                self.send(b"PONG\r\n")
            elif line == b"PONG":
                self._pongs += 1
            elif not line.startswith((b"INFO", b"+OK")):
                raise RuntimeError(f"the relay sent {line!r}")


class Tcp(Connection):
    """One end of a connection through a TCP proxy, which does not know what it carries."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.sock.setblocking(False)

    @classmethod
    def of_socket(cls, sock: socket.socket) -> "Tcp":
        """Wrap the other end, which has been accepted already."""
        end = cls.__new__(cls)
        end.sock, end.received, end.on_message = sock, bytearray(), lambda _message: None
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return end

    def parse(self) -> None:
        """See `Connection`."""
        raise RuntimeError(f"the proxy sent {bytes(self.received)!r}")
