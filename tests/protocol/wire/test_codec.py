"""The codec: whatever the bytes, a message or ProtocolError; every limit; golden bytes; round trips."""

import struct
from typing import Any

import attrs
import msgpack
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protocol.wire.codec import (
    MAX_ARRAY,
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_MAP,
    MAX_VALUES,
    check_bytes,
    decode,
    encode,
    pack,
    repair,
    unpack,
)
from protocol.wire.errors import BadText, EncodeError, ErrorCode, ProtocolError, UnknownType
from protocol.wire.frames import (
    MAX_MESSAGE_BYTES,
    MAX_PCM_BYTES,
    Audio,
    Completed,
    Output,
    Started,
)
from protocol.wire.messages import (
    BULK,
    FRAMES,
    FROM_ANYONE,
    FROM_CLIENT,
    FROM_OPERATOR,
    FROM_RELAY,
    FROM_WORKER,
    MAX_CONTROL_BYTES,
    MAX_FOUND,
    Hello,
    Input,
    Submit,
)
from protocol.wire.structs import (
    AudioFormat,
    InputInfo,
    InputRule,
    Running,
    VideoFormat,
)
from protocol.wire.validators import Message

ID = "0123456789abcdef0123456789abcdef"
TABLES = [FROM_ANYONE, FROM_CLIENT, FROM_OPERATOR, FROM_WORKER, FROM_RELAY]
CLASSES = sorted({cls for table in TABLES for cls in table.values()}, key=lambda cls: cls.__name__)

# -- messages with generated values ----------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), max_size=40)
ids = st.text("0123456789abcdef", min_size=32, max_size=32)
spaces = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
names = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True)
numbers = st.floats(0, 1e12, allow_nan=False) | st.integers(0, 10**9)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | words
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
maps = st.dictionaries(words, values, max_size=4)
seqs = st.integers(0, 2**31)
attempts = st.integers(0, 1_000_000)
formats = st.builds(AudioFormat, sample_rate=st.integers(8_000, 192_000), channels=st.integers(1, 2))
videos = st.builds(
    VideoFormat,
    width=st.integers(1, 16_383),
    height=st.integers(1, 16_383),
    fps=st.integers(1, 240) | st.floats(1, 240),
)
offsets = st.integers(0, 2**50)
received = st.dictionaries(names, offsets, max_size=2)
running = st.lists(
    st.builds(Running, request_id=ids, attempt=attempts, next_seq=seqs, inputs=received), max_size=3
).map(tuple)
infos = (
    st.builds(
        InputInfo,
        media_type=words,
        size=st.integers(0, 2**50),
        sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    )
    | st.builds(InputInfo, media_type=words, live=st.just(True))
    | st.builds(InputInfo, media_type=words, from_=ids)
)
rules = st.builds(
    InputRule,
    media_types=st.lists(words, max_size=2),
    max_bytes=st.integers(1, 2**40),
    required=st.booleans(),
    live=st.booleans(),
)
counts = st.integers(1, 2**40)
timeouts = st.none() | st.floats(0.001, 1e7)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "abandon": st.lists(ids, max_size=3),
    "action": words,
    "after_seq": st.integers(-1, 2**31),
    "age_s": numbers,
    "again": st.none() | st.booleans(),
    "agent": words,
    "attempt": attempts,
    "cache": st.booleans(),
    "cached": st.booleans(),
    "code": words,
    "connection_id": words,
    "data": maps,
    "details": maps,
    "detach": st.booleans(),
    "engine": words,
    "eta_s": st.none() | numbers,
    "fingerprint": words,
    "format": st.none() | formats,
    "fraction": st.floats(0, 1),
    "from_seq": seqs,
    "gone": maps,
    "group": st.none() | words,
    "inputs": st.dictionaries(names, infos, max_size=3),
    "instance": ids,
    "key": st.booleans(),
    "last": st.none() | st.booleans(),
    "limit": st.integers(1, MAX_FOUND),
    "limits": maps,
    "mark": st.none() | st.dictionaries(words, offsets, max_size=2),
    "media_type": st.none() | st.sampled_from(["image/png", "text/plain; charset=utf-8"]),
    "message": words,
    "more": st.booleans(),
    "name": names,
    "next_seq": seqs,
    "of": counts,
    "offset": offsets,
    "options": maps,
    "output": words,
    "params": maps,
    "pcm": st.binary(max_size=200),
    "ping_interval_s": st.floats(0.01, 3600),
    "position": counts,
    "prefix": st.text("0123456789abcdef", max_size=32),
    "principal": words,
    "principals": st.lists(words, max_size=3),
    "priority": st.integers(0, 9),
    "pts": offsets,
    "queue_timeout_s": timeouts,
    "readonly": st.booleans(),
    "reason": words,
    "reproducible": st.booleans(),
    "streams": st.booleans(),
    "request_id": ids,
    "requests": st.lists(maps, max_size=3),
    "result": maps,
    "resume": running,
    "retry": st.sampled_from(["never", "before_output", "always"]),
    "retry_after_s": st.none() | numbers,
    "retryable": st.booleans(),
    "role": st.sampled_from(["client", "worker", "operator"]),
    "run_timeout_s": timeouts,
    "running": running,
    "seq": seqs,
    "server": words,
    "server_time": st.none() | numbers,
    "shared": st.booleans(),
    "slots": st.integers(0, 1000),
    "space": spaces,
    "spaces": st.lists(maps, max_size=3),
    "state": st.sampled_from(["queued", "running", "failed"]),
    "states": st.lists(st.sampled_from(["queued", "running", "failed"]), max_size=3),
    "steer_id": words,
    "target": words,
    "timestamp": numbers,
    "token": st.none() | words,
    "topics": st.lists(words, max_size=3),
    "total": st.integers(0, 2**31),
    "version": st.integers(1, 1000),
    "video": st.none() | videos,
    "wait_s": numbers,
    "worker": words,
    "worker_id": words,
}
#: Where a field's rule is another than elsewhere.
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "assign.attempt": st.integers(1, 1_000_000),
    "assign.run_timeout_s": st.floats(0, 1e9),
    "hello.video": st.none() | st.booleans(),
    "error.request_id": st.none() | words,
    "find.spaces": st.lists(spaces, max_size=3),
    "input.data": st.binary(max_size=200),
    "video.data": st.binary(max_size=200),
    "output.more": st.none() | st.booleans(),
    "output.data": values.filter(lambda value: value is not None),
    "progress.state": st.sampled_from(["loading", "generating", "encoding"]),
    "register.inputs": st.dictionaries(names, rules, max_size=2),
    "register.spaces": st.lists(spaces, min_size=1, max_size=3),
    "rejected.request_id": st.none() | words,
    "status.inputs": maps,
    "status.code": st.none() | words,
    "status.message": st.none() | words,
    "status.position": st.none() | counts,
    "status.of": st.none() | counts,
}


