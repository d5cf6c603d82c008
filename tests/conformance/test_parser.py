"""The parser alone, without a socket: the same table, and whatever else Hypothesis thinks of, however it is chopped."""

import tracemalloc
from collections.abc import Iterator

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol.link.websocket_frames import (
    NO_CODE,
    TRY_AGAIN_LATER,
    Close,
    Event,
    Fault,
    Parser,
    PartialBudget,
    Ping,
    Pong,
    close_payload,
    make_frame,
)
from tests.conformance import closing, framing, unicode
from tests.conformance.cases import INVALID_DATA, PROTOCOL_ERROR, TOO_BIG, Case
from tests.conformance.frames import (
    KEY,
    Opcode,
    ServerFrame,
    ServerFrames,
    binary,
    close,
    fragmented,
    frame,
    masked,
    more,
    ping,
    text,
)
from tests.conformance.peer import Message

MAX_MESSAGE_BYTES = 16 << 20
CHOPS = (1, 2, 3, 5, 7, 64, 1000)


def cut(octets: bytes, chop: int) -> Iterator[bytes]:
    """Pieces of `chop` octets; 0: one piece."""
    size = chop or max(1, len(octets))
    return (octets[at : at + size] for at in range(0, len(octets), size))


def parsed(
    pieces: Iterator[bytes], *, from_client: bool = True, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> list[Event]:
    """What a parser makes of it."""
    parser = Parser(masked=from_client, max_message_bytes=max_message_bytes)
    events: list[Event] = []
    for piece in pieces:
        parser.feed(piece)
        assert parser.all_binary == all(type(event) is bytes for event in parser.events)
        events += parser.pop_events()
    return events


def messages(events: list[Event]) -> tuple[Message, ...]:
    """The messages among them."""
    return tuple(
        Message(Opcode.TEXT, event.encode()) if isinstance(event, str) else Message(Opcode.BINARY, event)
        for event in events
        if isinstance(event, bytes | str)
    )


@pytest.mark.parametrize("case", [*framing.CASES, *unicode.CASES, *closing.CASES], ids=lambda case: case.promise)
def test_the_parser_agrees_however_it_is_chopped(case: Case) -> None:
    events = parsed(cut(case.sent, 0))
    assert messages(events) == case.messages
    assert tuple(event.payload for event in events if isinstance(event, Ping)) == case.pongs
    last = events[-1] if events else None
    if case.breaks:
        assert isinstance(last, Fault)
        assert last.code == case.code
    elif case.closes:
        assert isinstance(last, Close)
        assert last.code == (NO_CODE if case.code is None else case.code)
    else:
        assert not isinstance(last, Fault | Close)
    for chop in CHOPS if len(case.sent) < 5000 else CHOPS[-1:]:
        assert parsed(cut(case.sent, chop)) == events, f"in pieces of {chop}"


# -- what Hypothesis thinks of ---------------------------------------------------------------------------------------

payloads = st.one_of(
    st.binary(max_size=140),
    st.text(max_size=40).map(str.encode),
    st.sampled_from((125, 126, 127, 65535, 65536, 70_000)).map(
        lambda size: b"\xc3\xa9" * (size // 2) + b"." * (size % 2)
    ),
)
#: Any frame at all: most break a rule.
any_frames = st.builds(
    frame,
    st.integers(0, 15),
    payloads,
    fin=st.booleans(),
    rsv=st.sampled_from((0, 0, 0, 0, 1, 4)),
    key=st.one_of(st.binary(min_size=4, max_size=4), st.just(KEY), st.none()),
    announced=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 2**64 - 1)),
).filter(lambda octets: len(octets) < 80_000)
#: Frames that mostly are none.
octet_streams = st.lists(st.one_of(any_frames, st.binary(max_size=20)), max_size=8).map(b"".join)


def cuts(data: st.DataObject, octets: bytes) -> Iterator[bytes]:
    """Pieces as Hypothesis likes them."""
    at = sorted(set(data.draw(st.lists(st.integers(0, len(octets)), max_size=12))))
    return (octets[begin:end] for begin, end in zip([0, *at], [*at, len(octets)], strict=True))


