"""The log of one live input: whatever comes, the engine gets the bytes once and in order, or the feeder is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.wire.messages import MAX_UNACKED_BYTES
from relayd.requests.live_input import (
    BURST_S,
    KEPT_BYTES,
    ROW_BYTES,
    Fault,
    LiveInput,
    NeedsStored,
    Piece,
    PipedInput,
)

MIB = 1024 * 1024


def an_input(**fields: Any) -> LiveInput:
    return LiveInput(**({"rate": MIB} | fields))


def add(log: LiveInput, offset: int, data: bytes, *, last: bool = False, store: bytes = b"", most: int = MIB) -> Any:
    """Add a piece as the relay does, with `store` for what is no longer in memory."""
    added = log.add(offset, data, last=last, most=most, now=1.0)
    if isinstance(added, NeedsStored):
        older = store[added.offset : added.offset + added.size]
        assert len(older) == added.size, "only what is stored is asked for"
        added = log.add(offset, data, last=last, most=most, now=1.0, stored=older)
    return added


def store_all(log: LiveInput, store: bytearray) -> bool:
    """Store what has come; returns whether that was the end."""
    while log.is_pending:
        piece = log.next_piece()
        assert piece.offset == len(store)
        store += piece.data
        log.on_stored(piece, 1.0)
    return log.ended


cuts = st.tuples(st.integers(0, 60), st.integers(0, 20))
steps = st.lists(
    st.one_of(
        cuts.map(lambda cut: ("piece", *cut)),
        st.just(("next", 0, 7)),
        cuts.map(lambda cut: ("other", *cut)),
        st.sampled_from([("store", 0, 0), ("begin", 0, 0), ("finish", 0, 0), ("restart", 0, 0), ("forget", 0, 0)]),
    ),
    max_size=60,
)


@given(text=st.binary(max_size=50), steps=steps)
def test_any_pieces_in_any_order_over_restarts_give_the_bytes_once_and_in_order(
    text: bytes, steps: list[tuple[str, int, int]]
) -> None:
    """One feeder cuts, doubles and reorders the pieces of `text`; another sends other bytes."""
    log, store, begun = an_input(), bytearray(), None
    for kind, offset, size in [*steps, ("rest", 0, 0)]:
        offset = log.known if kind == "next" else min(offset, len(text))
        if kind in ("piece", "next"):
            data = text[offset : offset + size]
            last = offset + len(data) >= len(text)
            before = log.known
            added = add(log, offset, data, last=last, store=bytes(store))
            assert added == (Fault.GAP if offset > before else log.known - before), "what is true is never refused"
        elif kind == "other":
            known = text[: log.known]
            data = bytes(255 - byte for byte in known[offset : offset + size])
            if data:
                known_before, end_before = log.known, log.end
                assert add(log, offset, data, store=bytes(store)) is Fault.CONFLICT
                assert (log.known, log.end) == (known_before, end_before)
        elif kind == "begin" and begun is None and log.is_pending:
            begun = log.next_piece()
        elif kind in ("finish", "store", "restart", "rest") and begun is not None:
            store += begun.data
            log.on_stored(begun, 1.0)
            begun = None
        if kind == "store":
            store_all(log, store)
        elif kind == "forget":
            log.forget_below(log.known)
        elif kind == "restart":
            log = an_input(size=len(store), ended=log.ended)
        elif kind == "rest":
            add(log, log.known, text[log.known :], last=True)
            assert store_all(log, store)
        assert bytes(store) == text[: len(store)]
        assert log.size == len(store)
        if (kept := log.kept(max(0, log.size - 3), 9)) is not None:
            assert kept == bytes(store[max(0, log.size - 3) :])
    assert bytes(store) == text
    for late in (b"x", text + b"x"):
        assert add(log, len(text) + 1 - len(late), late, store=bytes(store)) is Fault.CONFLICT


def test_a_gap_other_bytes_and_a_second_end_are_refused_and_change_nothing() -> None:
    log = an_input()
    assert add(log, 0, b"hello") == 5
    assert add(log, 6, b"x") is Fault.GAP
    assert add(log, 3, b"xy") is Fault.CONFLICT
    assert add(log, 0, b"hel", last=True) is Fault.CONFLICT
    assert add(log, 5, b"", last=True) == 0
    assert add(log, 5, b"!") is Fault.CONFLICT
    assert add(log, 0, b"hell", last=True) is Fault.CONFLICT
    assert add(log, 0, b"hello", last=True) == 0
    assert add(log, 2, b"ll") == 0
    store = bytearray()
    assert store_all(log, store)
    assert store == b"hello"


def test_one_that_was_stored_whole_before_a_restart_takes_no_more() -> None:
    log = an_input(size=3, ended=True)
    assert add(log, 3, b"x") is Fault.CONFLICT
    assert add(log, 0, b"abc", last=True, store=b"abc") == 0
    assert not log.is_pending


def test_a_piped_input_whose_source_begins_anew_begins_anew() -> None:
    log = PipedInput(rate=MIB, source_id="2" * 32)
    add(log, 0, b"hello", last=True)
    assert store_all(log, bytearray())
    log.on_taken(2, 1.0)
    add(log, 5, b"", last=True)
    log.clear()
    assert (log.size, log.taken, log.known, log.ended, log.end) == (0, 0, 0, False, None)
    assert add(log, 0, b"other") == 5
    assert log.next_piece() == Piece(0, b"other", last=False)


def test_only_the_window_may_come_beyond_what_is_stored() -> None:
    log, store = an_input(), bytearray()
    assert add(log, 0, b"x" * MAX_UNACKED_BYTES) == MAX_UNACKED_BYTES
    assert add(log, MAX_UNACKED_BYTES, b"x") is Fault.TOO_FAST
    store_all(log, store)
    assert add(log, MAX_UNACKED_BYTES, b"x" * MAX_UNACKED_BYTES) == MAX_UNACKED_BYTES
    assert add(log, 2 * MAX_UNACKED_BYTES, b"", last=True) == 0


def test_the_largest_size_may_be_reached_and_not_passed() -> None:
    log = an_input()
    assert add(log, 0, b"12345", most=5) == 5
    assert add(log, 4, b"5", most=5) == 0
    assert add(log, 5, b"6", most=5) is Fault.TOO_LARGE
    assert add(log, 5, b"", last=True, most=5) == 0


def test_a_piece_on_both_sides_of_what_is_in_memory_is_compared_whole() -> None:
    log, store = an_input(), bytearray()
    text = bytes(range(256)) * 1024
    assert add(log, 0, text[:200_000]) == 200_000
    store_all(log, store)
    assert add(log, 0, text[:220_000], store=bytes(store)) == 20_000
    wrong = bytearray(text[100:230_000])
    wrong[0] ^= 1
    assert add(log, 100, bytes(wrong), store=bytes(store)) is Fault.CONFLICT
    assert log.known == 220_000
    assert add(log, 150_000, text[150_000:160_000]) == 0
    assert log.add(100, text[100:200], last=False, most=MIB, now=1.0, stored=b"") == NeedsStored(100, 100)
    in_memory = 200_000 - KEPT_BYTES
    assert log.add(in_memory - 1, b"??", last=False, most=MIB, now=1.0) == NeedsStored(in_memory - 1, 1)


def test_small_pieces_count_with_what_they_take_on_disk() -> None:
    few, many = LiveInput(rate=1_000.0), LiveInput(rate=1_000.0)
    for log in (few, many):
        assert log.wait_s(0.0) == 0.0
    add(few, 0, bytes(4_500))
    few.on_stored(few.next_piece(), 0.0)
    for number in range(30):
        add(many, number, b"x")
        many.on_stored(many.next_piece(), 0.0)
    assert few.wait_s(0.0) == pytest.approx(0.5 + ROW_BYTES / 1_000)
    assert many.wait_s(0.0) == pytest.approx((30 * (1 + ROW_BYTES) - 4_000) / 1_000)


def test_memory_holds_the_tail_alone() -> None:
    log, store = an_input(), bytearray()
    for number in range(20):
        add(log, number * 50_000, bytes([number]) * 50_000, most=2 * MIB)
        store_all(log, store)
    assert log.kept(0, 10) is None
    assert log.kept(log.size - KEPT_BYTES - 1, 1) is None
    assert log.kept(log.size - KEPT_BYTES, MIB) == bytes(store[-KEPT_BYTES:])
    assert log.kept(log.size - 10, 4) == bytes(store[-10:-6])
    log.forget_below(log.size)
    assert log.kept(log.size - 1, 1) is None
    assert log.kept(log.size, 1) == b""


def test_what_is_not_stored_is_not_given_to_a_worker() -> None:
    log = an_input()
    add(log, 0, b"abc")
    assert log.kept(0, 10) == b""
    log.on_stored(Piece(0, b"ab", last=False), 1.0)
    assert log.kept(0, 10) == b"ab"


def test_the_end_is_stored_with_the_last_bytes() -> None:
    log = an_input()
    add(log, 0, b"abc", last=True)
    assert log.next_piece() == Piece(0, b"abc", last=True)
    log.on_stored(Piece(0, b"ab", last=False), 1.0)
    assert log.next_piece() == Piece(2, b"c", last=True)


def test_the_rate_lets_a_burst_through_and_then_so_many_bytes_a_second() -> None:
    log, store = an_input(rate=1000.0), bytearray()
    burst = int(1000 * BURST_S)
    assert log.wait_s(0.0) == 0.0
    add(log, 0, b"x" * (burst + 500 - ROW_BYTES))
    store_all(log, store)
    assert log.wait_s(0.0) == pytest.approx(0.5)
    assert log.wait_s(0.25) == pytest.approx(0.25)
    assert log.wait_s(0.5) == pytest.approx(0.0)
    assert log.wait_s(100.0) == 0.0
    add(log, log.known, b"x" * (burst + 1000 - ROW_BYTES))
    store_all(log, store)
    assert log.wait_s(100.0) == pytest.approx(1.0), "a rest gives no more than the burst"


def starves(log: LiveInput) -> tuple[bool, bool]:
    """Whether the engine waits, and for a client."""
    return log.is_starving, log.awaits_feeder


def test_an_engine_starves_from_when_it_has_taken_all_until_more_is_stored() -> None:
    log = an_input()
    assert starves(log) == (True, True)
    log.add(0, b"a", last=False, most=9, now=1.0)
    assert starves(log) == (True, False), "the relay has something to do, the feeder has not"
    log.add(1, b"bc", last=False, most=9, now=2.0)
    assert log.received_at == 2.0
    log.on_stored(log.next_piece(), 3.0)
    assert (starves(log), log.starved_until) == ((False, False), 3.0)
    log.grow(3, 3.5, ended=False)
    assert log.starved_until == 3.0, "it had something to take"
    log.on_taken(2, 4.0)
    assert starves(log) == (False, False)
    log.on_taken(3, 5.0)
    log.on_taken(3, 6.0)
    log.on_taken(1, 6.0)
    assert (starves(log), log.taken, log.taken_at) == ((True, True), 3, 5.0)
    log.add(3, b"", last=True, most=9, now=7.0)
    log.on_stored(log.next_piece(), 8.0)
    assert (starves(log), log.starved_until) == ((False, False), 8.0)
    log.begin_attempt()
    assert log.taken == 0


def test_the_rate_that_is_shown_is_that_of_the_last_seconds() -> None:
    log = an_input()
    assert log.bytes_s(0.0) == 0
    log.grow(100, 0.0, ended=False)
    assert log.bytes_s(0.5) == 100, "the first second is a whole one"
    log = an_input()
    sizes = [number * (number + 1) // 2 for number in range(72)]
    for number, size in enumerate(sizes):  # more and more, eight times a second
        log.grow(size, number / 8, ended=False)
    assert log.bytes_s(9.0) == (sizes[-1] - sizes[39]) / 4, "since 5 s"
    assert log.bytes_s(30.0) == 0
