"""The order of the queues, told in pieces and put together again."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from protocol.client.queue_order import QueueOrder, rows_to_send
from protocol.client.watch import MAX_KEPT, MAX_UNREAD, Watch, value_now
from protocol.wire.messages import Delta, Snapshot


def row(request_id: str, position: int | None, state: str = "queued", space: str = "tts") -> dict[str, Any]:
    return {"request_id": request_id, "space": space, "state": state, "position": position}


def snapshot(*ids: str) -> Snapshot:
    return Snapshot(data={"requests": [row(each, place) for place, each in enumerate(ids, 1)]})


def round_of(told: list[str], order: list[str], again: set[str]) -> Delta:
    """What a relay tells for a reader of `told` to have `order`."""
    ids = rows_to_send(told, order, again & set(order)) | (again & set(order))
    rows = [row(each, order.index(each) + 1) for each in ids]
    left = [each for each in told if each not in order]
    rows += [row(each, None, "running") for each in left[::2]]
    return Delta(data={"requests": rows[::-1]}, gone={"requests": left[1::2]})


orders = st.lists(st.integers(0, 30).map(str), unique=True, max_size=20)


@given(orders=st.lists(st.tuples(orders, st.sets(st.integers(0, 30).map(str), max_size=5)), min_size=2, max_size=6))
def test_whatever_becomes_of_a_queue_the_reader_has_its_order(orders: list[tuple[list[str], set[str]]]) -> None:
    queues = QueueOrder()
    told, _again = orders[0]
    queues.apply(snapshot(*told))
    for order, again in orders[1:]:
        queues.apply(round_of(told, order, again))
        assert queues.order("tts") == order
        assert [queues.position(each) for each in order] == list(range(1, len(order) + 1))
        told = order


def test_who_only_moves_up_or_is_moved_down_by_one_is_not_told() -> None:
    told = [str(number) for number in range(1000)]
    assert rows_to_send(told, told[3:], set()) == set()
    assert rows_to_send(told, [*told[1:], "new"], set()) == {"new"}
    assert rows_to_send(told, ["new", *told], set()) == {"new"}
    assert rows_to_send(told, ["700", *told[:700], *told[701:]], set()) == {"700"}
    assert rows_to_send(told, [*told[1:], "0"], set()) == {"0"}


def test_a_request_that_left_while_the_round_was_told_still_counts_for_those_behind_it() -> None:
    queues = QueueOrder()
    queues.apply(snapshot("a", "b"))
    queues.apply(Delta(data={"requests": [row("y", 3), row("x", 1, "running")]}))
    assert queues.order("tts") == ["a", "y", "b"]
    assert queues.position("x") is None


def test_queues_of_several_spaces_are_apart_and_a_snapshot_begins_anew() -> None:
    queues = QueueOrder()
    queues.apply(Snapshot(data={"requests": [row("a", 1), row("b", 1, space="other"), row("c", None, "completed")]}))
    assert (queues.order("tts"), queues.order("other"), queues.order("none")) == (["a"], ["b"], [])
    queues.apply(Delta(gone={"requests": ["a", "unknown"], "workers": ["b"]}))
    assert (queues.order("tts"), queues.order("other")) == ([], ["b"])
    queues.apply(snapshot("z"))
    assert (queues.order("tts"), queues.order("other")) == (["z"], [])


def test_pages_of_a_round_are_one_change() -> None:
    watch = Watch()
    watch.on_page(snapshot("r", "a"))
    watch.on_page(Delta(data={"requests": [row("n", 2)]}, more=True))
    assert len(watch._unread) == 1
    watch.on_page(Delta(gone={"requests": ["r"]}))
    assert watch._unread[1] == Delta(data={"requests": [row("n", 2)]}, gone={"requests": ["r"]})


def test_a_reader_that_fell_behind_gets_the_positions_as_they_are_then() -> None:
    watch = Watch()
    watch.on_page(snapshot(*map(str, range(100))))
    for number in range(MAX_UNREAD):
        watch.on_page(Delta(data={"requests": [row(str(number), None, "running")]}))
    (whole,) = watch._unread
    places = {each["request_id"]: each["position"] for each in whole.data["requests"]}
    assert places == {str(number): None if number < 60 else number - 59 for number in range(100)}


def test_lines_of_the_log_are_kept_up_to_a_number_and_the_oldest_go_first() -> None:
    watch = Watch()
    watch.on_page(Snapshot(data={"log": [{"id": str(number)} for number in range(8_000, 8_200)]}))
    for first in range(7_800, 0, -200):
        watch.on_page(Delta(data={"log": [{"id": str(number)} for number in range(first, first + 200)]}))
    known = watch._latest["log"]
    assert MAX_KEPT <= len(known) <= MAX_KEPT + 500
    assert set(map(str, range(8_200 - MAX_KEPT, 8_200))) <= set(known)


def test_ages_count_on_where_the_state_says_so() -> None:
    waiting = {"state": "queued", "age_s": 2.0, "queued_s": 1.0, "run_s": None, "ended_s": None, "bytes": 7}
    names = ("age_s", "queued_s", "run_s", "ended_s", "bytes", "unknown")
    assert [value_now("requests", waiting, name, 10.0) for name in names] == [12.0, 11.0, None, None, 7, None]
    over = {"state": "completed", "age_s": 2.0, "queued_s": 1.0, "run_s": 1.0, "ended_s": 5.0}
    assert [value_now("requests", over, name, 10.0) for name in names[:4]] == [2.0, 1.0, 1.0, 15.0]
    assert value_now("workers", {"state": "stale", "last_seen_s": 11.0}, "last_seen_s", 10.0) == 21.0
    assert value_now("workers", {"state": "idle", "last_seen_s": None}, "last_seen_s", 10.0) is None
