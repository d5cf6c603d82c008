"""The codec, byte by byte: where each kind of value ends, and every limit to its last unit."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import msgpack
import pytest

from protocol.wire.codec import MAX_CONTAINERS, MAX_VALUES, check_bytes, repair, unpack
from protocol.wire.errors import BadText, ProtocolError
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.messages import MAX_CONTROL_BYTES


def _values_by_first_byte() -> Iterator[tuple[int, bytes | None]]:
    """A value that begins with each byte, as the specification of msgpack has it; None: not on this wire."""
    nil, pair = b"\xc0", b"\xa1k\xc0"
    sized = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8, 0xCA: 4, 0xCB: 8}
    counted = {
        0xD9: b"\x03abc",
        0xDA: b"\x01\x02" + b"x" * 258,
        0xDB: b"\x00\x00\x01\x02" + b"x" * 258,
        0xC4: b"\x03abc",
        0xC5: b"\x01\x02" + b"x" * 258,
        0xC6: b"\x00\x00\x01\x02" + b"x" * 258,
        0xDC: b"\x01\x02" + nil * 258,
        0xDD: b"\x00\x00\x01\x02" + nil * 258,
        0xDE: b"\x00\x11" + pair * 17,
        0xDF: b"\x00\x00\x00\x11" + pair * 17,
    }
    for first in range(256):
        rest: bytes | None = None
        if first < 0x80 or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3):
            rest = b""
        elif first < 0x90:
            rest = pair * (first & 15)
        elif first < 0xA0:
            rest = nil * (first & 15)
        elif first < 0xC0:
            rest = b"x" * (first & 31)
        elif first in sized:
            rest = bytes(sized[first])
        elif first in counted:
            rest = counted[first]
        yield first, None if rest is None else bytes([first]) + rest


@pytest.mark.parametrize(("first", "value"), list(_values_by_first_byte()))
def test_a_value_with_any_first_byte_ends_where_it_ends(first: int, value: bytes | None) -> None:
    head = b"\x82\xa1a"
    if value is None:
        with pytest.raises(ProtocolError, match="an extension type, or a byte msgpack never uses"):
            check_bytes(head + bytes([first]) + bytes(300))
        return
    whole = head + value + b"\xa1b\xc0"
    check_bytes(whole)
    with pytest.raises(ProtocolError, match=r"^1 bytes follow"):
        check_bytes(whole + b"\xc0")
    for cut in {len(head), len(head) + 1, len(head) + len(value) - 1, len(whole) - 1}:
        with pytest.raises(ProtocolError, match=r"^cut short$"):
            check_bytes(whole[:cut])
    is_string = 0xA0 <= first < 0xC0 or first in (0xD9, 0xDA, 0xDB)
    with nullcontext() if is_string else pytest.raises(ProtocolError, match="a map key is not a string"):
        check_bytes(b"\x81" + value + b"\xc0")


def test_values_and_containers_are_counted_to_the_last_one() -> None:
    def values(last: int) -> bytes:
        return msgpack.packb({"a": [*([[0] * 1024] * 15), [0] * last]})  # type: ignore[no-any-return]

    last = MAX_VALUES - 2 - 16 - 15 * 1024
    check_bytes(values(last))
    with pytest.raises(ProtocolError, match="more than 16384 values"):
        check_bytes(values(last + 1))

    def containers(inner: int) -> bytes:
        return msgpack.packb({"a": [*([[[]] * 1023] * 3), [[]] * inner]})  # type: ignore[no-any-return]

    inner = MAX_CONTAINERS - 2 - 4 - 3 * 1023
    check_bytes(containers(inner))
    with pytest.raises(ProtocolError, match="more than 4096 maps and arrays"):
        check_bytes(containers(inner + 1))


def test_the_largest_message_and_the_largest_one_that_may_be_deep() -> None:
    def output(data: Any, size: int) -> bytes:
        head = len(msgpack.packb({"data": data, "pad": "x" * 65_536}))
        packed: bytes = msgpack.packb({"data": data, "pad": "x" * (65_536 + size - head)})
        if len(packed) != size:  # a shorter text has a shorter length
            packed = msgpack.packb({"data": data, "pad": "x" * (65_536 + 2 * size - head - len(packed))})
        assert len(packed) == size
        return packed

    whole = output(b"", MAX_MESSAGE_BYTES)
    assert len(whole) == MAX_MESSAGE_BYTES == 2**20
    check_bytes(whole)
    with pytest.raises(ProtocolError, match="message of 1048577 bytes; the limit is 1048576"):
        check_bytes(output(b"", MAX_MESSAGE_BYTES + 1))
    deep = output([[]], MAX_CONTROL_BYTES)
    assert len(deep) == MAX_CONTROL_BYTES
    check_bytes(deep)
    with pytest.raises(ProtocolError, match="nested deeper than 1 in a message over 65536 bytes"):
        check_bytes(output([[]], MAX_CONTROL_BYTES + 1))
    for nothing in (b"", b"\x91\xc0", b"\xc0"):
        with pytest.raises(ProtocolError, match="a message must be one msgpack map"):
            check_bytes(nothing)


@pytest.mark.parametrize("strings", [16, 17])
def test_sixteen_places_that_are_no_utf_8_are_told(strings: int) -> None:
    bad = b"\xa1\xff"
    packed = b"\x82\xa1a\xdc" + strings.to_bytes(2) + bad * strings + b"\xa1" + b"b" + b"\xc0"
    with pytest.raises(BadText) as refusal:
        unpack(packed)
    assert refusal.value.fields == {f"a.{place}": "holds bytes that are no UTF-8" for place in range(16)}
    assert unpack(repair(refusal.value)) == {"a": ["?"] * strings, "b": None}


def test_the_place_of_a_bad_text_is_told_in_parts_of_64_characters() -> None:
    packed = b"\x81\xd9\x46" + b"k" * 70 + b"\x81\xa1\xff\xa1\xff"
    with pytest.raises(BadText) as refusal:
        unpack(packed)
    assert refusal.value.fields == {"k" * 64 + ".?": "holds bytes that are no UTF-8"}
