"""The bytes of events."""

import io
import json
from typing import Any

import pytest
import wyoming.event
from hypothesis import given
from hypothesis import strategies as st

from relayd.wyoming.events import (
    MAX_DATA_BYTES,
    MAX_LINE_BYTES,
    MAX_PAYLOAD_BYTES,
    VERSION,
    Event,
    EventFault,
    EventParser,
)
from tests.support.wyoming_client import line

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
EVENTS = st.builds(
    Event, TEXTS, st.dictionaries(TEXTS, st.integers() | TEXTS | st.lists(TEXTS), max_size=4), st.binary(max_size=50)
)


def parse(data: bytes, step: int) -> list[Event]:
    parser, found = EventParser(), []
    for start in range(0, len(data), step):
        parser.feed(data[start : start + step])
        while (event := parser.next()) is not None:
            found.append(event)
    assert not parser.is_amid
    return found


@given(st.lists(EVENTS, max_size=4), st.integers(1, 200))
def test_events_are_the_same_however_their_bytes_are_cut(events: list[Event], step: int) -> None:
    assert parse(b"".join(event.encode() for event in events), step) == events


@given(
    st.binary(max_size=300) | st.lists(EVENTS, max_size=2).map(lambda events: b"".join(e.encode() for e in events)[1:])
)
def test_any_bytes_are_events_or_a_fault(data: bytes) -> None:
    def outcome(step: int) -> Any:
        parser, found = EventParser(), []
        try:
            for start in range(0, len(data), step):
                parser.feed(data[start : start + step])
                while (event := parser.next()) is not None:
                    found.append(event)
        except EventFault as fault:
            return found, fault.message
        return found, parser.is_amid

    assert outcome(1) == outcome(1000)


def test_data_may_be_in_the_line_as_older_peers_have_it() -> None:
    data = line(type="describe", data={"a": 1, "b": 2}, data_length=8) + b'{"b": 3}'
    assert parse(data, 5) == [Event("describe", {"a": 1, "b": 3})]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"GET / HTTP/1.1\r\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b"[" * 10_000 + b"\n", "not JSON"),
        (b"1" * 5_000 + b"\n", "not JSON"),
        (b"[]\n", "must be a JSON object"),
        (line(type=3), "must have a `type`"),
        (line(data={}), "must have a `type`"),
        (line(type="x", data=[]), "must be an object"),
        (line(type="x", data_length=-1), "data_length must be a number of bytes"),
        (line(type="x", data_length=True), "data_length must be a number of bytes"),
        (line(type="x", data_length="9"), "data_length must be a number of bytes"),
        (line(type="x", payload_length=1.5), "payload_length must be a number of bytes"),
        (line(type="x", data_length=MAX_DATA_BYTES + 1), f"send events of at most {MAX_DATA_BYTES} bytes"),
        (line(type="x", payload_length=MAX_PAYLOAD_BYTES + 1), f"send events of at most {MAX_PAYLOAD_BYTES} bytes"),
        (line(type="x", payload_length=10**300), "send events of at most"),
        (line(type="x", data_length=4) + b"nope", "the data is not JSON"),
        (line(type="x", data_length=2) + b"[]", "the data must be a JSON object"),
        (b"{" + b" " * MAX_LINE_BYTES, "the data belongs behind it"),
        (b"x" * MAX_LINE_BYTES, "this is not the Wyoming protocol"),
    ],
)
def test_what_is_no_event_is_refused_in_words_before_more_of_it_is_kept(data: bytes, told: str) -> None:
    parser = EventParser()
    parser.feed(data)
    with pytest.raises(EventFault) as refused:
        parser.next()
    assert told in refused.value.message
    assert len(refused.value.message) < 300


def test_half_a_character_in_a_text_is_refused() -> None:
    parser = EventParser()
    parser.feed(line(type="synthesize", data={"text": "\ud83d", "voice": 3}))
    event = parser.next()
    assert event is not None
    for read in (event.text, lambda: event.table("voice"), lambda: event.text("more"), lambda: event.optional("voice")):
        with pytest.raises(EventFault, match="synthesize"):
            read()


def test_the_package_reads_and_writes_the_same_events() -> None:
    ours = Event("synthesize", {"text": "Grüße"}, b"\0\n")
    read = wyoming.event.read_event(io.BytesIO(ours.encode()))
    assert read is not None
    assert Event(read.type, read.data, read.payload or b"") == ours
    written = io.BytesIO()
    wyoming.event.write_event(read, written)
    assert parse(written.getvalue(), 7) == [ours]
    assert json.loads(written.getvalue().partition(b"\n")[0])["version"] == VERSION
