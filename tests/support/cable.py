"""A connection to a relay that a test can cut without either end noticing."""

import attrs
import trio

from protocol.client.address import Address
from protocol.link.connect import connect


@attrs.define(eq=False)
class Cable:
    """A connection to the relay that can be pulled: nothing crosses it from then on, and neither end notices."""

    pulled: bool = False

    async def connect(self, address: Address) -> trio.abc.Stream:
        """Connect; pass it to `open_link`."""
        return CableStream(await connect(address), self)


@attrs.define(eq=False)
class CableStream(trio.abc.Stream):
    """A stream over a `Cable`."""

    stream: trio.abc.Stream
    cable: Cable
    _closed: trio.Event = attrs.field(factory=trio.Event)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.stream.receive_some(max_bytes)
        if self.cable.pulled:
            await self._closed.wait()
            raise trio.ClosedResourceError
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if not self.cable.pulled:
            await self.stream.send_all(data)
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self._closed.set()
        await self.stream.aclose()