def messages_of(cls: type[Message]) -> st.SearchStrategy[Message]:
    fields = (attribute.name for attribute in attrs.fields(cls))  # type: ignore[arg-type]
    ruled = {name: f"{cls.TYPE}.{name}" for name in fields}
    return st.builds(cls, **{name: SPECIAL[key] if key in SPECIAL else FIELDS[name] for name, key in ruled.items()})


any_message = st.sampled_from(CLASSES).flatmap(messages_of)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@given(data=st.data())
@settings(max_examples=30)
def test_every_message_survives_the_wire(cls: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages_of(cls))
    packed = encode(message)
    for table in TABLES:
        if table.get(cls.TYPE) is cls:
            assert decode(packed, table) == message
    assert msgpack.unpackb(packed)["type"] == cls.TYPE


# -- whatever the bytes ----------------------------------------------------------------------------------------------


def taken_or_refused(data: bytes) -> None:
    for table in TABLES:
        told = None
        try:
            message = decode(data, table)
        except ProtocolError as fault:
            told = str(fault)
        else:
            assert isinstance(message, Message)
        assert told is None or len(told) < 2000


@given(st.binary(max_size=300))
@settings(max_examples=1500)
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    taken_or_refused(data)
    taken_or_refused(b"\x81\xa4type" + data)