@settings(deadline=None)
@given(st.data(), octet_streams, st.booleans(), st.sampled_from((100, 70_000, MAX_MESSAGE_BYTES)))
def test_any_octets_in_any_pieces_are_the_same_events(
    data: st.DataObject, octets: bytes, from_client: bool, most: int
) -> None:
    whole = parsed(cut(octets, 0), from_client=from_client, max_message_bytes=most)
    assert parsed(cuts(data, octets), from_client=from_client, max_message_bytes=most) == whole
    assert not any(isinstance(event, Fault | Close) for event in whole[:-1]), "something came behind the end"
    assert all(len(message.payload) <= most for message in messages(whole))


@settings(deadline=None)
@given(
    st.one_of(any_frames, st.builds(frame, st.sampled_from((2, 10)), payloads, key=st.just(KEY))),
    st.sampled_from((b"", frame(1, b"a", fin=False, key=KEY), frame(8, b"", key=KEY))),
    st.booleans(),
    st.sampled_from((100, 70_000)),
)
def test_what_is_told_at_a_glance_is_what_is_parsed(octets: bytes, before: bytes, from_client: bool, most: int) -> None:
    parser = Parser(masked=from_client, max_message_bytes=most)
    parser.feed(before)
    parser.pop_events()
    view = memoryview(octets)
    message, pong = (look(octets, view, len(octets)) for look in (parser.parse_single, parser.parse_single_pong))
    parser.feed(octets)
    events = parser.pop_events()
    assert message is None or (events == [message] and not parser.partial_frame)
    assert pong is None or (events == [Pong(pong)] and not parser.partial_frame)


def test_the_usual_message_and_pong_are_told_at_a_glance() -> None:
    parser = Parser(masked=True, max_message_bytes=MAX_MESSAGE_BYTES)
    for size in (126, 7_750, 65_535):
        octets = frame(2, b"x" * size, key=KEY)
        assert parser.parse_single(octets, memoryview(octets), len(octets)) == b"x" * size
    octets = frame(10, b"1234", key=KEY)
    assert parser.parse_single_pong(octets, memoryview(octets), len(octets)) == b"1234"


@given(st.lists(st.tuples(st.sampled_from((125, 126, 300, 301, 7_680)), st.integers(1, 5)), max_size=12), st.data())
def test_messages_of_one_length_and_of_another_come_as_they_were_sent(
    runs: list[tuple[int, int]], data: st.DataObject
) -> None:
    sent = [bytes([number % 256]) * size for size, count in runs for number in range(count)]
    octets = b"".join(frame(2, each, key=KEY) for each in sent)
    assert parsed(cut(octets, 0)) == parsed(cuts(data, octets)) == sent


@attrs.frozen
class Spoken:
    """Frames, and the events that they must make."""

    octets: bytes
    events: list[Event]


@st.composite
def conversations(draw: st.DrawFn) -> Spoken:
    """What keeps all rules: messages, some in fragments, with control frames between them and inside."""
    octets, events = b"", list[Event]()
    keys = st.binary(min_size=4, max_size=4)

    def controls() -> None:
        nonlocal octets
        for opcode, payload in draw(
            st.lists(st.tuples(st.sampled_from((Opcode.PING, Opcode.PONG)), st.binary(max_size=125)), max_size=2)
        ):
            octets += frame(opcode, payload, key=draw(keys))
            events.append(Ping(payload) if opcode is Opcode.PING else Pong(payload))

    for _ in range(draw(st.integers(0, 4))):
        controls()
        of_text = draw(st.booleans())
        payload = draw(st.text(max_size=60)).encode() if of_text else draw(payloads)
        bounds = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=4)))
        pieces = [payload[begin:end] for begin, end in zip([0, *bounds], [*bounds, len(payload)], strict=True)]
        opcode = Opcode.TEXT if of_text else Opcode.BINARY
        for number, piece in enumerate(pieces):
            if number:
                controls()
            octets += frame(opcode, piece, fin=number == len(pieces) - 1, key=draw(keys))
            opcode = Opcode.CONTINUATION
        events.append(payload.decode() if of_text else payload)
    if draw(st.booleans()):
        code, reason = draw(st.sampled_from(closing.MEANT)), draw(st.text(max_size=30))
        octets += frame(Opcode.CLOSE, code.to_bytes(2) + reason.encode(), key=draw(keys)) + draw(st.binary(max_size=30))
        events.append(Close(code, reason))
    return Spoken(octets, events)


