"""A stand-in for the socket on which systemd receives a service's notifications."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

PATIENCE_S = 40.0


@attrs.define(eq=False)
class FakeSystemd:
    """The notifications received, message by message; `address` is for `NOTIFY_SOCKET`."""

    address: str
    plain: socket.socket
    sock: trio.socket.SocketType

    async def next(self) -> dict[str, str]:
        """Return the next message as a map of its lines."""
        with trio.fail_after(PATIENCE_S):
            data = await self.sock.recv(65_536)
        return dict(line.split("=", 1) for line in data.decode().split("\n"))

    async def until(self, name: str, words: str = "") -> dict[str, str]:
        """Return the next message whose line `name` contains `words`; skip others."""
        with trio.fail_after(PATIENCE_S):
            while name not in (said := await self.next()) or words not in said[name]:
                pass
        return said

    async def silent(self, seconds: float, name: str) -> None:
        """Check that no message with a line `name` arrives for `seconds`."""
        with trio.move_on_after(seconds):
            await self.until(name)
            raise AssertionError(f"did not expect {name}")

    def drain(self) -> None:
        """Discard the messages received so far."""
        while True:
            try:
                self.plain.recv(65_536)
            except BlockingIOError:
                return


@contextmanager
def fake_systemd(address: str | Path) -> Iterator[FakeSystemd]:
    """Run a fake service manager at `address`, a path or an abstract name that begins with `@`."""
    name = str(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plain:
        plain.bind("\0" + name[1:] if name.startswith("@") else name)
        yield FakeSystemd(name, plain, trio.socket.from_stdlib_socket(plain))
