"""The head of a connection's first request, read before anybody knows whose it is (docs/design.md §10)."""

import re

import trio

#: What a head may be long, and how long it may take; a slower one is cut off.
MAX_HEAD_BYTES = 16 * 1024
HEAD_S = 5.0
READ_BYTES = 16 * 1024
#: An empty line; a bare LF ends a line, too (RFC 9112 section 2.2).
_END = re.compile(rb"\n\r?\n")
#: Who wrote the last such line, and the last address in it, was the proxy that spoke to us.
_FORWARDED_FOR = re.compile(rb"\nx-forwarded-for[ \t]*:([^\r\n]*)", re.IGNORECASE)
_ADDRESS = re.compile(r"[0-9A-Za-z.:\[\]%_-]{1,64}")
_WEBSOCKET = re.compile(rb"\nupgrade[ \t]*:[ \t]*websocket[ \t]*\r?\n", re.IGNORECASE)


class PrefixedStream(trio.abc.HalfCloseableStream):
    """A stream of which something was read already, and is read once more."""

    def __init__(self, stream: trio.abc.Stream, prefix: bytes) -> None:
        #: Named as an `SSLStream` names it, so that `protocol.link.tcp_info` finds the socket.
        self.transport_stream = stream
        self._prefix = prefix

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """What was read already first."""
        if not self._prefix:
            return await self.transport_stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        data = self._prefix[:max_bytes]
        self._prefix = self._prefix[len(data) :]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the stream's."""
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream's."""
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """As the stream's; without effect under TLS, which knows no such thing."""
        if isinstance(self.transport_stream, trio.abc.HalfCloseableStream):
            await self.transport_stream.send_eof()

    async def aclose(self) -> None:
        """As the stream's."""
        await self.transport_stream.aclose()


async def read_head(stream: trio.abc.Stream) -> bytes:
    """What a peer sends first, to the end of the head at least or as much as a head may have.

    Returns:
        Bytes in which `ends` finds a head's end; less where the peer hung up, was too slow or had too much to say.
    """
    head = bytearray()
    with trio.move_on_after(HEAD_S):
        looked_at = 0
        while len(head) < MAX_HEAD_BYTES and not _END.search(head, max(0, looked_at - 3)):
            looked_at = len(head)
            try:
                data = await stream.receive_some(READ_BYTES)
            except trio.BrokenResourceError:
                break
            if not data:
                break
            head += data
            if not head[:1].isalpha():  # TLS, say: there is no head to wait for
                break
    return bytes(head)


def is_complete(head: bytes | bytearray) -> bool:
    """Whether the whole head is there."""
    return _END.search(head) is not None


def split_head(head: bytes) -> tuple[bytes, bytes]:
    """A whole head, without the empty line that ends it, and what came behind it."""
    end = _END.search(head)
    assert end is not None, "only a head that is whole is looked at"
    return head[: end.start()].removesuffix(b"\r"), head[end.end() :]


def needs_answer(head: bytes) -> bool:
    """Whether a head is whole, or so long that somebody should hear of it; who was too slow is cut off."""
    return is_complete(head) or len(head) >= MAX_HEAD_BYTES


def wants_websocket(head: bytes) -> bool:
    """Whether a head asks for a WebSocket; whether it may have one is told by who answers it."""
    end = _END.search(head)
    return end is not None and _WEBSOCKET.search(head, 0, end.end()) is not None


def forwarded_for(head: bytes) -> str | None:
    """The client that a proxy in front names, as its address; None where none is named.

    Only of use where every connection comes through such a proxy: anybody can write this line.
    """
    end = _END.search(head)
    lines = _FORWARDED_FOR.findall(head, 0, end.end() if end is not None else 0)
    return last_address(lines[-1].decode("ascii", "replace")) if lines else None


def last_address(forwarded: str) -> str | None:
    """The last address of an `X-Forwarded-For`: the one before it is only what that client said of itself."""
    address = forwarded.rpartition(",")[2].strip()
    return address if _ADDRESS.fullmatch(address) else None
