"""The relay's side of a WebSocket handshake (RFC 6455 section 4.2); `http_head` has read its head. Pure."""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping

import attrs

from relayd.net.http_head import split_target

#: RFC 6455 section 1.3.
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY_BYTES = 16
#: RFC 9110 section 5.6.2.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: A bare LF also ends a line (RFC 9112 section 2.2).
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
    """A rejected handshake: the HTTP status and the message for the peer, which is then disconnected."""

    status: int
    message: str
    headers: Mapping[str, str] = attrs.field(factory=dict)

    def to_bytes(self) -> bytes:
        """Return the HTTP response."""
        body = f"{self.message}\n".encode()
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
    """The head of an HTTP request.

    Args:
        method: the method, as sent.
        target: path and query.
        version: the HTTP version, as sent, such as `HTTP/1.1`.
        headers: lower-case name -> value; the values of several headers with one name are joined by ", ".
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
        """Return the value of a header; "" if there is none."""
        return self.headers.get(name, "")

    def has_token(self, name: str, word: str) -> bool:
        """Whether a header with a list as its value contains `word`, given in lower case; case does not matter."""
        return any(each.strip().lower() == word for each in self.get(name).split(","))

    @property
    def upgrades(self) -> bool:
        """Whether it asks for a WebSocket."""
        return self.has_token("upgrade", "websocket")


def parse_head(data: bytes) -> Head:
    """Parse the head in `data`, which does not include the empty line at its end.

    Raises:
        HandshakeRejected: it is not a valid HTTP head.
    """
    lines = _LINE_END.split(data.decode("latin-1"))
    request_line = lines[0].split(" ")
    if len(request_line) != 3 or not request_line[2].startswith("HTTP/") or not _TOKEN.fullmatch(request_line[0]):
        raise HandshakeRejected(400, "this is not HTTP")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name):
            raise HandshakeRejected(400, "a header line of the request is malformed")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    authority, target = split_target(request_line[1])
    if authority:
        headers["host"] = authority
    return Head(request_line[0], target, request_line[2], headers)


def check_upgrade(head: Head, subprotocol: str | None) -> None:
    """Check a handshake against RFC 6455 section 4.2.1.

    Args:
        head: the head of the handshake request.
        subprotocol: the subprotocol that it must offer; None if it need not offer any.

    Raises:
        HandshakeRejected: the handshake is not acceptable.
    """
    if head.version != "HTTP/1.1":
        raise HandshakeRejected(505, "a WebSocket needs HTTP/1.1")
    if head.method != "GET":
        raise HandshakeRejected(405, "a WebSocket handshake must use GET", {"Allow": "GET"})
    if head.get("content-length") not in ("", "0") or head.get("transfer-encoding"):
        raise HandshakeRejected(400, "a WebSocket handshake has no body")
    upgrade = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    if not head.upgrades or not head.has_token("connection", "upgrade"):
        raise HandshakeRejected(426, "this path is for WebSockets", upgrade)
    if head.get("sec-websocket-version") != "13":
        raise HandshakeRejected(426, "the WebSocket version must be 13", upgrade)
    if not head.get("host"):
        raise HandshakeRejected(400, "the request has no Host header")
    if not _is_key(head.get("sec-websocket-key")):
        raise HandshakeRejected(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    offered = [each.strip() for each in head.get("sec-websocket-protocol").split(",")]
    if subprotocol is not None and subprotocol not in offered:
        raise HandshakeRejected(400, f"the WebSocket subprotocol {subprotocol} must be offered")


def build_response(head: Head, subprotocol: str | None) -> bytes:
    """Return the response that accepts a handshake, which `check_upgrade` has checked."""
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
