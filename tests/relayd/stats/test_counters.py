"""Counting: what is told of the last minute, of the last five, and of what a request asked for."""

import attrs
import msgpack
import pytest

from protocol.wire.structs import InputInfo
from relayd.logs.recent import RecentRows, log_row
from relayd.requests.summary import summarize
from relayd.stats.counters import Stats
from relayd.stats.windows import MAX_SAMPLES, End, MinuteWindow, OutcomeWindow, Rate, SampleWindow
from tests.support.relay import a_submit


def test_a_minute_forgets_what_is_older() -> None:
    minute = MinuteWindow()
    for second in range(100):
        minute.add(1000.0 + second, 2)
    assert minute.sum(1099.9) == 120
    assert minute.sum(1129.0) == 60
    assert minute.by_second(1129.0) == [2.0] * 30 + [0.0] * 30
    assert minute.sum(1e9) == 0
    assert minute.total == 200


def test_percentiles_are_of_the_last_five_minutes() -> None:
    lately = SampleWindow()
    assert lately.percentile(0.0, 0.5) is None
    for number in range(1, 101):
        lately.add(float(number), float(number))
    assert [lately.percentile(100.0, part) for part in (0.0, 0.5, 0.95, 1.0)] == [1.0, 50.0, 95.0, 100.0]
    assert lately.percentile(350.5, 0.5) == 75.0
    assert lately.percentile(401.0, 0.5) is None


def test_of_very_many_samples_the_latest_count() -> None:
    lately = SampleWindow()
    for number in range(10 * MAX_SAMPLES):
        lately.add(1.0, float(number))
    assert lately.percentile(1.0, 0.0) == 9 * MAX_SAMPLES


def test_ends_give_the_real_time_factor_and_the_errors() -> None:
    ends = OutcomeWindow()
    assert (ends.rtf(0.0), ends.error_percent(0.0)) == (None, None)
    ends.add(End(0.0, failed=True))
    ends.add(End(200.0, failed=False, run_s=1.0, audio_s=4.0))
    ends.add(End(200.0, failed=False, run_s=2.0, audio_s=2.0))
    ends.add(End(200.0, failed=False, run_s=60.0))  # makes no audio
    assert (ends.rtf(200.0), ends.error_percent(200.0)) == (0.5, 25.0)
    assert (ends.rtf(301.0), ends.error_percent(301.0)) == (0.5, 0.0)
    assert (ends.rtf(501.0), ends.error_percent(501.0)) == (None, None)


def test_a_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate()
    rate.sample(1.0, 500)
    assert rate.per_s == 500
    for second in range(2, 8):
        rate.sample(float(second), 500)
    assert rate.per_s == 0


def test_a_rate_begins_where_its_counter_stood() -> None:
    rate = Rate(begin=1_000_000)
    rate.sample(1.0, 1_000_500)
    assert rate.per_s == 500


@attrs.define
class Sent:
    """A client, as far as its rate is concerned."""

    connection_id: str
    bytes_sent: int = 0
    sampled_bytes: int = 0


def test_only_clients_that_are_sent_something_have_a_rate() -> None:
    stats, clients = Stats(), {name: Sent(name) for name in ("busy", "quiet", "gone")}
    for second in range(1, 4):
        clients["busy"].bytes_sent += 100
        clients["gone"].bytes_sent += 100
        stats.sample(float(second), (), clients, (), ())
        assert {name: rate.per_s for name, rate in stats.clients.items()} == {"busy": 100, "gone": 100}
        assert stats.out_bytes == stats.sent_bytes(clients) == 200 * second
    clients["busy"].bytes_sent += 50
    assert stats.sent_bytes(clients) == 650
    del clients["gone"]
    for second in range(4, 13):
        stats.sample(float(second), (), clients, (), ())
    assert not stats.clients, "nothing was sent for longer than a rate is told"
    clients["busy"].bytes_sent += 100
    stats.sample(13.0, (), clients, (), ())
    assert stats.clients["busy"].per_s == 100, "what was sent before does not count again"


def test_a_ring_gives_its_rows_in_pieces() -> None:
    ring = RecentRows(10)
    assert (ring.last, ring.between(0, ring.last, 5)) == (0, [])
    for number in range(25):
        ring.add({"number": number})
    ids = [row["id"] for row in ring.between(0, ring.last, 4)]
    assert ids == ["22", "23", "24", "25"]
    assert [row["id"] for row in ring.between(0, 21, 100)] == ["16", "17", "18", "19", "20", "21"]
    assert [row["number"] for row in ring.between(24, ring.last, 100)] == [24]


def test_an_event_is_told_in_brief_and_without_tokens() -> None:
    try:
        raise OSError("disk on fire")
    except OSError:
        row = log_row("exception", {"event": "it broke", "exc_info": True, "worker": "box", "size": 7, "x": "y" * 999})
    assert (row["level"], row["event"], row["worker_id"], row["space"]) == ("error", "it broke", "box", None)
    assert row["details"].startswith("size=7 x=yyy")
    assert row["details"].endswith("exception=OSError('disk on fire')")
    assert len(row["details"]) < 300
    for before in range(150, 200):  # wherever the token is cut
        told = log_row("info", {"event": "a" * before + " rly_c_" + "0123456789abcdef" * 3})["event"]
        assert "0123" not in told


@pytest.mark.parametrize("most", [200, 1024, 24 * 1024])
def test_what_was_asked_fits_whatever_it_was(most: int) -> None:
    asked = [
        {},
        {"text": "hello"},
        {"text": "x" * 60_000},
        {f"key{number}" * 20: "x" * 900 for number in range(60)},
        {"deep": {"a": {"b": {"c": {"d": {"e": [1, 2, {}]}}}}}, "bytes": b"\0" * 5_000},
        {"list": list(range(1_000)), "empty": [[], {}]},
        {"\N{GRINNING FACE}" * 500: "\N{GRINNING FACE}" * 2_000},
    ]
    for params in asked:
        inputs = {f"i{number}": InputInfo(media_type="x" * 128, size=1, sha256="0" * 64) for number in range(60)}
        packed = summarize(a_submit(params=params, inputs=inputs), most)
        assert len(packed) <= most
        brief = msgpack.unpackb(packed)
        assert brief.keys() == {"params", "params_cut", "inputs"}
        assert brief["params_cut"] == (brief["params"] != params)
    small = msgpack.unpackb(summarize(a_submit(params={"text": "hello", "rate": 3}), most))
    assert small == {"params": {"text": "hello", "rate": 3}, "params_cut": False, "inputs": []}