@settings(deadline=None)
@given(st.data(), conversations())
def test_what_keeps_the_rules_is_heard_as_it_was_said(data: st.DataObject, spoken: Spoken) -> None:
    assert parsed(cuts(data, spoken.octets)) == spoken.events


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(1, 40))
@example(b"\xf0\x9f\x98\x80", 1)
@example(b"\xed\xa0\x80", 2)
@example(b"\xf4\x90\x80\x80", 3)
def test_a_text_is_taken_where_python_takes_it_for_utf_8(octets: bytes, size: int) -> None:
    sent = fragmented(Opcode.TEXT, octets, size)
    for chop in (0, 1):
        (event,) = parsed(cut(sent, chop))
        try:
            assert event == octets.decode()
        except UnicodeDecodeError:
            assert isinstance(event, Fault)
            assert event.code == INVALID_DATA


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
@pytest.mark.parametrize("most", [100, 125, 126, 65535, 65536])
@pytest.mark.parametrize("pieces", [1, 2, 99])
def test_messages_may_be_as_long_as_the_limit_and_no_longer(opcode: Opcode, most: int, pieces: int) -> None:
    for chop in (0, 999):
        sent = fragmented(opcode, b"." * most, most // pieces) * 2
        events = parsed(cut(sent, chop), max_message_bytes=most)
        assert messages(events) == (Message(opcode, b"." * most),) * 2
        sent = fragmented(opcode, b"." * (most + 1), most // pieces)
        (event,) = parsed(cut(sent, chop), max_message_bytes=most)
        assert isinstance(event, Fault)
        assert event.code == TOO_BIG


def test_control_frames_count_for_no_limit() -> None:
    sent = binary(b"12345", fin=False) + ping(b"*" * 125) + more(b"67890")
    assert parsed(cut(sent, 0), max_message_bytes=10) == [Ping(b"*" * 125), b"1234567890"]


# -- the other end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chop", [0, *CHOPS])
def test_a_client_hears_what_a_server_sends_however_it_is_chopped(chop: int) -> None:
    bodies = [bytes(range(256))[:size] for size in (0, 1, 125, 126, 127, 256)]
    if chop not in (1, 2, 3, 5, 7):  # so many looks at so long a frame show nothing new
        bodies.append(bytes(range(256)) * 256)
    sent = b"".join(frame(Opcode.BINARY, one, key=None) for one in bodies)
    sent += frame(Opcode.TEXT, b"\xc3", fin=False, key=None) + frame(Opcode.PING, b"?", key=None)
    sent += frame(Opcode.CONTINUATION, b"\xa9", key=None) + frame(Opcode.CLOSE, b"\x03\xe9", key=None)
    assert parsed(cut(sent, chop), from_client=False) == [*bodies, Ping(b"?"), "\u00e9", Close(1001, "")]


@pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY, Opcode.PING, Opcode.PONG, Opcode.CLOSE])
def test_a_client_refuses_what_a_server_masked(opcode: Opcode) -> None:
    (event,) = parsed(cut(frame(opcode), 1), from_client=False)
    assert isinstance(event, Fault)
    assert event.code == PROTOCOL_ERROR


# -- what goes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
def test_what_the_relay_sends_is_a_frame(opcode: Opcode, size: int) -> None:
    payload = b"." * size
    assert ServerFrames().feed(make_frame(opcode, payload, masked=False)) == [ServerFrame(opcode, True, payload)]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
