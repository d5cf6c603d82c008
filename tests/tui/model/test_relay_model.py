"""What the screen knows: rows as they were told, ages that go on, places in queues, the last minute's rates."""

from protocol.wire.messages import Delta, Snapshot
from protocol.wire.validators import Value
from tests.tui.screen import Row, a_line, a_relay, a_request, a_space, a_worker
from tui.model.relay_model import MAX_LINES, RelayModel, RowView
from tui.model.row_filter import Filter
from tui.model.row_order import Order


def a_picture(now: float = 100.0, **topics: list[Row]) -> RelayModel:
    model = RelayModel()
    model.apply(Snapshot(data={"relay": [a_relay()], **topics}), now)
    return model


def test_a_delta_replaces_rows_and_takes_out_what_is_gone() -> None:
    model = a_picture(requests=[a_request("a"), a_request("b")])
    model.apply(Delta(data={"requests": [a_request("a", state="failed")]}, gone={"requests": ["b"]}), 101.0)
    assert [view.text("state") for view in model.rows("requests")] == ["failed"]


def test_a_snapshot_replaces_everything() -> None:
    model = a_picture(requests=[a_request("a")], workers=[a_worker("w")])
    model.apply(Snapshot(data={"requests": [a_request("b")]}), 101.0)
    assert [view.key for view in model.rows("requests")] == ["b"]
    assert model.rows("workers") == []


def test_an_age_counts_on_from_when_it_was_told_while_it_goes_on() -> None:
    model = a_picture(requests=[a_request("a", age_s=5.0), a_request("b", age_s=5.0, state="completed", ended_s=1.0)])
    live, ended = model.rows("requests")
    assert live.aged("age_s", 107.0) == 12.0
    assert ended.aged("age_s", 107.0) == 5.0
    assert ended.aged("ended_s", 107.0) == 8.0
    assert live.born("age_s") == 95.0


def test_the_place_in_a_queue_is_the_one_of_now_not_the_one_that_was_told() -> None:
    queued = [a_request(key, state="queued", position=at) for at, key in enumerate("abc", 1)]
    model = a_picture(spaces=[a_space("tts")], requests=queued)
    model.apply(Delta(data={"requests": [a_request("a")]}), 101.0)
    assert [(view.key, view.position) for view in model.queue("tts")] == [("b", 1), ("c", 2)]
    frozen = model.frozen()
    model.apply(Delta(gone={"requests": ["b"]}), 102.0)
    assert [view.number("position") for view in model.queue("tts")] == [1]
    assert [(view.key, view.number("position")) for view in frozen.queue("tts")] == [("b", 1), ("c", 2)]


def test_a_request_tells_the_name_of_its_worker() -> None:
    model = a_picture(requests=[a_request("a", worker_id="w1")], workers=[a_worker("w1", name="gpu-box")])
    assert model.rows("requests")[0].text("worker") == "gpu-box"


def test_the_log_keeps_its_newest_lines() -> None:
    model = a_picture(log=[a_line(number) for number in range(4_990, 5_190)])
    model.apply(Delta(data={"log": [a_line(number) for number in reversed(range(4_990))]}), 101.0)
    kept = sorted(int(view.key) for view in model.rows("log"))
    assert len(kept) == MAX_LINES
    assert (kept[0], kept[-1]) == (190, 5_189)


def test_rates_come_from_the_history_and_go_on_from_the_counters() -> None:
    history: Row = {"name": "relay", "requests": [0] * 58 + [2, 1], "audio_s": [0.0] * 58 + [1.5, 0.5]}
    model = RelayModel()
    first = a_relay(requests_total=10, audio_s_total=7.0)
    model.apply(Snapshot(data={"relay": [first], "history": [history]}), 100.0)
    model.apply(Delta(data={"relay": [a_relay(requests_total=13, audio_s_total=9.0)]}), 100.4)
    model.apply(Delta(data={"relay": [a_relay(requests_total=14, audio_s_total=9.0)]}), 102.0)
    requests, audio = model.rates.last_minute(102.5)
    assert requests[-4:] == [2, 4, 0, 1]
    assert audio[-4:] == [1.5, 2.5, 0, 0]
    assert model.rates.last_minute(500.0) == ([0.0] * 60, [0.0] * 60)


def test_rates_do_not_jump_when_the_relay_was_started_anew() -> None:
    model = RelayModel()
    model.apply(Snapshot(data={"relay": [a_relay(requests_total=1_000, audio_s_total=1.0)]}), 100.0)
    model.apply(Snapshot(data={"relay": [a_relay(requests_total=0, audio_s_total=0.0)]}), 110.0)
    model.apply(Delta(data={"relay": [a_relay(requests_total=1, audio_s_total=0.0)]}), 111.0)
    assert sum(model.rates.last_minute(111.0)[0]) == 1


def test_topics_of_a_newer_relay_are_kept_by_their_id() -> None:
    model = RelayModel()
    data: dict[str, Value] = {"new_topic": [{"id": 1}], "requests": [a_request("a")]}
    model.apply(Snapshot(data=data), 1.0)
    assert model.get("new_topic", "1") is not None


def views(*rows: Row) -> list[RowView]:
    return a_picture(requests=list(rows)).rows("requests")


def test_rows_without_what_is_sorted_by_come_last_either_way() -> None:
    order = Order(lambda view: view.key, lambda view: view.number("size"))
    rows = views(a_request("a"), a_request("b", size=2), a_request("c", size=1))
    assert [view.key for view in order.update(rows)] == ["c", "b", "a"]
    order.reverse = True
    order.begin_anew()
    assert [view.key for view in order.update(rows)] == ["b", "c", "a"]


def test_only_rows_that_changed_are_looked_at_again() -> None:
    looked: list[str] = []

    def sort(view: RowView) -> str:
        looked.append(view.key)
        return view.key

    model = a_picture(requests=[a_request("a"), a_request("b")])
    order = Order(sort)
    order.update(model.rows("requests"))
    looked.clear()
    model.apply(Delta(data={"requests": [a_request("b", state="failed"), a_request("c")]}), 101.0)
    assert [view.key for view in order.update(model.rows("requests"))] == ["a", "b", "c"]
    assert looked == ["b", "c"]


def test_rows_that_cannot_be_compared_are_shown_all_the_same() -> None:
    order = Order(lambda view: view.row["size"])
    assert len(order.update(views(a_request("a", size="big"), a_request("b", size=2)))) == 2


def test_capitals_in_a_filter_must_match_as_capitals() -> None:
    view = views(a_request("a", principal="Anna"))[0]
    assert Filter.of("anna").lets_through(view)
    assert Filter.of("Anna").lets_through(view)
    assert not Filter.of("ANNA").lets_through(view)
    assert not Filter.of("!anna").lets_through(view)
    assert Filter.of("!").lets_through(view)


def test_a_filter_finds_what_stands_in_lists() -> None:
    model = a_picture(workers=[a_worker("w", spaces=["tts", "voices"])])
    assert Filter.of("voices").lets_through(model.rows("workers")[0])