@given(any_message, st.data())
@settings(max_examples=800)
def test_any_damaged_message_is_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    packed = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(packed) - 1))
        how = data.draw(st.sampled_from(["change", "cut", "insert", "remove"]))
        if how == "change":
            packed[at] = data.draw(st.integers(0, 255))
        elif how == "cut" and at:
            del packed[at:]
        elif how == "insert":
            packed[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif len(packed) > 1:
            del packed[at]
    taken_or_refused(bytes(packed))


@given(any_message, st.sampled_from(sorted(FIELDS)), values)
@settings(max_examples=300)
def test_any_value_in_any_field_is_a_message_or_a_protocol_error(message: Message, field: str, value: Any) -> None:
    taken_or_refused(msgpack.packb({**message.to_map(), field: value}))
    for name, _attribute in message.field_names():
        taken_or_refused(msgpack.packb({**message.to_map(), name: value}))


@given(any_message, st.data())
@settings(max_examples=200)
def test_no_message_is_taken_when_cut_or_when_bytes_follow(message: Message, data: st.DataObject) -> None:
    packed = encode(message)
    with pytest.raises(ProtocolError):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(ProtocolError):
        unpack(packed + data.draw(st.binary(min_size=1, max_size=4)))


@given(any_message, st.dictionaries(words, values, min_size=1, max_size=3))
@settings(max_examples=200)
def test_keys_that_are_not_known_change_nothing(message: Message, more: dict[str, Any]) -> None:
    known = {attribute.name for attribute in attrs.fields(type(message))} | {"type"}  # type: ignore[arg-type]
    assume(not known & more.keys())
    table = next(table for table in TABLES if table.get(message.TYPE) is type(message))
    assert decode(msgpack.packb({**more, **message.to_map()}), table) == message


# -- golden bytes ----------------------------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    assert encode(Hello(version=1, role="client", token="t", agent="a")) == (
        b"\x86\xa4type\xa5hello\xa7version\x01\xa4role\xa6client\xa5token\xa1t\xa5agent\xa1a\xa8readonly\xc2"
    )
    assert encode(Audio(request_id=ID, attempt=1, seq=2, pcm=b"\x01\x00\xff\x7f")) == (
        b"\x85\xa4type\xa5audio\xaarequest_id\xd9\x20" + ID.encode() + b"\xa7attempt\x01\xa3seq\x02"
        b"\xa3pcm\xc4\x04\x01\x00\xff\x7f"
    )
    started = Started(request_id=ID, attempt=1, seq=0, format=AudioFormat(sample_rate=24_000))
    assert encode(started) == (
        b"\x85\xa4type\xa7started\xaarequest_id\xd9\x20" + ID.encode() + b"\xa7attempt\x01\xa3seq\x00"
        b"\xa6format\x83\xa8encoding\xa9pcm_s16le\xabsample_rate\xcd\x5d\xc0\xa8channels\x01"
    )
    completed = Completed(request_id=ID, attempt=1, seq=3, result={"duration_s": 0.5})
    assert encode(completed) == (
        b"\x85\xa4type\xa9completed\xaarequest_id\xd9\x20" + ID.encode() + b"\xa7attempt\x01\xa3seq\x03"
        b"\xa6result\x81\xaaduration_s\xcb\x3f\xe0\x00\x00\x00\x00\x00\x00"
    )


def test_other_packers_ways_of_writing_the_same_are_taken() -> None:
    # str 16 for a short string, an int as uint 64, a map 32: legal, and what some libraries send.
    wide = (
        b"\xdf\x00\x00\x00\x04\xda\x00\x04type\xa5hello\xa7version\xcf\x00\x00\x00\x00\x00\x00\x00\x01"
        b"\xa4role\xdb\x00\x00\x00\x06client\xa5token\xc0"
    )
    assert decode(wide, FROM_ANYONE) == Hello(version=1, role="client")


# -- limits ----------------------------------------------------------------------------------------------------------


def params(value: Any) -> bytes:
    packed: bytes = msgpack.packb({"type": "submit", "request_id": ID, "space": "tts", "params": value})
    return packed


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"": value}
    return value


def test_depth_is_counted_with_the_message_itself() -> None:
    decode(params(nested(MAX_DEPTH - 1)), FROM_CLIENT)
    with pytest.raises(ProtocolError, match="deeper than 16"):
        decode(params(nested(MAX_DEPTH)), FROM_CLIENT)


@pytest.mark.parametrize("opening", [b"\x81\xa0", b"\x91", b"\xdc\x00\x01", b"\xde\x00\x01\xa0"])
def test_ten_thousand_levels_are_refused_without_recursion(opening: bytes) -> None:
    with pytest.raises(ProtocolError, match="deeper"):
        unpack(b"\x81\xa0" + opening * 10_000 + b"\xc0")


def test_maps_and_arrays_have_their_own_limits() -> None:
    assert unpack(params({str(number): 0 for number in range(MAX_MAP)}))
    with pytest.raises(ProtocolError, match="map of 65"):
        unpack(params({str(number): 0 for number in range(MAX_MAP + 1)}))
    assert unpack(params({"": [0] * MAX_ARRAY}))
    with pytest.raises(ProtocolError, match="array of 1025"):
        unpack(params({"": [0] * (MAX_ARRAY + 1)}))


