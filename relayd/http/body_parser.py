"""Parses the bodies of HTTP requests: JSON, forms, and multipart with files. All sizes are limited while reading.

A file becomes an input with the name of its form field. The file name only distinguishes a file from a text field.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import parse_qsl

import attrs
import trio
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from protocol.wire.errors import ErrorCode
from protocol.wire.structs import NAME_PATTERN
from protocol.wire.validators import Value
from relayd.http.context import HttpContext, context_of, exchange_of
from relayd.http.errors import HttpError

#: Limit for everything but files: 64 KiB of params, of which JSON may write each character as six.
MAX_FIELDS_BYTES = 512 * 1024
#: Fields and files in one form.
MAX_PARTS = 64
#: Allowance for headers and boundaries of a multipart body.
SLACK_BYTES = 64 * 1024
#: How long a client may pause in the middle of a body.
BODY_STALL_S = 30.0
#: Minimum average rate of a body: without it, a body of 32 MiB could hold its memory for days.
MIN_BYTES_S = 8 * 1024
#: Limit for all uploads in memory that are not part of a request yet, or `max_input_bytes` if that is larger.
MAX_UPLOAD_BYTES = 256 * 1024 * 1024


@attrs.frozen
class Upload:
    """An uploaded file."""

    media_type: str
    data: bytes = attrs.field(repr=False)
    sha256: str


@attrs.define
class Body:
    """The contents of a body: fields (text in forms, values in JSON) and files by name."""

    fields: dict[str, Value] = attrs.field(factory=dict)
    uploads: dict[str, Upload] = attrs.field(factory=dict)
    #: Whether the fields come from a form.
    is_form: bool = False


#: Returns the size limit of an input by name and media type; raises `HttpError` if the input is not accepted.
InputLimit = Callable[[str, str], int]


@contextmanager
def _counted(context: HttpContext) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts bytes of an upload in memory; the end of the block subtracts them."""
    counted = 0

    def count(size: int) -> None:
        nonlocal counted
        most = max(MAX_UPLOAD_BYTES, context.relay.config.limits.max_input_bytes)
        if context.upload_bytes + size > most:
            message = "too many inputs are being uploaded right now; retry later"
            raise HttpError(ErrorCode.RATE_LIMITED, message, retry_after_s=2.0)
        counted += size
        context.upload_bytes += size

    try:
        yield count
    finally:
        context.upload_bytes -= counted


@contextmanager
def open_uploads(request: Request) -> Iterator["Uploads"]:
    """Yield a reader for the body of `request`; its data counts as an upload until the end of the block."""
    with _counted(context_of(request)) as count:
        yield Uploads(request, count)


@attrs.frozen
class Uploads:
    """Reads the body of one request."""

    request: Request
    count: Callable[[int], None]

    async def read(self, cap: InputLimit) -> Body:
        """Read the whole body, according to its content type.

        Raises:
            HttpError: the body has an unsupported type (415), is invalid (400), too large (413) or too slow (408).
        """
        kind, options = parse_options_header(self.request.headers.get("content-type"))
        if kind == b"multipart/form-data":
            return await self._multipart(options.get(b"boundary", b""), cap)
        data = await read_all(self.request, MAX_FIELDS_BYTES)
        if kind == b"application/x-www-form-urlencoded":
            return Body(_urlencoded(data), is_form=True)
        if kind == b"application/json" or (not kind and not data):
            return Body(json_object(data or b"{}"))
        raise HttpError(
            "unsupported_media_type",
            "send application/json, application/x-www-form-urlencoded or multipart/form-data",
            status=415,
        )

    async def _multipart(self, boundary: bytes, cap: InputLimit) -> Body:
        if not boundary:
            raise HttpError("bad_request", "multipart/form-data needs a boundary in its content type", status=400)
        most = context_of(self.request).relay.config.limits.max_input_bytes
        form = _Form(cap, most, self.count)
        try:
            parser = MultipartParser(boundary, form.callbacks())
            async for piece in BodyReader(self.request, most + MAX_FIELDS_BYTES + SLACK_BYTES):
                parser.write(piece)
            parser.finalize()
        except FormParserError as fault:
            raise HttpError("bad_request", f"invalid multipart body: {fault}", status=400) from None
        if not form.ended:
            raise HttpError("bad_request", "the multipart body has no closing boundary", status=400)
        return Body(dict(form.fields), form.uploads, is_form=True)


