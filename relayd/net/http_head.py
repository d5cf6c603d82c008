"""Reads the head of a connection's first request, which decides whether it is a WebSocket (docs/design.md §10)."""

import re
from collections.abc import Iterable

import trio

#: Limits of a head's length and of the time until it is complete.
MAX_HEAD_BYTES = 16 * 1024
HEAD_S = 5.0
READ_BYTES = 16 * 1024
#: An empty line; a bare LF also ends a line (RFC 9112 section 2.2).
_END = re.compile(rb"\n\r?\n")
_FORWARDED_FOR = re.compile(rb"\nx-forwarded-for[ \t]*:([^\r\n]*)", re.IGNORECASE)
_BEARER = re.compile(rb"\nauthorization[ \t]*:[ \t]*bearer[ \t]+([^\r\n]*)", re.IGNORECASE)
#: The session of a user, as `relayd.auth.users` makes it.
_SESSION = re.compile(rb"\ncookie[ \t]*:[^\r\n]*?relayd=(rly_s_[A-Za-z0-9_-]+)", re.IGNORECASE)
#: Forward proxies and some clients send a whole URI as the target, which a server must accept (RFC 9112 section 3.2.2).
_ABSOLUTE = re.compile(r"(?:https?|wss?)://(?:[^/?#@]*@)?([^/?#@]+)([^#]*)", re.IGNORECASE)
_WEBSOCKET = re.compile(rb"\nupgrade[ \t]*:[ \t]*websocket[ \t]*\r?\n", re.IGNORECASE)


class PrefixedStream(trio.abc.HalfCloseableStream):
    """A stream that returns bytes that were already read before it returns new ones."""

    def __init__(self, stream: trio.abc.Stream, prefix: bytes) -> None:
        #: Named as an `SSLStream` names it, so that `protocol.link.tcp_info` finds the socket.
        self.transport_stream = stream
        self._prefix = prefix

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive, beginning with the bytes that were already read."""
        if not self._prefix:
            return await self.transport_stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        data = self._prefix[:max_bytes]
        self._prefix = self._prefix[len(data) :]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`; no effect under TLS, which has no half-close."""
        if isinstance(self.transport_stream, trio.abc.HalfCloseableStream):
            await self.transport_stream.send_eof()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        await self.transport_stream.aclose()


async def read_head(stream: trio.abc.Stream) -> bytes:
    """Read the first bytes of a peer until they contain a whole head.

    Returns:
        A head, and possibly bytes behind it. The head is incomplete (see `is_complete`) if the peer hung up or was too
        slow, if the head is too long, or if the bytes cannot be HTTP.
    """
    head = bytearray()
    with trio.move_on_after(HEAD_S):
        searched = 0
        while len(head) < MAX_HEAD_BYTES and not _END.search(head, max(0, searched - 3)):
            searched = len(head)
            try:
                data = await stream.receive_some(READ_BYTES)
            except trio.BrokenResourceError:
                break
            if not data:
                break
            head += data
            if not head[:1].isalpha():  # for example TLS: no head will follow
                break
    return bytes(head)


def is_complete(head: bytes | bytearray) -> bool:
    """Whether `head` contains the end of the head."""
    return _END.search(head) is not None


def split_head(head: bytes) -> tuple[bytes, bytes]:
    """Split a complete head into the head, without the empty line that ends it, and the bytes behind it."""
    end = _END.search(head)
    assert end is not None, "the head must be complete"
    return head[: end.start()].removesuffix(b"\r"), head[end.end() :]


def needs_answer(head: bytes) -> bool:
    """Whether a head is complete, or too long, so that the peer gets an answer; otherwise it is disconnected."""
    return is_complete(head) or len(head) >= MAX_HEAD_BYTES


def wants_websocket(head: bytes) -> bool:
    """Whether a head asks for a WebSocket; whether it gets one is decided later."""
    end = _END.search(head)
    return end is not None and _WEBSOCKET.search(head, 0, end.end()) is not None


def bearer_token(head: bytes) -> str:
    """The token of a head's `Authorization`, else what the cookie of a session holds; "" where there is neither."""
    end = _END.search(head)
    stop = end.end() if end is not None else 0
    found = _BEARER.search(head, 0, stop) or _SESSION.search(head, 0, stop)
    return found[1].strip().decode("latin-1") if found else ""


def token_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """As `bearer_token`, of a head that has been parsed."""
    return bearer_token(b"\n%b\n\n" % b"\n".join(name + b":" + value for name, value in headers))


def split_target(target: str) -> tuple[str, str]:
    """Split a request's target into the authority, which then replaces `Host`, and the path with its query.

    Returns:
        ("", `target`) for a target that is not in absolute form.
    """
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        return "", target
    return match[1], match[2] if match[2].startswith("/") else f"/{match[2]}"


def forwarded_for(head: bytes) -> list[str]:
    """Return the values of the `X-Forwarded-For` headers, which any client can send; see `relayd.net.proxies`."""
    end = _END.search(head)
    lines = _FORWARDED_FOR.findall(head, 0, end.end() if end is not None else 0)
    return [line.decode("ascii", "replace") for line in lines]