def test_values_and_containers_are_counted_over_the_whole_message() -> None:
    assert unpack(params([[0] * 1000] * 15))
    with pytest.raises(ProtocolError, match=f"more than {MAX_VALUES} values"):
        unpack(params([[0] * 1000] * 17))
    with pytest.raises(ProtocolError, match=f"more than {MAX_CONTAINERS} maps"):
        unpack(params([[[]] * 1000] * 5))


def test_a_control_message_ends_at_64_kib_and_a_bulk_one_at_1_mib() -> None:
    fits = "x" * (MAX_CONTROL_BYTES - 200)
    decode(params({"text": fits}), FROM_CLIENT)
    with pytest.raises(ProtocolError, match="limit for this type is 65536"):
        decode(params("x" * MAX_CONTROL_BYTES), FROM_CLIENT)
    more = MAX_CONTROL_BYTES - len(params({"text": fits}))
    assert len(params({"text": fits + more * "x"})) == MAX_CONTROL_BYTES
    decode(params({"text": fits + more * "x"}), FROM_CLIENT)
    pack(unpack(params({"text": fits + more * "x"})))
    for longer in (1, 2):
        with pytest.raises(ProtocolError, match=r"limit for this type is 65536|nested deeper"):
            decode(params({"text": fits + (more + longer) * "x"}), FROM_CLIENT)
    whole = Audio(request_id=ID, attempt=1, seq=0, pcm=bytes(MAX_PCM_BYTES))
    assert decode(encode(whole), FROM_WORKER) == whole
    assert len(encode(whole)) <= MAX_MESSAGE_BYTES
    with pytest.raises(ProtocolError, match="limit is 1048576"):
        unpack(msgpack.packb({"type": "audio", "pcm": bytes(MAX_MESSAGE_BYTES)}))
    assert {"audio", "video", "input", "output"} == BULK


def test_a_large_message_must_be_flat() -> None:
    wire = {"type": "output", "request_id": ID, "attempt": 1, "seq": 0, "data": bytes(70_000)}
    decode(msgpack.packb(wire), FROM_WORKER)
    with pytest.raises(ProtocolError, match="deeper than 1"):
        decode(msgpack.packb({**wire, "data": [bytes(70_000)]}), FROM_WORKER)


def test_an_input_piece_ends_at_256_kib() -> None:
    decode(encode(Input(request_id=ID, name="voice", offset=0, data=bytes(256 * 1024))), FROM_CLIENT)
    with pytest.raises(ProtocolError, match="limit is 262144"):
        decode(
            msgpack.packb({"type": "input", "request_id": ID, "name": "a", "offset": 0, "data": bytes(262_145)}),
            FROM_CLIENT,
        )


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc0", id="nil"),
        pytest.param(b"\x90", id="an array"),
        pytest.param(b"\xa5hello", id="a string"),
        pytest.param(b"\x81\x01\x02", id="an integer key"),
        pytest.param(b"\x81\xc4\x01a\x02", id="a binary key"),
        pytest.param(b"\x81\x90\x02", id="an array as key"),
        pytest.param(b"\x81\xa1a\xc1", id="the byte never used"),
        pytest.param(b"\x81\xa1a\xd4\x01\x00", id="an extension"),
        pytest.param(b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", id="a timestamp"),
        pytest.param(b"\x81\xa1a\xc7\xff\x01", id="an extension cut short"),
        pytest.param(b"\x81\xa1a\xa1\xff", id="no UTF-8"),
        pytest.param(b"\x81\xa1\xff\x01", id="a key that is no UTF-8"),
        pytest.param(b"\x81\xa1a\xdb\xff\xff\xff\xff", id="a string of 4 GiB"),
        pytest.param(b"\x81\xa1a\xc6\xff\xff\xff\xff", id="binary of 4 GiB"),
        pytest.param(b"\x81\xa1a\xdd\xff\xff\xff\xff", id="an array of 4 G"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map of 4 G"),
        pytest.param(b"\x80" * 1000, id="many maps"),
    ],
)
def test_bad_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(data)


