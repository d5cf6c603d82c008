"""A client's socket whose reading a test stops, slows down and resumes."""

import socket

import attrs
import trio

from protocol.client.address import Address
from protocol.link.connect import connect


@attrs.define(eq=False)
class Tap:
    """What a client reads from its socket: nothing while closed; `lump` bytes each `pause_s` while that is set."""

    lump: int = 65_536
    pause_s: float = 0.0
    opened: trio.Event = attrs.field(factory=trio.Event)

    def close(self) -> None:
        self.opened = trio.Event()

    def open(self) -> None:
        self.opened.set()

    async def connect(self, address: Address) -> trio.abc.Stream:
        """For `open_link`; the kernel's receive buffer of a TCP socket is kept small."""
        self.open()
        if address.kind != "tcp":
            return TapStream(await connect(address), self)
        sock = trio.socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
        await sock.connect((address.host, address.port))
        return TapStream(trio.SocketStream(sock), self)


@attrs.define(eq=False)
class TapStream(trio.abc.Stream):
    """A stream behind a `Tap`."""

    stream: trio.abc.Stream
    tap: Tap

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        await self.tap.opened.wait()
        await trio.sleep(self.tap.pause_s)
        return await self.stream.receive_some(min(self.tap.lump, max_bytes or self.tap.lump))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self.tap.open()
        await self.stream.aclose()
