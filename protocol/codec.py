"""Bytes of the wire to messages and back; pure, and the only place that calls msgpack for the wire.

msgpack's own decoder raises at least seven kinds of exception on bad bytes, and its limits hold too late: 1 MiB
of empty maps costs 72 MiB. So `check_bytes` walks the bytes first, in Python, without building anything;
only what passes is unpacked, by an Unpacker made for that one message, so a damaged one is never used again.
The walk is bounded by `MAX_VALUES`, which keeps the worst case below 2 ms on a slow core.
"""

from collections.abc import Mapping

import msgpack

from protocol.errors import EncodeError, ProtocolError, UnknownType
from protocol.fields import Value
from protocol.messages import BULK, MAX_CONTROL_BYTES, MAX_MESSAGE_BYTES, Message, Table

MAX_DEPTH = 16
MAX_MAP = 64
MAX_ARRAY = 1024
#: Values in one message, keys included. 64 KiB of float32 are 13,107; the walk is paid per value.
MAX_VALUES = 16_384
#: Maps and arrays in one message: an empty one is a single byte on the wire and 64 bytes when built.
MAX_CONTAINERS = 4_096


def _fixed_sizes() -> tuple[int, ...]:
    """First byte -> size in bytes of the whole value, where the first byte alone tells; else 0."""
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
#: First byte -> size of the big-endian length that follows it.
_LENGTH = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_STRINGS = frozenset((*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB))
_SIZED_SCALARS = frozenset((0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB))
_MAPS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))


def check_bytes(data: bytes) -> None:
    """Hold `data` to the limits of the wire, building nothing.

    Raises:
        ProtocolError: not one whole msgpack map with string keys, or over a limit; the text says which.
    """
    size = len(data)
    if size > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {size} bytes; the limit is {MAX_MESSAGE_BYTES}")
    if not size or data[0] not in _MAPS:
        raise ProtocolError("a message must be one msgpack map")
    max_depth = MAX_DEPTH if size <= MAX_CONTROL_BYTES else 1  # a large message must be flat
    at = values = containers = 0
    left, in_map = 1, False  # values still to come in the container at hand; a map counts keys and values
    outer: list[tuple[int, bool]] = []
    while True:
        while not left:
            if not outer:
                if at != size:
                    raise ProtocolError(f"{size - at} bytes follow the message's map" if at < size else "cut short")
                return
            left, in_map = outer.pop()
        if at >= size:
            raise ProtocolError("cut short")
        first = data[at]
        if in_map and not left & 1 and first not in _STRINGS:
            raise ProtocolError("a map key is not a string")
        left -= 1
        if step := _FIXED[first]:
            at += step
            continue
        if width := _LENGTH.get(first):
            at += 1 + width
            if at > size:
                raise ProtocolError("cut short")
            length = int.from_bytes(data[at - width : at])
            if first in _SIZED_SCALARS:
                at += length
                continue
        elif 0x80 <= first < 0xA0:
            length = first & 15
            at += 1
        else:
            raise ProtocolError("an extension type, or a byte msgpack never uses")
        containers += 1
        if containers > MAX_CONTAINERS:
            raise ProtocolError(f"more than {MAX_CONTAINERS} maps and arrays")
        outer.append((left, in_map))
        in_map = first in _MAPS
        if in_map and length > MAX_MAP:
            raise ProtocolError(f"a map of {length}; the limit is {MAX_MAP}")
        if length > MAX_ARRAY:
            raise ProtocolError(f"an array of {length}; the limit is {MAX_ARRAY}")
        if len(outer) > max_depth:
            raise ProtocolError(
                f"nested deeper than {max_depth}"
                + ("" if size <= MAX_CONTROL_BYTES else f" in a message over {MAX_CONTROL_BYTES} bytes")
            )
        left = 2 * length if in_map else length
        values += left
        if values > MAX_VALUES:
            raise ProtocolError(f"more than {MAX_VALUES} values")


def unpack(data: bytes) -> dict[str, Value]:
    """The map that `data` holds, within the limits of the wire.

    Raises:
        ProtocolError: for any bytes that are not one; never anything else.
    """
    check_bytes(data)
    try:
        wire: dict[str, Value] = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError) as fault:
        # After the walk only bad UTF-8 should be left; msgpack's other errors are all of these kinds.
        raise ProtocolError(f"bad msgpack: {type(fault).__name__}") from None
    return wire


def decode(data: bytes, table: Table) -> Message:
    """The message in `data`, if it is one of `table`.

    Args:
        data: one binary WebSocket message.
        table: type -> class; one of the `FROM_...` tables, by who sent it.

    Raises:
        UnknownType: its `type` is not in the table.
        ProtocolError: anything else that is wrong with it.
    """
    wire = unpack(data)
    kind = wire.get("type")
    if not isinstance(kind, str):
        raise ProtocolError("the message has no string 'type'")
    cls = table.get(kind)
    if cls is None:
        raise UnknownType(f"message type {kind[:64]!r} is not taken here; it takes {', '.join(sorted(table))}")
    if len(data) > MAX_CONTROL_BYTES and kind not in BULK:
        raise ProtocolError(f"{kind}: {len(data)} bytes; the limit for this type is {MAX_CONTROL_BYTES}")
    return cls.from_map(wire)


def encode(message: Message) -> bytes:
    """`message` as one map: `type` first, then its fields in the order of its class.

    Raises:
        EncodeError: it holds something msgpack has no word for, or is over a limit of the wire.
    """
    try:
        wire = message.to_map()
    except RecursionError:
        raise EncodeError(f"{message.TYPE}: nested deeper than {MAX_DEPTH}") from None
    return pack(wire)


def pack(wire: Mapping[str, Value]) -> bytes:
    """As `encode`, for a map that is at hand already."""
    try:
        data: bytes = msgpack.packb(wire)
    except (ValueError, TypeError, OverflowError, RecursionError) as fault:
        raise EncodeError(f"{wire.get('type')}: {fault}") from None
    if len(data) > MAX_CONTROL_BYTES and wire.get("type") not in BULK:
        raise EncodeError(f"{wire.get('type')}: {len(data)} bytes; the limit is {MAX_CONTROL_BYTES}")
    try:
        check_bytes(data)
    except ProtocolError as fault:
        raise EncodeError(f"{wire.get('type')}: {fault}") from None
    return data
