"""A WebSocket client in as few instructions as Python allows: it must cost less than any relay that it loads."""

import base64
import secrets
import socket
import struct
import time
from collections.abc import Callable

from bench.frames import message

RECEIVE_BYTES = 256 * 1024
CONNECT_S = 10.0
PING, PONG, CLOSE = 9, 10, 8

_shared = bytearray(RECEIVE_BYTES)
_view = memoryview(_shared)


class RawSocket:
    """One connection. Blocking until `unblock`; then a poller says when to call `take` and `flush`."""

    def __init__(self, port: int, path: str, subprotocol: str | None = None) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), CONNECT_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.unsent = b""
        #: Called with buffer, begin and end of each message; the buffer is good for the call only.
        self.on_message: Callable[[bytearray, int, int], None] = lambda _buffer, _begin, _end: None
        self._received = bytearray()
        self._shake_hands(port, path, subprotocol)

    def _shake_hands(self, port: int, path: str, subprotocol: str | None) -> None:
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
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())
        while b"\r\n\r\n" not in self._received:
            self._fill()
        head, _, rest = bytes(self._received).partition(b"\r\n\r\n")
        if b" 101 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(f"no upgrade: {head!r}")
        self._received = bytearray(rest)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def unblock(self) -> None:
        """From now on no call waits."""
        self.sock.setblocking(False)

    # -- sending

    def send(self, data: bytes | bytearray) -> None:
        """Send a whole WebSocket message, masked already; what the kernel does not take waits for `flush`."""
        if self.unsent:
            self.unsent += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.unsent = bytes(memoryview(data)[sent:])

    def flush(self) -> None:
        """Send what waits."""
        waiting, self.unsent = self.unsent, b""
        self.send(waiting)

    # -- receiving

    def _fill(self) -> None:
        count = self.sock.recv_into(_shared)
        if not count:
            raise RuntimeError("the relay hung up")
        self._received += _view[:count]

    def take(self) -> None:
        """Read once, and hand out the messages that are whole."""
        try:
            self._fill()
        except BlockingIOError:
            return
        received, at, have = self._received, 0, len(self._received)
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
            if first == 0x82:
                self.on_message(received, begin, at)
            elif first == 0x80 | PING:
                self.send(message(bytes(received[begin:at]), PONG))
            elif first == 0x80 | CLOSE:
                raise RuntimeError(f"the relay closed the connection: {bytes(received[begin:at])!r}")
            else:
                raise RuntimeError(f"an unexpected WebSocket frame: {first:#x}")
        del received[:at]

    def take_until(self, done: Callable[[], bool], timeout_s: float = CONNECT_S) -> None:
        """Read, blocking, until `done`."""
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError("the relay did not answer")
            self.take()
