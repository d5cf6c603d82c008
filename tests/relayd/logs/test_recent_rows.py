"""The latest rows, most of them packed."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from relayd.logs.recent import PAGE_ROWS, RecentRows

MOST = 250


@given(count=st.integers(0, 700), after=st.integers(-1, 800), length=st.integers(-5, 800), most=st.integers(1, 800))
def test_between_returns_the_latest_of_the_rows_asked_for(count: int, after: int, length: int, most: int) -> None:
    rows = RecentRows(MOST)
    for number in range(1, count + 1):
        rows.add({"event": f"event {number}"})

    kept = range(max(1, count - MOST + 1), count + 1)
    asked = [number for number in kept if after < number <= after + length][-most:]

    assert (rows.first, rows.last) == (kept.start, count)
    found = rows.between(after, after + length, most)
    assert [row["id"] for row in found] == [str(number) for number in asked]
    assert [row["event"] for row in found] == [f"event {number}" for number in asked]


def test_a_packed_row_is_the_row_that_was_added() -> None:
    rows = RecentRows(MOST)
    row = {"level": "info", "event": "a lone surrogate \ud800, as of a file's name", "space": None, "details": "n=1"}
    for _ in range(PAGE_ROWS + 1):
        rows.add(row)

    first, *_, last = rows.between(0, rows.last, MOST)

    assert {**last, "id": "1", "time": first["time"]} == first == {"id": "1", "time": first["time"], **row}


def test_rows_come_from_several_threads() -> None:
    rows = RecentRows(10_000)

    def add_many() -> None:
        for _ in range(1_000):
            rows.add({})

    threads = [threading.Thread(target=add_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [row["id"] for row in rows.between(0, rows.last, 10_000)] == [str(number) for number in range(1, 4_001)]
