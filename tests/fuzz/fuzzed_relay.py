"""A real relay in a process of its own, and blocking connections to its unix socket, for fuzzers that know no loop."""

import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from protocol.link.websocket_frames import BINARY, Close, Fault, Parser, make_frame
from protocol.wire.codec import unpack
from protocol.wire.messages import PATH, SUBPROTOCOL

#: For an answer, on a busy machine.
ANSWER_S = 20.0
START_S = 60.0
_CONFIG = """\
listen = ""
state_dir = "{folder}/state"

[log]
format = "json"

[limits]
worker_grace_s = 0.2
resume_window_s = 0.2

[limits.principal]
requests_per_s = 1e6

[results]
retain_s = 5.0

[wyoming]
listen = "127.0.0.1:0"

[spaces.tts]
"""
#: The head of a handshake; the key is the RFC's.
UPGRADE = (
    f"GET {PATH} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
).encode()


@attrs.define(eq=False)
class Socket:
    """A WebSocket, of a client that waits for nothing."""

    connection: socket.socket
    parser: Parser = attrs.field(factory=lambda: Parser(masked=False, max_message_bytes=16 << 20))
    over: bool = False

    def say(self, message: bytes) -> None:
        """Send a message, unless the relay has hung up."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.sendall(make_frame(BINARY, message, masked=True))

    def hear_pong(self) -> None:
        """Read to the answer of a ping, or to the end."""
        while True:
            try:
                data = self.connection.recv(65536)
            except ConnectionResetError:
                return
            if not data:
                return
            self.parser.feed(data)
            for event in self.parser.pop_events():
                assert not isinstance(event, Fault), event
                if isinstance(event, Close) or (isinstance(event, bytes) and unpack(event)["type"] == "pong"):
                    return


@attrs.define(eq=False)
class FuzzedRelay:
    """A relay that others fuzz."""

    path: str
    process: subprocess.Popen[bytes]
    log: Path
    #: Ports of the Wyoming protocol.
    doors: list[str] = attrs.field(factory=list)
    _read: int = 0

    def connect(self) -> socket.socket:
        """A connection, with a limit for each operation."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(ANSWER_S)
        connection.connect(self.path)
        return connection

    def connect_wyoming(self) -> socket.socket:
        """A connection of the Wyoming protocol."""
        return socket.create_connection(("127.0.0.1", int(self.doors[0])), ANSWER_S)

    def upgrade(self, connection: socket.socket) -> Socket:
        """Shake hands as a WebSocket client."""
        connection.sendall(UPGRADE)
        heard = b""
        while b"\r\n\r\n" not in heard:
            more = connection.recv(65536)
            assert more, heard
            heard += more
        head, _, rest = heard.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101"), head
        made = Socket(connection)
        made.parser.feed(rest)
        return made

    def hear_all(self, connection: socket.socket) -> bytes:
        """All that the relay sends until it hangs up."""
        heard = b""
        with suppress(ConnectionResetError):
            while data := connection.recv(65536):
                heard += data
        return heard

    def check(self) -> None:
        """Raise if the relay is gone, or has logged an error."""
        assert self.process.poll() is None, f"the relay ended with {self.process.returncode}: {self.log.read_text()}"
        with self.log.open("rb") as log:
            log.seek(self._read)
            told = log.read()
        told = told[: told.rfind(b"\n") + 1]  # the relay may be in the middle of a line
        self._read += len(told)
        wrong = [
            line for line in told.splitlines() if b'"level": "info"' not in line and b'"level": "warning"' not in line
        ]
        assert not wrong, b"\n".join(wrong[:30]).decode("utf-8", "replace")


@contextmanager
def open_relay() -> Iterator[FuzzedRelay]:
    """A relay that serves until the end of the block; anything wrong at its end is raised."""
    with tempfile.TemporaryDirectory(prefix="relayd-fuzz-") as name:
        folder = Path(name)
        (folder / "relayd.toml").write_text(_CONFIG.format(folder=folder))
        log = folder / "log"
        command = [sys.executable, "-m", "relayd.cli", "serve", "--config", str(folder / "relayd.toml")]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stderr=stderr, cwd=Path(__file__).parents[2])
        relay = FuzzedRelay(str(folder / "state/relayd.sock"), process, log)
        try:
            until = time.monotonic() + START_S
            while b'"event": "listening"' not in log.read_bytes():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, f"no relay after {START_S:g} s: {log.read_text()}"
                time.sleep(0.05)
            relay.doors = re.findall(r"tcp://[0-9.]+:([0-9]+)", log.read_text())
            yield relay
            relay.check()
        finally:
            process.kill()
            process.wait()