def test_what_a_client_sends_is_a_masked_frame(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    payload = payload[:size]
    sent = make_frame(Opcode.BINARY, payload, masked=True)
    key = sent[len(sent) - size - 4 : len(sent) - size]
    assert sent == frame(Opcode.BINARY, payload, key=key)
    assert masked(sent[len(sent) - size :], key) == payload
    assert sent != make_frame(Opcode.BINARY, payload, masked=True), "the key can be guessed"


@settings(deadline=None)
@given(st.sampled_from(closing.MEANT), st.text(max_size=200))
@example(1000, "*" * 123)
@example(1000, "*" * 124)
@example(1000, "\u00e9" * 70)
@example(1000, "\U0001f600" * 40)
def test_a_reason_of_any_length_makes_a_close_frame(code: int, reason: str) -> None:
    (sent,) = ServerFrames().feed(make_frame(Opcode.CLOSE, close_payload(code, reason), masked=False))
    assert int.from_bytes(sent.payload[:2]) == code
    assert reason.startswith(sent.payload[2:].decode())
    assert len(reason.encode()) - len(sent.payload) + 2 < 4 or len(sent.payload) > 125 - 4


def test_a_close_without_a_code_has_no_payload() -> None:
    assert close_payload(NO_CODE, "") == b""


# -- memory ----------------------------------------------------------------------------------------------------------


def grown_bytes(parser: Parser, octets: bytes) -> int:
    """How much more Python has allocated once a parser was fed so, at the most."""
    tracemalloc.start()
    try:
        parser.feed(octets)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_empty_fragments_without_end_take_no_memory() -> None:
    parser = Parser(masked=True, max_message_bytes=MAX_MESSAGE_BYTES)
    parser.feed(text("", fin=False))
    assert grown_bytes(parser, more(fin=False) * 5_000) < 16 << 10


def test_a_message_in_fragments_of_one_octet_takes_little_more_memory_than_it_is_long() -> None:
    parser = Parser(masked=True, max_message_bytes=MAX_MESSAGE_BYTES)
    parser.feed(binary(b"", fin=False))
    fragments = more(b"x", fin=False) * 5_000
    assert grown_bytes(parser, fragments) < 8 * 5_000


def test_a_frame_that_is_too_long_is_refused_before_room_is_made_for_it() -> None:
    for announced in (1 << 30, 1 << 62):
        parser = Parser(masked=True, max_message_bytes=MAX_MESSAGE_BYTES)
        assert grown_bytes(parser, frame(Opcode.BINARY, announced=announced)) < 16 << 10
        assert isinstance(parser.pop_events()[-1], Fault)


def test_nothing_is_kept_of_what_follows_the_end() -> None:
    for end in (close(), frame(3)):
        parser = Parser(masked=True, max_message_bytes=MAX_MESSAGE_BYTES)
        parser.feed(end)
        assert parser.over
        assert len(parser.pop_events()) == 1
        assert grown_bytes(parser, bytes(1 << 20)) < 16 << 10
        assert not parser.pop_events()


def budgeted(budget: PartialBudget) -> Parser:
    return Parser(masked=True, max_message_bytes=MAX_MESSAGE_BYTES, budget=budget)


WHOLE = binary(bytes(300 << 10))
HALF, REST = WHOLE[: 200 << 10], WHOLE[200 << 10 :]


def test_of_too_many_unfinished_messages_the_oldest_is_given_up() -> None:
    budget = PartialBudget(1 << 20)
    parsers = [budgeted(budget) for _ in range(5)]
    for parser in parsers:
        parser.feed(HALF)
    assert budget.held_bytes <= budget.max_bytes
    for parser in parsers:
        parser.feed(REST)
    events = [event for parser in parsers for event in parser.pop_events()]
    assert [event.code for event in events if isinstance(event, Fault)] == [TRY_AGAIN_LATER] * 2
    assert events[2:] == [bytes(300 << 10)] * 3
    assert budget.held_bytes == 0


@pytest.mark.parametrize("end", ["finished", "released", "closed"])
@pytest.mark.parametrize("fragmented", [False, True])
def test_a_budget_has_its_room_again_however_an_unfinished_message_ends(end: str, fragmented: bool) -> None:
    budget = PartialBudget(1 << 20)
    parser = budgeted(budget)
    whole = WHOLE
    if fragmented:
        parser.feed(binary(bytes(1_000), fin=False))
        assert budget.held_bytes == 1_000
        whole = more(bytes(300 << 10))
    parser.feed(whole[: 200 << 10])
    assert budget.held_bytes > 300 << 10
    if end == "released":
        parser.release()
    else:
        parser.feed(whole[200 << 10 :])
    if end == "closed":
        parser.feed(binary(b"x" * 1_000, fin=False) + close())
    assert budget.held_bytes == 0


def test_a_released_parser_holds_nothing_and_takes_nothing_more() -> None:
    parser = Parser(masked=True, max_message_bytes=MAX_MESSAGE_BYTES)
    parser.feed(binary(b"whole") + HALF)
    parser.release()
    parser.feed(binary(b"later"))
    assert (parser.events, parser.partial_frame, parser.large_frame, parser.over) == ([], b"", None, True)