@attrs.define(eq=False)
class _Form:
    """Collects the parts of a multipart body, in callbacks of the parser."""

    cap: InputLimit
    #: Bytes that all further files together may have.
    left_bytes: int
    count: Callable[[int], None]
    fields: dict[str, str] = attrs.field(factory=dict)
    uploads: dict[str, Upload] = attrs.field(factory=dict)
    ended: bool = False
    _parts: int = 0
    _field_bytes: int = 0
    _header: tuple[bytearray, bytearray] = attrs.field(factory=lambda: (bytearray(), bytearray()))
    _headers: dict[bytes, bytes] = attrs.field(factory=dict)
    _name: str = ""
    _media_type: str | None = None
    _cap_bytes: int = 0
    _data: bytearray = attrs.field(factory=bytearray)
    _digest: Any = None
    #: A file field without a file name: no file was chosen in the browser's form.
    _blank: bool = False

    def callbacks(self) -> Any:
        """Return the callbacks for python-multipart; data callbacks get a buffer and a slice of it."""
        return {
            "on_part_begin": self.begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self.end_header,
            "on_headers_finished": self.end_headers,
            "on_part_data": lambda data, start, end: self.on_data(data[start:end]),
            "on_part_end": self.end_part,
            "on_end": self.end,
        }

    def begin(self) -> None:
        """Start a part."""
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise HttpError(ErrorCode.INVALID_PARAMS, f"a form may have {MAX_PARTS} parts at most")
        self._headers = {}
        self._data = bytearray()

    def end_header(self) -> None:
        """Store a complete header of the part."""
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def end_headers(self) -> None:
        """Decide from the headers whether the part is a text field or a file."""
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if not self._name or self._name in self.fields or self._name in self.uploads:
            raise HttpError(ErrorCode.INVALID_PARAMS, f"form field {self._name!r} has no name, or occurs twice")
        self._media_type, self._blank = None, False
        if b"filename" not in options and b"filename*" not in options:
            return
        self._blank = not options.get(b"filename")
        kind, _ = parse_options_header(self._headers.get(b"content-type"))
        self._media_type = kind.decode("latin-1")[:128] or "application/octet-stream"
        self._digest = hashlib.sha256()
        if not self._blank:
            self._cap_bytes = self._cap()

    def _cap(self) -> int:
        assert self._media_type is not None
        if not NAME_PATTERN.fullmatch(self._name):
            raise HttpError(
                ErrorCode.INVALID_PARAMS, f"{self._name[:64]!r} is not a valid input name ([a-z][a-z0-9_]*)"
            )
        return self.cap(self._name, self._media_type)

    def on_data(self, data: bytes) -> None:
        """Append data to the part."""
        if self._media_type is None:
            self._field_bytes += len(data)
            if self._field_bytes > MAX_FIELDS_BYTES:
                raise too_large(f"the fields of a form may have at most {MAX_FIELDS_BYTES} bytes together")
        else:
            if self._blank and data:  # a file that has content but no name
                self._blank, self._cap_bytes = False, self._cap()
            size = len(self._data) + len(data)
            if size > self._cap_bytes:
                raise too_large(f"input {self._name!r} may have at most {self._cap_bytes} bytes")
            self.left_bytes -= len(data)
            if self.left_bytes < 0:
                raise too_large("the inputs of the request are too large together; see limits.max_input_bytes")
            self.count(len(data))
            self._digest.update(data)
        self._data += data

    def end_part(self) -> None:
        """Store the complete part."""
        if self._media_type is None:
            self._field_bytes += len(self._name)
            self.fields[self._name] = _utf8(self._name, bytes(self._data))
        elif not self._blank:
            self.uploads[self._name] = Upload(self._media_type, bytes(self._data), self._digest.hexdigest())
        self._data = bytearray()

    def end(self) -> None:
        """Note that the closing boundary was found."""
        self.ended = True