def test_an_unknown_type_is_told_apart_and_says_what_is_taken() -> None:
    with pytest.raises(UnknownType, match="'dance' is not accepted here; accepted: attach, cancel") as fault:
        decode(msgpack.packb({"type": "dance"}), FROM_CLIENT)
    assert fault.value.code is ErrorCode.UNKNOWN_TYPE
    with pytest.raises(UnknownType):
        decode(encode(Hello(version=1, role="client")), FROM_CLIENT)
    with pytest.raises(UnknownType):
        decode(encode(Audio(request_id="a" * 32, attempt=1, seq=1, pcm=b"ab")), FROM_CLIENT)
    for wire in ({}, {"type": 1}, {"type": None}, {"type": b"hello"}):
        with pytest.raises(ProtocolError, match="no string 'type'"):
            decode(msgpack.packb(wire), FROM_ANYONE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"space": None}, "space: must be a string, not nil"),
        ({"space": "a b"}, "'a b' is not a space name"),
        ({"request_id": "ABC"}, "request id"),
        ({"priority": 10}, "priority: is 10; it must lie in 0..9"),
        ({"priority": True}, "priority: must be an integer, not boolean"),
        ({"priority": 5.0}, "priority: must be an integer, not float"),
        ({"queue_timeout_s": -1}, "queue_timeout_s"),
        ({"queue_timeout_s": float("nan")}, "queue_timeout_s"),
        ({"detach": 1}, "detach: must be true or false"),
        ({"params": []}, "params: must be a map, not array"),
        ({"inputs": {"Voice": {}}}, "inputs: 'Voice' is not an input name"),
        ({"inputs": {"voice": {"media_type": "a", "size": -1, "sha256": "0" * 64}}}, "size"),
        ({"inputs": {"voice": {"media_type": "a"}}}, "lacks size, sha256"),
        ({"retry": "sometimes"}, "retry: must be one of never, before_output, always"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], words: str) -> None:
    wire = {"type": "submit", "request_id": ID, "space": "tts", **change}
    with pytest.raises(ProtocolError, match=rf"^submit\..*{words}|^submit\.{words}"):
        decode(msgpack.packb(wire), FROM_CLIENT)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ProtocolError, match="submit: lacks request_id, space"):
        decode(msgpack.packb({"type": "submit"}), FROM_CLIENT)


# -- what it costs ---------------------------------------------------------------------------------------------------


