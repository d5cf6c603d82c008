"""Decodes and encodes the messages of the wire; pure, and the only module that calls msgpack for the wire.

msgpack's own decoder raises at least seven kinds of exception on bad bytes, and its limits apply too late: 1 MiB of
empty maps costs 72 MiB. So `check_bytes` first walks the bytes in Python, without building anything. Only bytes that
pass are unpacked, by an Unpacker made for that one message, because one that has failed must not be used again.
The walk is bounded by `MAX_VALUES`, which keeps the worst message near 2 ms (`make bench` prints it).
"""

from collections.abc import Iterator, Mapping
from itertools import islice

import msgpack

from protocol.wire.audio_envelope import read_audio
from protocol.wire.errors import BadText, EncodeError, ProtocolError, UnknownType
from protocol.wire.frames import MAX_MESSAGE_BYTES, Audio
from protocol.wire.messages import BULK, MAX_CONTROL_BYTES, Table
from protocol.wire.unsendable import find_unsendable, largest_value
from protocol.wire.validators import Message, Value

MAX_DEPTH = 16
MAX_MAP = 64
MAX_ARRAY = 1024
#: Values in one message, keys included. 64 KiB of float32 are 13,107; the walk costs time per value.
MAX_VALUES = 16_384
#: Maps and arrays in one message: an empty one is a single byte on the wire but 64 bytes when built.
MAX_CONTAINERS = 4_096
#: Strings that are not UTF-8 of which one message's refusal tells, and characters of each part of their paths.
MAX_BAD_PLACES = 16
MAX_PLACE_CHARS = 64


def _fixed_sizes() -> tuple[int, ...]:
    """First byte -> size in bytes of the whole value if the first byte alone determines it, else 0."""
    sizes = [0] * 256
    for first in (*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3):  # integers, nil, false, true
        sizes[first] = 1
    for length in range(32):  # short strings
        sizes[0xA0 + length] = 1 + length
    for first, size in {0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}.items():
        sizes[first] = size  # integers
    sizes[0xCA], sizes[0xCB] = 5, 9  # floats
    return tuple(sizes)


_FIXED = _fixed_sizes()
#: First byte -> 1 if it begins a string, or a map.
_STRING = bytes(first in (*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB) for first in range(256))
_MAP = bytes(first in (*range(0x80, 0x90), 0xDE, 0xDF) for first in range(256))


def check_bytes(data: bytes) -> None:
    """Check `data` against the limits of the wire, building nothing.

    Raises:
        ProtocolError: it is not exactly one msgpack map with string keys, or exceeds a limit; the message says which.
    """
    size = len(data)
    if size > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {size} bytes; the limit is {MAX_MESSAGE_BYTES}")
    if not size or not _MAP[data[0]]:
        raise ProtocolError("a message must be one msgpack map")
    try:
        end = _walk(data, MAX_DEPTH if size <= MAX_CONTROL_BYTES else 1)  # a large message must be flat
    except IndexError:
        raise ProtocolError("cut short") from None
    if end != size:
        raise ProtocolError("cut short" if end > size else f"{size - end} bytes follow the message's map")


def _walk(data: bytes, max_depth: int) -> int:
    """The end of the value that `data` begins with; beyond `data` if it is cut short in a length or a scalar.

    Lengths of one and two bytes are computed by hand: `int.from_bytes` of a slice takes four times as long.

    Raises:
        ProtocolError: it exceeds a limit.
        IndexError: it is cut short before a value.
    """
    fixed, is_string, is_map = _FIXED, _STRING, _MAP
    at = values = containers = 0
    left, in_map = 1, 0  # values still to come in the current container; a map counts keys and values
    outer: list[tuple[int, int]] = []
    while True:
        while not left:
            if not outer:
                return at
            left, in_map = outer.pop()
        first = data[at]
        if in_map and not left & 1 and not is_string[first]:
            raise ProtocolError("a map key is not a string")
        left -= 1
        if step := fixed[first]:
            at += step
            continue
        if first in (0xD9, 0xC4):  # strings and binary with a length of one byte, two, four
            at += 2 + data[at + 1]
            continue
        if first in (0xDA, 0xC5):
            at += 3 + (data[at + 1] << 8 | data[at + 2])
            continue
        if first in (0xDB, 0xC6):
            at += 5 + int.from_bytes(data[at + 1 : at + 5])
            continue
        if 0x80 <= first < 0xA0:
            length = first & 15
            at += 1
        elif first in (0xDC, 0xDE):
            length = data[at + 1] << 8 | data[at + 2]
            at += 3
        elif first in (0xDD, 0xDF):
            length = int.from_bytes(data[at + 1 : at + 5])
            at += 5
        else:
            raise ProtocolError("an extension type, or a byte msgpack never uses")
        containers += 1
        if containers > MAX_CONTAINERS:
            raise ProtocolError(f"more than {MAX_CONTAINERS} maps and arrays")
        outer.append((left, in_map))
        in_map = is_map[first]
        if in_map and length > MAX_MAP:
            raise ProtocolError(f"a map of {length}; the limit is {MAX_MAP}")
        if length > MAX_ARRAY:
            raise ProtocolError(f"an array of {length}; the limit is {MAX_ARRAY}")
        if len(outer) > max_depth:
            flat = f" in a message over {MAX_CONTROL_BYTES} bytes" if max_depth == 1 else ""
            raise ProtocolError(f"nested deeper than {max_depth}{flat}")
        left = 2 * length if in_map else length
        values += left
        if values > MAX_VALUES:
            raise ProtocolError(f"more than {MAX_VALUES} values")