@attrs.define(eq=False)
class BodyReader:
    """Iterates over the pieces of a body as they arrive.

    Not a generator: that would be left unfinished when a piece exceeds the limit.
    """

    request: Request
    most_bytes: int
    _size: int = 0
    _over: bool = False
    _began: float = attrs.field(factory=trio.current_time)

    def __attrs_post_init__(self) -> None:
        declared = self.request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.most_bytes:
            raise too_large(f"the body has {declared} bytes; at most {self.most_bytes} are allowed")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Return the next piece.

        Raises:
            HttpError: the body has more than `most_bytes` (413), or arrives too slowly (408); or the relay is shutting
                down (503).
        """
        if self._over:
            raise StopAsyncIteration
        exchange, context = exchange_of(self.request), context_of(self.request)
        due = min(trio.current_time(), self._began + self._size / MIN_BYTES_S) + BODY_STALL_S
        with trio.move_on_at(due) as patience:
            exchange.reading = patience
            if context.leaving:  # the cancellation met the piece before, or came before the first
                patience.cancel()
            event = await self.request.receive()
        exchange.reading = None
        if patience.cancelled_caught:
            if context.leaving:
                message = "the relay is shutting down; send the request again when it is back"
                raise HttpError(ErrorCode.SHUTTING_DOWN, message, retry_after_s=5.0)
            message = f"the body arrived too slowly, and was abandoned after {self._size} bytes; send the request again"
            raise HttpError("request_timeout", message, status=408)
        piece: bytes = event.get("body", b"")
        self._over = not event.get("more_body", False)
        self._size += len(piece)
        if self._size > self.most_bytes:
            raise too_large(f"at most {self.most_bytes} bytes are allowed")
        return piece


async def read_all(request: Request, most_bytes: int, count: Callable[[int], None] = lambda _size: None) -> bytes:
    """Read the whole body.

    Args:
        request: the request.
        most_bytes: limit of its size.
        count: called with the size of every piece; may raise `HttpError`.

    Raises:
        HttpError: the body has more than `most_bytes` (413), or arrives too slowly (408).
    """
    data = bytearray()
    async for piece in BodyReader(request, most_bytes):
        count(len(piece))
        data += piece
    return bytes(data)


def json_object(data: bytes) -> dict[str, Value]:
    """Parse a JSON object.

    Raises:
        HttpError: `data` is not a JSON object (400).
    """
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except UnicodeDecodeError as fault:
        raise HttpError("bad_request", f"the body {_not_utf8(fault)}", status=400) from None
    except (ValueError, RecursionError) as fault:
        raise HttpError("bad_request", f"the body is not valid JSON: {fault}", status=400) from None
    if not isinstance(value, dict):
        raise HttpError("bad_request", "the body must be a JSON object", status=400)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _urlencoded(data: bytes) -> dict[str, Value]:
    try:
        pairs = parse_qsl(data.decode(), keep_blank_values=True, max_num_fields=MAX_PARTS, errors="strict")
    except UnicodeDecodeError as fault:
        raise HttpError("bad_request", f"a field of the form {_not_utf8(fault)}", status=400) from None
    except ValueError as fault:
        raise HttpError("bad_request", f"invalid form: {fault}", status=400) from None
    fields: dict[str, Value] = {}
    for name, value in pairs:
        if name in fields:
            raise HttpError(ErrorCode.INVALID_PARAMS, f"form field {name[:64]!r} occurs twice")
        fields[name] = value
    return fields


def _utf8(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        name, why = name[:64], _not_utf8(fault)
        raise HttpError("bad_request", f"form field {name!r} {why}", status=400, details={name: why}) from None


def _not_utf8(fault: UnicodeDecodeError) -> str:
    return f"is not UTF-8 at byte {fault.start + 1}: send text as UTF-8"


def too_large(message: str) -> HttpError:
    """Return the error for a body over a limit; the rest is not read, so the connection ends."""
    return HttpError(ErrorCode.INPUT_TOO_LARGE, message)
