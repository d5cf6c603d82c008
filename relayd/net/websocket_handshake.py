"""The relay's side of a WebSocket handshake (RFC 6455 section 4.2); `http_head` has read its head. Pure."""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping

import attrs

#: RFC 6455 section 1.3.
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY_BYTES = 16
#: RFC 9110 section 5.6.2.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: A bare LF ends a line, too (RFC 9112 section 2.2).
_LINE_END = re.compile(r"\r?\n")
_REASONS = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


@attrs.frozen
class HandshakeRejected(Exception):
    """No: an HTTP status and words for the peer, who is hung up on."""

    status: int
    words: str
    headers: Mapping[str, str] = attrs.field(factory=dict)

    def to_bytes(self) -> bytes:
        """As it goes out."""
        body = f"{self.words}\n".encode()
        lines = [
            f"HTTP/1.1 {self.status} {_REASONS[self.status]}",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + body


@attrs.frozen
class Head:
    """Of a request.

    Args:
        method: as sent.
        target: path and query, as sent.
        version: `HTTP/1.1`.
        headers: lower-case name -> value; of several with one name the values are joined by ", ".
    """

    method: str
    target: str
    version: str
    headers: dict[str, str]

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    def get(self, name: str) -> str:
        """A header's value, "" where there is none."""
        return self.headers.get(name, "")

    def has_token(self, name: str, word: str) -> bool:
        """Whether a header that is a list has a word, upper or lower case."""
        return any(each.strip().lower() == word for each in self.get(name).split(","))

    @property
    def upgrades(self) -> bool:
        """Whether it asks for a WebSocket."""
        return self.has_token("upgrade", "websocket")


def parse_head(data: bytes) -> Head:
    """The head in `data`, without what ends it.

    Raises:
        HandshakeRejected: it is none.
    """
    lines = _LINE_END.split(data.decode("latin-1"))
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/") or not _TOKEN.fullmatch(words[0]):
        raise HandshakeRejected(400, "this is not HTTP")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name):
            raise HandshakeRejected(400, "a header line of the request is broken")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Head(words[0], words[1], words[2], headers)


def check_upgrade(head: Head, subprotocol: str | None) -> None:
    """Hold a handshake to section 4.2.1.

    Args:
        head: of a request that is to become a WebSocket.
        subprotocol: that it must offer; None takes any and none.

    Raises:
        HandshakeRejected: it may not become one.
    """
    if head.version != "HTTP/1.1":
        raise HandshakeRejected(505, "a WebSocket needs HTTP/1.1")
    if head.method != "GET":
        raise HandshakeRejected(405, "a WebSocket is asked for with GET", {"Allow": "GET"})
    upgrade = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    if not head.upgrades or not head.has_token("connection", "upgrade"):
        raise HandshakeRejected(426, "this path is for WebSockets", upgrade)
    if head.get("sec-websocket-version") != "13":
        raise HandshakeRejected(426, "the version of a WebSocket must be 13", upgrade)
    if not head.get("host"):
        raise HandshakeRejected(400, "the request lacks its Host")
    if not _is_key(head.get("sec-websocket-key")):
        raise HandshakeRejected(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    offered = [each.strip() for each in head.get("sec-websocket-protocol").split(",")]
    if subprotocol is not None and subprotocol not in offered:
        raise HandshakeRejected(400, f"ask for the WebSocket subprotocol {subprotocol}")


def build_response(head: Head, subprotocol: str | None) -> bytes:
    """The relay's yes to a handshake that `check_upgrade` let through."""
    digest = hashlib.sha1(head.get("sec-websocket-key").encode() + _GUID, usedforsecurity=False).digest()
    chosen = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}\r\n{chosen}\r\n"
    ).encode()


def _is_key(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == _KEY_BYTES
    except (binascii.Error, ValueError):
        return False
