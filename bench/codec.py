"""Measures the cost of encoding and decoding a message, and the slowest decode of a hostile message of up to 64 KiB."""

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgpack

from bench.figures import Row, alternate, paired
from bench.relay.frames import SPEECH_BYTES
from protocol.wire.codec import decode, encode
from protocol.wire.errors import ProtocolError
from protocol.wire.frames import Audio
from protocol.wire.messages import FROM_CLIENT, FROM_RELAY, FROM_WORKER, MAX_CONTROL_BYTES, Submit, Table
from protocol.wire.validators import Message

ROUNDS = 9
REPEAT = 2_000
#: Limit from docs/design.md and protocol.wire.codec: no decode blocks the relay for longer.
WORST_MS = 5.0
_ID = "0123456789abcdef" * 2


def measure() -> list[Row]:
    """Compare ordinary messages with bare msgpack, and time hostile ones."""
    audio = Audio(request_id=_ID, attempt=1, seq=70_000, pcm=secrets.token_bytes(SPEECH_BYTES))
    submit = Submit(request_id=_ID, space="tts", params={"text": "Hello world. " * 8, "voice": "en", "rate": 170})
    return [
        *_message("audio frame of 7,680 bytes", audio, FROM_WORKER),
        *_message("submit of 100 characters", submit, FROM_CLIENT),
        *_hostile(),
    ]


def _message(name: str, message: Message, table: Table) -> list[Row]:
    data, wire = encode(message), message.to_map()

    def row(what: str, ours: Callable[[], Any], bare: Callable[[], Any], peer: str) -> Row:
        rounds = alternate(ROUNDS, lambda: _us(ours), lambda: _us(bare))
        return paired("codec", f"{what} {name}", "µs", *rounds, peer)

    return [
        row("encode", lambda: encode(message), lambda: msgpack.packb(wire), "msgpack.packb"),
        row("decode", lambda: decode(data, table), lambda: msgpack.unpackb(data), "msgpack.unpackb"),
    ]


def _us(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for _ in range(REPEAT):
        call()
    return 1e6 * (time.perf_counter() - began) / REPEAT


# -- hostile messages ---------------------------------------------------------------------------------------------


def _hostile() -> list[Row]:
    """The slowest of `_attacks`; each counts with its best of several runs, because the claim is about the code."""
    attacks = _attacks()
    took_ms, name = max((min(_attack_ms(*attack) for _ in range(7)), name) for name, attack in attacks.items())
    label = f"decode the worst of {len(attacks)} hostile messages of up to 64 KiB: {name}"
    return [Row(figure="codec", name=label, unit="ms", value=took_ms, limit=WORST_MS)]


def _attack_ms(data: bytes, table: Table) -> float:
    began = time.perf_counter()
    with suppress(ProtocolError):  # some are rejected, others are valid and expensive
        decode(data, table)
    return 1000 * (time.perf_counter() - began)


def _attacks() -> Mapping[str, tuple[bytes, Table]]:
    """Messages made to cost as much as the limits allow; each is at one or several limits."""
    pack = msgpack.packb
    room = MAX_CONTROL_BYTES - 512
    params = {"type": "submit", "request_id": _ID, "space": "tts"}
    register = {"type": "register", "worker": "w", "instance": _ID, "spaces": ["tts"]}
    running = {"request_id": _ID, "attempt": 1, "next_seq": 1}

    def values(each: Any, count: int) -> list[Any]:
        """`count` values, in arrays of the largest allowed length."""
        return [[each] * min(1_024, count - at) for at in range(0, count, 1_024)]

    def raw(packed: bytes) -> bytes:
        """A `submit` whose params are these bytes; msgpack would encode the same values in fewer."""
        head: bytes = pack({**params, "params": {}})
        return head[:-1] + packed

    def wide(letter: int, count: int) -> bytes:
        """An array under a key; its empty strings use three bytes each, and cost one more step than short ones."""
        return b"\xa1" + bytes((letter,)) + b"\xdc" + count.to_bytes(2) + b"\xda\x00\x00" * count

    rules = {f"i{i}": {"media_types": ["xx"] * 1_015} for i in range(16)}
    arrays = b"".join(wide(97 + i, 1_024) for i in range(15)) + wide(122, 900)
    map_of_64 = b"\xde\x00\x40" + b"\xda\x00\x00" * 128
    bad_text = b"\x81\xa1a\xda" + room.to_bytes(2) + b"x" * (room - 1) + b"\xff"
    info = {"media_type": "a/b", "size": 1, "sha256": "0" * 64}
    return {
        "16,000 empty strings of three bytes": (raw(b"\xde\x00\x10" + arrays), FROM_CLIENT),
        "126 maps of 64 empty keys": (raw(b"\x81\xa1a\xdc\x00\x7e" + map_of_64 * 126), FROM_CLIENT),
        "16,000 small integers": (pack({**params, "params": {"a": values(1, 16_000)}}), FROM_CLIENT),
        "16,000 one-letter strings": (pack({**params, "params": {"a": values("x", 16_000)}}), FROM_CLIENT),
        "4,000 empty maps": (pack({**params, "params": {"a": values({}, 4_000)}}), FROM_CLIENT),
        "4,000 maps of one": (pack({**params, "params": {"a": values({"a": 1}, 4_000)}}), FROM_CLIENT),
        "4,000 maps and 8,000 strings": (pack({**params, "params": {"a": values({"a": "bb"}, 4_000)}}), FROM_CLIENT),
        "nested 15 deep, again and again": (pack({**params, "params": {"a": [_nested(13)] * 300}}), FROM_CLIENT),
        "nested 10,000 deep": (b"\x81\xa1a" * 10_000, FROM_CLIENT),
        "60,000 characters, the last of them bad UTF-8": (raw(bad_text), FROM_CLIENT),
        "register: as many running attempts as fit": (
            pack({**register, "running": [running] * (room // len(pack(running)))}),
            FROM_WORKER,
        ),
        "register: 1,024 spaces": (pack({**register, "spaces": ["s" * 58] * 1_024}), FROM_WORKER),
        "register: 16,000 media types": (pack({**register, "inputs": rules}), FROM_WORKER),
        "submit: 64 inputs": (pack({**params, "inputs": {f"i{i}": info for i in range(64)}}), FROM_CLIENT),
        "attach: an id of 60,000 characters": (pack({"type": "attach", "request_id": "0" * room}), FROM_CLIENT),
        "a type of 60,000 characters": (pack({"type": "x" * room}), FROM_CLIENT),
        "registered: 1,024 ids to abandon": (
            pack({"type": "registered", "worker_id": "w", "abandon": [_ID] * 1_024}),
            FROM_RELAY,
        ),
        "random bytes": (secrets.token_bytes(MAX_CONTROL_BYTES), FROM_CLIENT),
    }


def _nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value
