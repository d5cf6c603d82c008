"""A proxy that treats TCP connections as bad networks do; a `Line` is one path through it, with its controls.

A line forwards whatever connects to its port. The controls act on all of its connections at once:

| control | is like |
| --- | --- |
| `cut("rst")`, `cut("fin")` | a router that resets, a proxy that closes |
| `lose()` | a NAT that has lost its state: data is swallowed permanently, and no FIN passes either |
| `held` | packets are lost and sent again later: nothing passes until then, not even new connections |
| `unplugged` | nobody listens: new connections are reset |
| `delay_s`, `bytes_per_s` | a long distance, a low bandwidth |
| `trickling` | one byte at a time |
| `stop_in_frame()` | like `held`, but beginning in the middle of what is being sent |
"""

import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

import attrs
import trio

_READ_BYTES = 64 * 1024
#: Size of a piece on a throttled line, so that data flows evenly.
_PIECE_BYTES = 512
#: Limits a trickling line to a few thousand bytes a second; without it, a fast loop would not be slow.
_TRICKLE_S = 0.0005

Direction = Literal["up", "down"]
#: Host and port, or the path of a unix socket.
Target = tuple[str, int] | str
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


@attrs.define(eq=False)
class _Pair:
    """One connection: `up` towards the target, `down` back."""

    near: trio.SocketStream
    far: trio.SocketStream
    lost: bool = False

    def reset(self) -> None:
        """Close both ends with RST (SO_LINGER 0; RFC 9293 section 3.6 leaves this to the implementation)."""
        for stream in (self.near, self.far):
            with suppress(OSError):
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.socket.close()

    def finish(self) -> None:
        """Send FIN to both ends; what they still send is dropped."""
        self.lost = True
        for stream in (self.near, self.far):
            with suppress(OSError):
                stream.socket.shutdown(socket.SHUT_WR)


class Line:
    """One path to the target, with its faults; made by `open_line`.

    Args:
        name: for people.
        target: where it leads.
        random: chooses where a frame is cut in two.

    Attributes:
        port: the port to connect to instead, on 127.0.0.1.
        opened: number of connections so far.
        held: directions in which nothing passes now.
    """

    def __init__(self, name: str, target: Target, random: random.Random) -> None:
        self.name = name
        self.target = target
        self.port = 0
        self.opened = 0
        self.unplugged = False
        self.delay_s = 0.0
        self.bytes_per_s = 0.0
        self.trickling = False
        self.held: frozenset[Direction] = frozenset()
        self._random = random
        self._cut_next: frozenset[Direction] = frozenset()
        self._pairs: set[_Pair] = set()
        self._changed = trio.Event()

    @property
    def connections(self) -> int:
        """The number of current connections, including half-open ones."""
        return len(self._pairs)

    # -- controls

    def cut(self, how: Literal["rst", "fin"]) -> int:
        """Cut all connections; returns how many there were."""
        pairs = [pair for pair in self._pairs if not pair.lost]
        for pair in pairs:
            if how == "rst":
                pair.reset()
            else:
                pair.finish()
        self._change()
        return len(pairs)

    def lose(self) -> int:
        """Make all connections half-open permanently; returns how many there were."""
        pairs = [pair for pair in self._pairs if not pair.lost]
        for pair in pairs:
            pair.lost = True
        self._change()
        return len(pairs)

    def hold(self, *directions: Direction) -> None:
        """Let nothing pass in these directions (by default both) until `heal`."""
        self.held = frozenset(directions or ("up", "down"))

    def stop_in_frame(self, *directions: Direction) -> None:
        """Let a part of the next data pass in each direction, and then nothing until `heal`."""
        self._cut_next = frozenset(directions or ("up", "down"))

    def heal(self) -> None:
        """End all faults except cuts and lost connections."""
        self.unplugged = False
        self.delay_s = self.bytes_per_s = 0.0
        self.trickling = False
        self.held = self._cut_next = frozenset()
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # -- forwarding

    async def serve(self, near: trio.SocketStream) -> None:
        """Forward one connection to its end."""
        self.opened += 1
        family = socket.AF_UNIX if isinstance(self.target, str) else socket.AF_INET
        pair = _Pair(near, trio.SocketStream(trio.socket.socket(family)))
        try:
            if self.unplugged:
                pair.reset()
                return
            try:
                await pair.far.socket.connect(self.target)
            except OSError:
                pair.reset()
                return
            self._pairs.add(pair)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, pair, near, pair.far, "up")
                nursery.start_soon(self._pump, pair, pair.far, near, "down")
        finally:
            self._pairs.discard(pair)
            near.socket.close()
            pair.far.socket.close()

    async def _pump(
        self, pair: _Pair, source: trio.SocketStream, sink: trio.SocketStream, direction: Direction
    ) -> None:
        try:
            while data := await source.receive_some(_READ_BYTES):
                await self._pass(pair, sink, bytes(data), direction)
            await self._flowing(pair, direction)
            if not pair.lost:
                await sink.send_eof()
        except _GONE:
            if not pair.lost:  # the other end of a lost connection learns nothing
                pair.reset()

    async def _pass(self, pair: _Pair, sink: trio.SocketStream, data: bytes, direction: Direction) -> None:
        if self.delay_s:
            await trio.sleep(self.delay_s)
        while data:
            await self._flowing(pair, direction)
            if pair.lost:
                return
            size, pause_s = len(data), 0.0
            if direction in self._cut_next:
                size = self._random.randrange(len(data))
                self._cut_next -= {direction}
                self.held |= {direction}
            elif self.trickling:
                size, pause_s = 1, _TRICKLE_S
            elif self.bytes_per_s:
                size = min(size, _PIECE_BYTES)
                pause_s = size / self.bytes_per_s
            await sink.send_all(data[:size])
            data = data[size:]
            if pause_s:
                await trio.sleep(pause_s)

    async def _flowing(self, pair: _Pair, direction: Direction) -> None:
        while direction in self.held and not pair.lost:
            await self._changed.wait()


@asynccontextmanager
async def open_line(name: str, target: Target, random: random.Random) -> AsyncIterator[Line]:
    """Open a line to `target` until the end of the block, where its connections are reset."""
    line = Line(name, target, random)
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        line.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, line.serve, [listener])
        try:
            yield line
        finally:
            line.cut("rst")
            nursery.cancel_scope.cancel()
