"""The events of the Wyoming protocol, and how they become bytes. Pure.

An event is a line of JSON, `{"type", "version", "data_length", "payload_length"}`; then as many bytes of more JSON, its
data, and as many bytes of payload. Older peers have the data in the line.
"""

import json
from typing import Any

import attrs

#: Of the protocol, as the package `wyoming` counts it.
VERSION = "1.10.2"
MAX_LINE_BYTES = 64 * 1024
#: Data holds a text, in JSON, of which each character may take six bytes.
MAX_DATA_BYTES = 512 * 1024
#: Eight seconds of sound at 16 kHz; programs send some hundredths of a second at a time.
MAX_PAYLOAD_BYTES = 256 * 1024
#: Characters of a name that an error repeats.
SHOWN_CHARS = 64


class EventFault(Exception):
    """What came is no event of the protocol, or not one that can be answered here.

    Attributes:
        code: for programs.
        message: what is wrong, and what to do.
    """

    def __init__(self, message: str, code: str = "bad_event") -> None:
        super().__init__(message)
        self.code, self.message = code, message


@attrs.frozen
class Event:
    """One event."""

    type: str
    data: dict[str, Any] = attrs.field(factory=dict)
    payload: bytes = attrs.field(default=b"", repr=False)

    def encode(self) -> bytes:
        """Return its bytes."""
        data = json.dumps(self.data, ensure_ascii=False).encode() if self.data else b""
        head: dict[str, Any] = {"type": self.type, "version": VERSION}
        if data:
            head["data_length"] = len(data)
        if self.payload:
            head["payload_length"] = len(self.payload)
        return json.dumps(head).encode() + b"\n" + data + self.payload

    def text(self, name: str = "text", most: int = MAX_DATA_BYTES) -> str:
        """Return a text in its data.

        Raises:
            EventFault: there is none, or it is too long or no text.
        """
        value = self.data.get(name)
        if not isinstance(value, str):
            raise EventFault(f"{self.type}: data must have {name!r}, a string")
        if len(value) > most:
            raise EventFault(f"{self.type}: {name!r} has {len(value)} characters; send {most} at most")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise EventFault(f"{self.type}: {name!r} has half of a UTF-16 character; send whole ones") from None
        return value

    def optional(self, name: str) -> str | None:
        """Return a name in its data; None if there is none, or an empty one.

        Raises:
            EventFault: it is too long or no text.
        """
        return None if self.data.get(name) in (None, "") else self.text(name, 256)

    def table(self, name: str) -> dict[str, Any]:
        """Return a table in its data; an empty one if there is none.

        Raises:
            EventFault: it is something else.
        """
        value = self.data.get(name)
        if not isinstance(value, dict | None):
            raise EventFault(f"{self.type}: {name!r} must be an object")
        return value or {}


@attrs.frozen
class _Head:
    type: str
    data: dict[str, Any]
    data_bytes: int
    payload_bytes: int


@attrs.define
class EventParser:
    """Makes events of received bytes, however they are cut; holds at most one unfinished event."""

    _buffer: bytearray = attrs.field(factory=bytearray)
    _head: _Head | None = None
    #: Up to where the buffer has no end of a line.
    _searched: int = 0

    @property
    def is_amid(self) -> bool:
        """Whether an event has begun."""
        return self._head is not None or bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take received bytes; what is complete has to be taken with `next` before the next ones."""
        self._buffer += data

    def next(self) -> Event | None:
        """Return the next event; None if it is not whole.

        Raises:
            EventFault: it is none. Nothing more can be read then.
        """
        head = self._head or self._read_line()
        if head is None or len(self._buffer) < head.data_bytes + head.payload_bytes:
            return None
        end = head.data_bytes + head.payload_bytes
        more = _json_object(bytes(self._buffer[: head.data_bytes]), "the data") if head.data_bytes else {}
        payload = bytes(self._buffer[head.data_bytes : end])
        del self._buffer[:end]
        self._head, self._searched = None, 0
        return Event(head.type, head.data | more, payload)

    def _read_line(self) -> _Head | None:
        end = self._buffer.find(b"\n", self._searched, MAX_LINE_BYTES)
        if end < 0:
            if len(self._buffer) >= MAX_LINE_BYTES:
                what = "this is not the Wyoming protocol" if self._buffer[:1] != b"{" else "the data belongs behind it"
                raise EventFault(f"the first line of an event is longer than {MAX_LINE_BYTES} bytes: {what}")
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        fields = _json_object(line, "the first line of an event")
        kind, data = fields.get("type"), fields.get("data")
        if not isinstance(kind, str):
            raise EventFault("the first line of an event must have a `type`, a string")
        if not isinstance(data, dict | None):
            raise EventFault("`data` in the first line of an event must be an object")
        sizes = (
            _length(fields, "data_length", MAX_DATA_BYTES),
            _length(fields, "payload_length", MAX_PAYLOAD_BYTES),
        )
        self._head = _Head(kind, data or {}, *sizes)
        return self._head


def _length(fields: dict[str, Any], name: str, most: int) -> int:
    value = fields.get(name)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise EventFault(f"{name} must be a number of bytes")
    if value > most:
        raise EventFault(f"{name} is {str(value)[:20]}; send events of at most {most} bytes, and more of them")
    return value


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise EventFault(f"{what} is not JSON in UTF-8; this is the Wyoming protocol") from None
    if not isinstance(value, dict):
        raise EventFault(f"{what} must be a JSON object")
    return value


def shown(name: str) -> str:
    """Return a name that a stranger gave, as an error shows it."""
    return repr(name[:SHOWN_CHARS])