def unpack(data: bytes) -> dict[str, Value]:
    """Unpack the map in `data`, within the limits of the wire.

    Raises:
        BadText: for such a map with strings that are not UTF-8.
        ProtocolError: for any other bytes that are not such a map; never anything else.
    """
    check_bytes(data)
    try:
        wire: dict[str, Value] = msgpack.unpackb(data)
    except UnicodeDecodeError:
        wire = msgpack.unpackb(data, unicode_errors="surrogateescape")
        places = islice(_bad_places(wire, ()), MAX_BAD_PLACES)
        raise BadText(_repaired(wire), dict.fromkeys(places, "holds bytes that are no UTF-8")) from None
    except (ValueError, TypeError, OverflowError, RecursionError) as fault:
        # After the walk, nothing should be left; msgpack's errors are all of these types.
        raise ProtocolError(f"bad msgpack: {type(fault).__name__}") from None
    return wire


def _bad_places(value: Value, path: tuple[str, ...]) -> Iterator[str]:
    """The paths of the strings with lone surrogates in a value, keys among them."""
    if isinstance(value, str):
        if _repaired(value) != value:
            yield _repaired(".".join(part[:MAX_PLACE_CHARS] for part in path))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _bad_places(key, (*path, key))
            yield from _bad_places(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _bad_places(inner, (*path, str(place)))


def _repaired(value: Value) -> Value:
    """`value` with "?" for each lone surrogate in its strings."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_repaired(key): _repaired(inner) for key, inner in value.items()}
    return [_repaired(inner) for inner in value] if isinstance(value, list) else value


def repair(fault: BadText) -> bytes:
    """The message that could not be decoded, with "?" for what is no UTF-8; it may break other rules still."""
    data: bytes = msgpack.packb(fault.wire)
    return data


def decode(data: bytes, table: Table) -> Message:
    """Decode the message in `data`, if it is one of `table`.

    Args:
        data: one binary WebSocket message.
        table: type -> class; one of the `FROM_...` tables, chosen by the sender.

    Raises:
        UnknownType: its `type` is not in the table.
        BadText: it has strings that are not UTF-8.
        ProtocolError: anything else is wrong with it.
    """
    if Audio.TYPE in table and (audio := read_audio(data)) is not None:
        request_id, attempt, seq, pcm = audio
        return Audio.from_map({"request_id": request_id, "attempt": attempt, "seq": seq, "pcm": pcm})
    wire = unpack(data)
    kind = wire.get("type")
    if not isinstance(kind, str):
        raise ProtocolError("the message has no string 'type'")
    cls = table.get(kind)
    if cls is None:
        raise UnknownType(f"message type {kind[:64]!r} is not accepted here; accepted: {', '.join(sorted(table))}")
    if len(data) > MAX_CONTROL_BYTES and kind not in BULK:
        raise ProtocolError(f"{kind}: {len(data)} bytes; the limit for this type is {MAX_CONTROL_BYTES}")
    return cls.from_map(wire)


def encode(message: Message) -> bytes:
    """Encode `message` as one map: `type` first, then its fields in the order of its class.

    Raises:
        EncodeError: it contains something that msgpack cannot encode, or exceeds a limit of the wire.
    """
    try:
        wire = message.to_map()
    except RecursionError:
        raise EncodeError(f"{message.TYPE}: nested deeper than {MAX_DEPTH}") from None
    return pack(wire)


def pack(wire: Mapping[str, Value]) -> bytes:
    """Encode a message that is a map already; see `encode`."""
    try:
        data: bytes = msgpack.packb(wire)
    except (ValueError, TypeError, OverflowError, RecursionError) as fault:
        raise _unsendable(wire, str(fault)) from None
    if len(data) > MAX_CONTROL_BYTES and wire.get("type") not in BULK:
        raise _unsendable(wire, f"{len(data)} bytes; the limit is {MAX_CONTROL_BYTES}", len(data))
    try:
        check_bytes(data)
    except ProtocolError as fault:
        raise _unsendable(wire, str(fault), len(data)) from None
    return data


def _unsendable(wire: Mapping[str, Value], why: str, size: int = 0) -> EncodeError:
    """Return the error for a message that cannot be encoded, with the values that are at fault."""
    fields = find_unsendable(wire, depth=MAX_DEPTH, entries=MAX_MAP, items=MAX_ARRAY)
    if not fields and size > MAX_CONTROL_BYTES:
        where, most = largest_value(wire)
        limit, advice = MAX_CONTROL_BYTES, "send large values as files, or as bytes of their own"
        if size > MAX_MESSAGE_BYTES:
            limit, advice = MAX_MESSAGE_BYTES, "send it in pieces"
        fields = {where: f"has {most} bytes, and for all values together the limit is {limit}: {advice}"}
    what = "; ".join(f"{where} {words}" for where, words in fields.items()) or why
    return EncodeError(f"{wire.get('type')}: {what}", fields)