class CountedBytes(bytes):
    """Counts the single bytes looked at: one a value, so the work of the walk."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, int):
            CountedBytes.looks += 1
        return super().__getitem__(at)


FULL = MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x81\xa0" + b"\x80" * (FULL - 2), id="empty maps"),
        pytest.param(b"\x81\xa0\xdc\x04\x00" + b"\x80" * (FULL - 5), id="an array of empty maps"),
        pytest.param(b"\x81\xa0" + b"\xdc\x04\x00" * (FULL // 3 - 1), id="arrays in arrays"),
        pytest.param(b"\x81\xa0\xdd\x00\x0f\xff\xf0" + b"\x00" * (FULL - 7), id="one long array"),
        pytest.param(b"\xde\xff\xff" + b"\xa0\xc0" * (FULL // 2 - 2), id="one long map"),
        pytest.param((b"\x81\xa0" + (b"\xdc\x04\x00" + b"\x00" * 1024) * 60)[:MAX_CONTROL_BYTES], id="zeros in arrays"),
        pytest.param((b"\x81\xa0\xdc\x04\x00" + b"\x91\x90" * 40_000)[:MAX_CONTROL_BYTES], id="small arrays"),
        pytest.param(b"\xc1" * FULL, id="garbage"),
    ],
)
def test_the_work_on_hostile_bytes_is_bounded_and_nothing_is_built(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(_data: bytes) -> None:
        pytest.fail("built from hostile bytes")

    monkeypatch.setattr(msgpack, "unpackb", build)
    CountedBytes.looks = 0
    with pytest.raises(ProtocolError):
        unpack(CountedBytes(data))
    assert CountedBytes.looks <= MAX_VALUES + MAX_CONTAINERS + 2


def test_the_most_that_is_taken_is_bounded_too() -> None:
    rows = [[0] * 1000] * 16
    most = msgpack.packb({"type": "x", "params": rows})
    CountedBytes.looks = 0
    check_bytes(CountedBytes(most))
    assert 16_000 < CountedBytes.looks <= MAX_VALUES + 2


# -- our own faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(object(), id="no word for it"),
        pytest.param(2**64, id="integer too large"),
        pytest.param("x" * MAX_CONTROL_BYTES, id="too long"),
        pytest.param(nested(MAX_DEPTH), id="too deep"),
        pytest.param([0] * (MAX_ARRAY + 1), id="array too long"),
        pytest.param({1: 2}, id="integer key"),
        pytest.param("\ud800", id="half a surrogate pair"),
        pytest.param(msgpack.Timestamp(0), id="a timestamp"),
    ],
)
def test_what_the_wire_cannot_carry_is_an_encode_error(value: Any) -> None:
    with pytest.raises(EncodeError, match="submit"):
        encode(Submit(request_id=ID, space="tts", params={"value": value}))


@pytest.mark.parametrize(
    ("params", "fields"),
    [
        ({"a": "good \ud83d"}, {"params.a": "is not UTF-8 at character 6"}),
        ({"a\udce9": 1}, {"params.a?": "is not UTF-8 at character 2"}),
        ({"a": [1, {"n": 10**29}], "b": -(2**63) - 1}, {"params.a.1.n": "is a whole number", "params.b": "is a whole"}),
        ({"a": "x" * 70_000, "b": "é" * 100}, {"params.a": "has 70000 bytes"}),
        ({"a": {str(key): 0 for key in range(65)}}, {"params.a": "has 65 entries, and may have 64"}),
        ({"a": [0] * 1025}, {"params.a": "has 1,025 items, and may have 1,024"}),
        ({"a": {1: 2}}, {"params.a": "has the key 1"}),
        ({"a": {1}}, {"params.a": "is set"}),
    ],
)
def test_an_encode_error_names_the_values_that_are_at_fault(params: Any, fields: dict[str, str]) -> None:
    with pytest.raises(EncodeError) as caught:
        encode(Submit(request_id=ID, space="tts", params=params))
    assert [*caught.value.fields] == [*fields]
    for name, words in fields.items():
        assert caught.value.fields[name].startswith(words)
        assert f"{name} {words}" in str(caught.value)


def test_a_large_output_is_not_said_to_be_too_deep() -> None:
    with pytest.raises(EncodeError, match=r"data.log has 200000 bytes") as caught:
        encode(Output(request_id=ID, attempt=1, seq=1, data={"log": "x" * 200_000}))
    assert "nested" not in str(caught.value)


def test_an_endless_value_is_an_encode_error() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(EncodeError):
        encode(Submit(request_id=ID, space="tts", params=endless))


def test_an_output_may_be_any_value_or_large_binary() -> None:
    for value in (1, "text", [1, {"a": b"\0"}], bytes(900_000), struct.pack("<f", 1.0), False):
        message = Output(request_id=ID, attempt=1, seq=1, data=value)
        assert decode(encode(message), FROM_WORKER) == message
    with pytest.raises(EncodeError):
        encode(Output(request_id=ID, attempt=1, seq=1, data=["x" * 70_000]))


def test_text_that_is_no_utf_8_is_told_by_its_places() -> None:
    wire = {"type": "submit", "params": {"text": "BAD", "a": ["ok", {"BAD": "gut 好"}]}, "space": "tts"}
    with pytest.raises(BadText) as caught:
        unpack(msgpack.packb(wire).replace(b"BAD", b"\xff\xfe\xfd"))
    assert caught.value.fields == dict.fromkeys(("params.text", "params.a.1.???"), "holds bytes that are no UTF-8")
    assert unpack(repair(caught.value)) == {
        "type": "submit",
        "params": {"text": "???", "a": ["ok", {"???": "gut 好"}]},
        "space": "tts",
    }


def test_an_output_of_an_older_peer_lacks_a_media_type_and_an_older_peer_drops_it() -> None:
    new = Output(request_id="0" * 32, attempt=1, seq=1, data=b"x", media_type="image/png")
    wire = {name: value for name, value in new.to_map().items() if name not in ("media_type", "more")}
    old = decode(pack(wire), FRAMES)
    assert isinstance(old, Output)
    assert (old.data, old.media_type, old.more) == (b"x", None, None)
    assert b"more" not in encode(new)
    later = decode(pack(new.to_map() | {"of_a_later_version": [1]}), FRAMES)
    assert later == new


@pytest.mark.parametrize("wrong", ["png", "image/png\r\nx: y", "a/" + "b" * 200, 7, b"image/png"])
def test_a_media_type_that_is_none_is_refused(wrong: Any) -> None:
    wire = Output(request_id="0" * 32, attempt=1, seq=1, data=b"x").to_map()
    with pytest.raises(ProtocolError, match="media_type"):
        decode(pack(wire | {"media_type": wrong}), FRAMES)
