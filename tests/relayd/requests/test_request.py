"""A request: its holders and its resume window, its deadlines, its inputs, and what is told of it."""

import hashlib
import math
from typing import Any

import attrs
import msgpack
import pytest
import trio
import trio.testing

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import MAX_REPORT_CHARS, Queued, Rejected, Submit, WorkerAway, WorkerBack
from protocol.wire.structs import AudioFormat, InputInfo
from relayd.config.schema import Limits, SpaceConfig
from relayd.frames.frame_log import FrameReader
from relayd.requests.deadlines import watch_deadlines
from relayd.requests.live_input import LiveInput, PipedInput
from relayd.requests.outcome import Outcome
from relayd.requests.request import Expiry, Request, cache_key, content_hash
from relayd.scheduling.model import QueuePosition, ScheduledRequest, State

WINDOW_S, CANCEL_GRACE_S = 30.0, 10.0
#: So long that the resume window, while it runs, is what ends first.
PATIENT = SpaceConfig(queue_timeout_s=3_600, run_timeout_s=3_600, idle_timeout_s=3_600)


class FakeHolder:
    """A client's connection that sends nothing, and counts what it hears of workers."""

    backlog_bytes = 0

    def __init__(self) -> None:
        self.heard_of_worker = 0

    def send_frames(self, frames: list[bytes], size: int) -> None: ...

    def on_all_sent(self, reader: FrameReader) -> None: ...

    def on_read_error(self, reader: FrameReader) -> None: ...

    def on_accepted(self, request: Request) -> None: ...

    def on_position(self, request: Request, place: QueuePosition) -> None: ...

    def on_worker(self, request: Request) -> None:
        self.heard_of_worker += 1

    def on_rejected(self, request: Request, refusal: Rejected) -> None: ...

    def on_input_stored(self, request: Request, name: str, *, again: bool = False) -> None: ...

    def on_ended(self, request: Request) -> None: ...


def a_request(state: State = State.QUEUED, *, detach: bool = False) -> Request:
    submit = Submit(request_id="1" * 32, space="tts", params={"text": "hi"}, detach=detach)
    entry = ScheduledRequest(request_id=submit.request_id, space="tts", principal="ann", ticket=1, state=state)
    entry.started_at = trio.current_time()
    return Request.of(submit, "ann", entry, PATIENT, 0.0)


def next_expiry(request: Request) -> Expiry:
    return request.deadline(WINDOW_S, CANCEL_GRACE_S)[1]


def end_of_window(request: Request) -> float | None:
    """When the request ends because nobody holds it; None while its resume window does not run."""
    due_at, expiry = request.deadline(WINDOW_S, CANCEL_GRACE_S)
    return due_at if expiry is Expiry.NOBODY_HOLDS else None


def woken(request: Request, changed: trio.Event) -> bool:
    """Whether the request's task was woken since `changed` was `request.changed`; it can then wait again."""
    assert changed.is_set() == (request.changed is not changed)
    assert not request.changed.is_set()
    return changed.is_set()


@pytest.mark.trio
async def test_a_held_request_has_no_resume_window(autojump_clock: trio.testing.MockClock) -> None:
    request, holder = a_request(), FakeHolder()
    await trio.sleep(1)
    request.hold(holder)
    assert request.holders == {holder}
    assert request.held_at == trio.current_time()
    assert request.abandoned_at is None
    assert next_expiry(request) is Expiry.QUEUE_TIMEOUT


@pytest.mark.trio
@pytest.mark.parametrize("state", [State.UPLOADING, State.QUEUED, State.RUNNING])
async def test_the_resume_window_begins_when_the_last_holder_leaves(
    autojump_clock: trio.testing.MockClock, state: State
) -> None:
    request, first, second = a_request(state), FakeHolder(), FakeHolder()
    request.hold(first)
    request.hold(second)
    now = trio.current_time()
    request.release(first, now + 1)
    assert request.holders == {second}
    assert end_of_window(request) is None, "the other one still holds it"
    request.release(second, now + 2)
    assert not request.holders
    assert end_of_window(request) == now + 2 + WINDOW_S


@pytest.mark.trio
async def test_a_holder_that_comes_back_ends_the_resume_window(autojump_clock: trio.testing.MockClock) -> None:
    request, holder = a_request(), FakeHolder()
    request.hold(holder)
    now = trio.current_time()
    request.release(holder, now)
    request.hold(holder)
    assert end_of_window(request) is None
    request.release(holder, now + 5)
    assert end_of_window(request) == now + 5 + WINDOW_S, "the window begins again in full"


@pytest.mark.trio
async def test_holding_twice_counts_once(autojump_clock: trio.testing.MockClock) -> None:
    request, holder = a_request(), FakeHolder()
    request.hold(holder)
    request.hold(holder)
    now = trio.current_time()
    request.release(holder, now)
    assert not request.holders
    assert request.abandoned_at == now


@pytest.mark.trio
async def test_a_release_by_somebody_else_changes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    request, holder, stranger = a_request(), FakeHolder(), FakeHolder()
    request.release(stranger, trio.current_time())
    assert request.abandoned_at is None, "nobody held it before either"
    request.hold(holder)
    changed, now = request.changed, trio.current_time()
    request.release(stranger, now)
    assert request.holders == {holder}
    assert request.abandoned_at is None
    assert not woken(request, changed)
    request.release(holder, now)
    request.release(holder, now + 9)
    assert request.abandoned_at == now, "a second release does not extend the window"


@pytest.mark.trio
@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED, State.CANCELLED])
async def test_an_ended_request_gets_no_resume_window(autojump_clock: trio.testing.MockClock, state: State) -> None:
    request, holder = a_request(), FakeHolder()
    request.hold(holder)
    request.entry.state = state
    changed = request.changed
    request.release(holder, trio.current_time())
    assert not request.holders
    assert request.abandoned_at is None
    assert not woken(request, changed)


@pytest.mark.trio
async def test_a_renewal_restarts_the_window_of_a_request_that_nobody_holds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    request, holder = a_request(), FakeHolder()
    request.hold(holder)
    now = trio.current_time()
    request.release(holder, now)
    request.renew(now + WINDOW_S - 1)
    assert not request.holders
    assert end_of_window(request) == now + 2 * WINDOW_S - 1


@pytest.mark.trio
async def test_a_renewal_of_a_held_request_changes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    request, holder = a_request(), FakeHolder()
    request.hold(holder)
    changed = request.changed
    request.renew(trio.current_time())
    assert request.abandoned_at is None
    assert not woken(request, changed)


@pytest.mark.trio
async def test_a_detached_request_does_not_end_because_nobody_holds_it(autojump_clock: trio.testing.MockClock) -> None:
    request, holder = a_request(detach=True), FakeHolder()
    request.hold(holder)
    request.release(holder, trio.current_time())
    assert next_expiry(request) is Expiry.QUEUE_TIMEOUT
    request.renew(trio.current_time())
    assert next_expiry(request) is Expiry.QUEUE_TIMEOUT


@pytest.mark.trio
async def test_each_change_of_the_window_wakes_the_requests_task(autojump_clock: trio.testing.MockClock) -> None:
    request, holder = a_request(), FakeHolder()
    changed, now = request.changed, trio.current_time()
    request.hold(holder)
    assert woken(request, changed)
    changed = request.changed
    request.release(holder, now)
    assert woken(request, changed)
    changed = request.changed
    request.renew(now + 1)
    assert woken(request, changed)


@pytest.mark.trio
async def test_a_release_that_leaves_another_holder_wakes_nobody(autojump_clock: trio.testing.MockClock) -> None:
    request, first, second = a_request(), FakeHolder(), FakeHolder()
    request.hold(first)
    request.hold(second)
    changed = request.changed
    request.release(first, trio.current_time())
    assert not woken(request, changed)


class FakeFeeding:
    """What feeds a request."""

    def __init__(self) -> None:
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1


@pytest.mark.trio
async def test_what_feeds_a_request_is_woken_with_it_the_last_time_at_its_end() -> None:
    request, feeding, pipe = a_request(State.RUNNING), FakeFeeding(), FakeFeeding()
    request.feeding, request.pipes = feeding, [pipe]
    request.wake()
    assert (request.feeding, request.pipes) == (feeding, [pipe])
    request.entry.state = State.COMPLETED
    request.wake()
    request.wake()
    assert [request.feeding, *request.pipes] == [None]
    assert (feeding.woken, pipe.woken) == (2, 2)


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize(
    ("state", "fields", "due_s", "expiry"),
    [
        (State.UPLOADING, {}, 10.0, Expiry.QUEUE_TIMEOUT),
        (State.QUEUED, {"queued_at": 5.0}, 15.0, Expiry.QUEUE_TIMEOUT),
        (State.RUNNING, {}, 5.0, Expiry.IDLE_TIMEOUT),
        (State.RUNNING, {"last_frame_at": 16.0}, 20.0, Expiry.RUN_TIMEOUT),
        (State.RUNNING, {"streams": False}, 20.0, Expiry.RUN_TIMEOUT),
        (State.RUNNING, {"worker_lost_at": 2.0, "worker_grace_s": 1.5}, 3.5, Expiry.WORKER_GONE),
        (State.RUNNING, {"worker_lost_at": 2.0, "worker_grace_s": 30.0}, 20.0, Expiry.RUN_TIMEOUT),
        (State.RUNNING, {"stopped_at": 3.0, "abandoned_at": -90.0}, 13.0, Expiry.CANCEL_UNANSWERED),
        (State.RUNNING, {"abandoned_at": -26.0}, 4.0, Expiry.NOBODY_HOLDS),
        # After a restart, a worker may first come back with the end.
        (State.QUEUED, {"queued_at": -9.5, "restored_at": 0.0}, 1.5, Expiry.QUEUE_TIMEOUT),
        (State.QUEUED, {"queued_at": -9.5, "restored_at": -2.0}, 0.5, Expiry.QUEUE_TIMEOUT),
        # The deadlines of the request that it is copied from hold.
        (State.RUNNING, {"copied": True}, math.inf, Expiry.RUN_TIMEOUT),
        # Once it is complete, it waits for its source; its own waiting begins when it is queued.
        (State.UPLOADING, {"uploaded": True, "sources": {"2" * 32}}, math.inf, Expiry.RUN_TIMEOUT),
        (State.UPLOADING, {"uploaded": True}, 10.0, Expiry.QUEUE_TIMEOUT),
        (State.UPLOADING, {"sources": {"2" * 32}}, 10.0, Expiry.QUEUE_TIMEOUT),
        (State.QUEUED, {"uploaded": True, "sources": {"2" * 32}}, 10.0, Expiry.QUEUE_TIMEOUT),
        (State.QUEUED, {"abandoned_at": -26.0}, 4.0, Expiry.NOBODY_HOLDS),
    ],
)
async def test_the_earliest_deadline_is_the_one_that_holds(
    autojump_clock: trio.testing.MockClock, state: State, fields: dict[str, Any], due_s: float, expiry: Expiry
) -> None:
    timeouts = SpaceConfig(queue_timeout_s=10.0, run_timeout_s=20.0, idle_timeout_s=5.0)
    now = trio.current_time()
    entry = ScheduledRequest(request_id="1" * 32, space="tts", principal="ann", ticket=1, state=state)
    entry.started_at = now
    request = Request.of(Submit(request_id="1" * 32, space="tts", params={}), "ann", entry, timeouts, 0.0)
    for name, value in fields.items():
        at = now + value if name.endswith("_at") else value
        setattr(entry if hasattr(entry, name) else request, name, at)
    due_at, earliest = request.deadline(WINDOW_S, CANCEL_GRACE_S)
    assert earliest is expiry
    assert due_at == pytest.approx(now + due_s)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("inputs", "fields", "due_s", "expiry"),
    [
        # Its engine has something to take: it is to move on.
        ([{"size": 9}], {}, 5.0, Expiry.IDLE_TIMEOUT),
        ([{"size": 9, "taken": 3, "taken_at": 2.0}], {}, 7.0, Expiry.IDLE_TIMEOUT),
        ([{"size": 9, "taken_at": 2.0}, {"size": 9, "taken_at": 4.0}], {}, 9.0, Expiry.IDLE_TIMEOUT),
        ([{"size": 9, "starved_until": 3.0}], {}, 8.0, Expiry.IDLE_TIMEOUT),
        ([{"size": 9, "taken": 9, "taken_at": 1.0, "ended": True}], {}, 6.0, Expiry.IDLE_TIMEOUT),
        ([{"size": 9, "taken": 9, "ended": True}], {"streams": False}, 40.0, Expiry.RUN_TIMEOUT),
        # It has taken all: its feeder is to.
        ([{}], {}, 8.0, Expiry.FEED_TIMEOUT),
        ([{"size": 9, "taken": 9, "taken_at": 1.0, "received_at": 4.0}], {}, 12.0, Expiry.FEED_TIMEOUT),
        ([{"size": 9, "taken": 9, "taken_at": 6.0, "received_at": 4.0}], {}, 14.0, Expiry.FEED_TIMEOUT),
        ([{"size": 9, "taken": 9}], {"last_frame_at": 7.0}, 8.0, Expiry.FEED_TIMEOUT),
        ([{}], {"held_at": 3.0}, 11.0, Expiry.FEED_TIMEOUT),
        ([{}, {"received_at": 5.0}], {}, 13.0, Expiry.FEED_TIMEOUT),
        ([{}, {"size": 9, "received_at": 5.0}], {}, 13.0, Expiry.FEED_TIMEOUT),
        ([{}, {"size": 9, "taken": 9, "ended": True}], {}, 8.0, Expiry.FEED_TIMEOUT),
        ([{}], {"streams": False}, 8.0, Expiry.FEED_TIMEOUT),
        # A feeder that may be silent; but something else is awaited.
        ([{"patient": True}], {}, 40.0, Expiry.RUN_TIMEOUT),
        ([{"patient": True}, {}], {}, 8.0, Expiry.FEED_TIMEOUT),
        ([{"patient": True}, {"size": 9}], {}, 40.0, Expiry.RUN_TIMEOUT),
        # A feeder that is away has its resume window, and a worker that is away its grace.
        ([{}], {"abandoned_at": 0.0}, 30.0, Expiry.NOBODY_HOLDS),
        ([{}], {"worker_lost_at": 2.0, "worker_grace_s": 20.0}, 22.0, Expiry.WORKER_GONE),
    ],
)
async def test_an_engine_that_starves_waits_for_its_feeder_and_not_the_relay_for_it(
    autojump_clock: trio.testing.MockClock,
    inputs: list[dict[str, Any]],
    fields: dict[str, float],
    due_s: float,
    expiry: Expiry,
) -> None:
    request, now = a_request(State.RUNNING), trio.current_time()
    request.run_timeout_s, request.idle_timeout_s = 40.0, 5.0
    request.entry.started_at = now
    for number, each in enumerate(inputs):
        times = {name: now + value if name.endswith(("_at", "until")) else value for name, value in each.items()}
        fed = LiveInput(rate=1.0, size=times.pop("size", 0), ended=times.pop("ended", False))
        for name, value in times.items():
            setattr(fed, name, value)
        request.fed[str(number)] = fed
    for name, value in fields.items():
        at = now + value if name.endswith("_at") else value
        setattr(request.entry if name in ("streams", "worker_lost_at") else request, name, at)
    due_at, earliest = request.deadline(WINDOW_S, CANCEL_GRACE_S, 8.0)
    assert earliest is expiry
    assert due_at == pytest.approx(now + due_s)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("first_frame_s", "from_seq", "silent_s"),
    [
        (7.0, 5, 14.0 + 5.0),  # it has twice the time of the first one
        (7.0, 0, 5.0),  # it begins anew: the relay waits for its first frame
        (None, 5, 40.0),  # who knows how long it took to be made
    ],
)
async def test_an_attempt_that_makes_known_frames_again_may_be_silent_meanwhile(
    autojump_clock: trio.testing.MockClock, first_frame_s: float | None, from_seq: int, silent_s: float
) -> None:
    request = a_request(State.RUNNING)
    request.run_timeout_s, request.idle_timeout_s = 40.0, 5.0
    if first_frame_s is not None:
        request.begin_attempt(0, trio.current_time())
        await trio.sleep(first_frame_s)
        request.last_frame_at = trio.current_time()
        await trio.sleep(3.0)
    due_at = 0.0
    for _ in range(2):  # the next one is lost as well, before it has sent anything
        request.entry.started_at = trio.current_time()
        request.begin_attempt(from_seq, trio.current_time())
        due_at = trio.current_time() + silent_s
        assert request.deadline(WINDOW_S, CANCEL_GRACE_S)[0] == pytest.approx(due_at)
        await trio.sleep(2.0)
    request.resumed()  # a cut of its link changes nothing
    due_at = max(due_at, trio.current_time() + 5.0)
    assert request.deadline(WINDOW_S, CANCEL_GRACE_S)[0] == pytest.approx(due_at)
    await trio.sleep(1.0)
    request.last_frame_at = trio.current_time()  # it has caught up
    assert request.deadline(WINDOW_S, CANCEL_GRACE_S)[0] == pytest.approx(trio.current_time() + 5.0)


@pytest.mark.trio
async def test_a_feeder_that_is_waited_for_by_the_disk_or_that_is_a_pipe_has_no_deadline(
    autojump_clock: trio.testing.MockClock,
) -> None:
    request = a_request(State.RUNNING)
    request.run_timeout_s, request.idle_timeout_s = 40.0, 5.0
    request.fed["text"] = log = LiveInput(rate=1.0)
    log.add(0, b"pending", last=False, most=99, now=trio.current_time())
    assert request.deadline(WINDOW_S, CANCEL_GRACE_S, 8.0)[1] is Expiry.RUN_TIMEOUT
    request.fed["text"] = PipedInput(rate=1.0, source_id="2" * 32)
    assert request.deadline(WINDOW_S, CANCEL_GRACE_S, 8.0)[1] is Expiry.RUN_TIMEOUT


@pytest.mark.trio
async def test_a_detached_request_is_not_held_for_a_feeder_that_is_away(
    autojump_clock: trio.testing.MockClock,
) -> None:
    request = a_request(State.RUNNING)
    request.submit = attrs.evolve(request.submit, detach=True)
    request.run_timeout_s = 40.0
    for patient in (False, True):
        request.fed["text"] = LiveInput(rate=1.0, patient=patient)
        request.abandoned_at = trio.current_time() + 6.0
        due_at, earliest = request.deadline(WINDOW_S, CANCEL_GRACE_S, 8.0)
        assert earliest is Expiry.FEED_TIMEOUT
        assert due_at == pytest.approx(trio.current_time() + 14.0)
        assert request.awaited_inputs == ["text"]


@pytest.mark.trio
async def test_a_submit_without_timeouts_has_those_of_its_space_and_one_with_them_its_own() -> None:
    entry = ScheduledRequest(request_id="1" * 32, space="tts", principal="ann", ticket=1)
    space = SpaceConfig(queue_timeout_s=1.0, run_timeout_s=2.0, idle_timeout_s=3.0)
    submit = Submit(request_id="1" * 32, space="tts", params={})
    request = Request.of(submit, "ann", entry, space, 5.0)
    assert (request.queue_timeout_s, request.run_timeout_s, request.idle_timeout_s) == (1.0, 2.0, 3.0)
    own = Request.of(attrs.evolve(submit, queue_timeout_s=7.0, run_timeout_s=8.0), "ann", entry, space, 5.0)
    assert (own.queue_timeout_s, own.run_timeout_s, own.created_unix) == (7.0, 8.0, 5.0)
    assert (own.uploaded, own.accepted, own.has_outputs, own.timeline_dropped) == (False, False, False, 0)
    assert own.has_result


@pytest.mark.trio
async def test_a_deadline_that_frames_have_moved_does_not_expire_and_a_fault_ends_the_request(
    autojump_clock: trio.testing.MockClock,
) -> None:
    request = a_request(State.RUNNING)
    request.run_timeout_s, request.idle_timeout_s = 100.0, 10.0
    began = trio.current_time()
    expired: list[tuple[float, Expiry]] = []
    failed: list[Request] = []

    def expire(_request: Request, expiry: Expiry) -> None:
        expired.append((trio.current_time() - began, expiry))
        if len(expired) == 1:
            request.last_frame_at = trio.current_time()
        else:
            raise OSError

    def fail(broken: Request) -> None:
        failed.append(broken)
        request.entry.state = State.FAILED

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_deadlines, request, Limits, expire, fail)
        await trio.sleep(1)
        request.wake()
        await trio.sleep(5)
        request.last_frame_at = trio.current_time()  # a frame, which wakes nobody
    assert [expiry for _at_s, expiry in expired] == [Expiry.IDLE_TIMEOUT] * 2
    assert [at_s for at_s, _expiry in expired] == pytest.approx([16.0, 26.0])
    assert failed == [request]


# -- inputs -----------------------------------------------------------------------------------------------------------


def with_inputs(**inputs: bytes) -> Request:
    request = a_request()
    infos = {
        name: InputInfo(media_type="audio/wav", size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in inputs.items()
    }
    request.submit = attrs.evolve(request.submit, inputs=infos)
    return request


@pytest.mark.trio
async def test_pieces_of_an_input_follow_one_another_and_may_come_again() -> None:
    request = with_inputs(voice=b"0123456789", song=b"")
    assert request.missing_input() == "voice"
    assert request.add_input("voice", 1, b"x") is ErrorCode.INPUT_MISMATCH, "a gap"
    assert request.add_input("lyrics", 0, b"x") is ErrorCode.INPUT_MISMATCH, "not announced"
    assert request.add_input("voice", 0, b"0123") is None
    assert request.add_input("voice", 0, b"0123") is None
    assert request.add_input("voice", 2, b"2345") is None
    assert request.missing_input() == "voice"
    assert request.add_input("voice", 6, b"67890") is ErrorCode.INPUT_TOO_LARGE
    assert request.add_input("voice", 6, b"6789") is None
    assert request.missing_input() is None
    assert request.damaged_input() is None
    assert bytes(request.inputs["voice"]) == b"0123456789"
    request.drop_inputs()
    assert (request.inputs, request.missing_input()) == ({}, "voice")
    request.add_input("voice", 0, b"0123456789")
    assert request.damaged_input() is None, "all of it has come again"


@pytest.mark.trio
async def test_an_input_that_is_not_what_was_announced_is_named() -> None:
    request = with_inputs(song=b"", voice=b"0123")
    fed = InputInfo(media_type="text/plain", live=True)
    request.submit = attrs.evolve(request.submit, inputs={"text": fed, **request.submit.inputs})
    request.add_input("voice", 0, b"0124")
    assert request.damaged_input() == "voice"
    request.drop_inputs()
    request.add_input("voice", 0, b"0123")
    assert request.damaged_input() is None


@pytest.mark.trio
async def test_what_only_runs_need_is_released_and_the_first_summary_stays() -> None:
    request = with_inputs(voice=b"0123")
    request.add_input("voice", 0, b"0123")
    request.fed["text"] = LiveInput(rate=1.0)
    request.release_run_data()
    assert (request.inputs, request.fed) == ({}, {})
    summary = request.summary
    assert (request.submit.params, request.submit.inputs, request.submit.space) == ({}, {}, "tts")
    request.release_run_data()
    assert request.summary == summary
    assert msgpack.unpackb(summary)["params"] == {"text": "hi"}


# -- what is told of it -----------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_timeline_keeps_its_beginning_and_its_end(autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(5)
    request = a_request()
    for number in range(49):
        await trio.sleep(0.0123)
        request.add_timeline("step", number=number, nothing=None)
    told = [msgpack.unpackb(packed) for packed in request.timeline]
    assert request.timeline_dropped == 2
    assert [entry.get("number") for entry in told] == [None, *range(11), *range(13, 49)]
    assert told[:2] == [{"at_s": 0.0, "event": "created"}, {"at_s": 0.012, "event": "step", "number": 0}]


@pytest.mark.trio
async def test_the_timeline_of_one_that_is_in_the_store_begins_where_it_was_taken_up() -> None:
    entry = ScheduledRequest(request_id="1" * 32, space="tts", principal="ann", ticket=1)
    submit = Submit(request_id="1" * 32, space="tts", params={})
    request = Request.of(submit, "ann", entry, PATIENT, 0.0, accepted=True)
    assert msgpack.unpackb(request.timeline[0])["event"] == "taken_up"


@pytest.mark.trio
async def test_what_attempts_printed_is_told_once_and_its_end_is_kept() -> None:
    request = a_request()
    for text in ("first\n", "second\n", "first\n"):
        request.add_report(text)
    assert request.report == "first\nsecond"
    request.add_report("x" * MAX_REPORT_CHARS + "y")
    assert request.report == "x" * (MAX_REPORT_CHARS - 1) + "y"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("attempt", "reproducible", "frames", "starts"),
    [(1, "", 0, []), (2, "", 0, [(2, 0)]), (2, "tone", 0, []), (2, "", 1, []), (3, "", None, [(2, 0)])],
)
async def test_a_reader_begins_anew_where_the_worker_came_back_with_a_later_attempt(
    autojump_clock: trio.testing.MockClock,
    attempt: int,
    reproducible: str,
    frames: int | None,
    starts: list[tuple[int, int]],
) -> None:
    request, holder = a_request(State.RUNNING), FakeHolder()
    request.hold(holder)
    request.entry.attempt, request.entry.reproducible, request.entry.worker_id = attempt, reproducible, "box"
    if frames is None:
        request.log.restart(2, 0)
    for _ in range(frames or 0):
        request.log.append(b"frame")
    await trio.sleep(3)
    changed = request.changed
    request.resumed()
    assert list(request.log.starts) == starts
    assert request.last_frame_at == trio.current_time()
    assert woken(request, changed)
    assert holder.heard_of_worker == 1
    back = {"at_s": 3.0, "event": "worker_back", "worker_id": "box", "attempt": attempt}
    assert msgpack.unpackb(request.timeline[-1]) == back


@pytest.mark.trio
async def test_what_was_delivered_is_told_in_frames_and_seconds() -> None:
    request = a_request(State.RUNNING)
    request.outcome = Outcome(audio_s=7.0)
    assert request.audio_s == 7.0
    assert request.delivered() == {}
    request.log.append(b"frame")
    request.format = AudioFormat(sample_rate=24_000)
    assert request.delivered() == {"delivered_frames": 1}
    request.audio_bytes = 2 * 30_007
    assert request.delivered() == {"delivered_frames": 1, "delivered_s": 1.25}


@pytest.mark.trio
async def test_the_same_content_is_told_by_what_is_asked_for_alone() -> None:
    params: dict[str, Any] = {"text": "hi", "more": [{"a": 1, "b": 2}]}
    submit = Submit(request_id="1" * 32, space="tts", params=params)
    same: dict[str, Any] = {
        "request_id": "2" * 32,
        "priority": 9,
        "queue_timeout_s": 5.0,
        "run_timeout_s": 5.0,
        "params": {"more": [{"b": 2, "a": 1}], "text": "hi"},
        "cache": True,
    }
    for name, value in same.items():
        assert content_hash(attrs.evolve(submit, **{name: value})) == content_hash(submit), name
    other: dict[str, Any] = {
        "space": "other",
        "params": {"text": "hi", "more": [{"a": 1, "b": 3}]},
        "detach": True,
        "retry": "never",
        "cache": False,
    }
    for name, value in other.items():
        assert content_hash(attrs.evolve(submit, **{name: value})) != content_hash(submit), name
    request = a_request()
    assert request.same_content(request.submit)
    assert not request.same_content(submit)


def test_results_answer_equal_requests_of_those_who_may_share_them() -> None:
    def key(principal: str = "ann", *, cache_s: float = 9.0, shared: bool = False, **fields: Any) -> bytes:
        plain: dict[str, Any] = {"request_id": "1" * 32, "space": "tts", "params": {"a": 1, "b": 2}}
        config = SpaceConfig(cache_s=cache_s, cache_shared=shared)
        return cache_key(Submit(**(plain | fields)), principal, config)

    voice = InputInfo(media_type="audio/wav", size=1, sha256="1" * 64)
    song = InputInfo(media_type="audio/wav", size=1, sha256="2" * 64)
    live = InputInfo(media_type="text/plain", live=True)
    assert key() == key(params={"b": 2, "a": 1}, request_id="2" * 32, detach=True, cache=True) != b""
    other: list[bytes] = [
        key(),
        key("bob"),
        key(shared=True),
        key(space="music"),
        key(params={"a": 1}),
        key(inputs={"i": voice}),
        key(inputs={"i": song}),
        key(inputs={"j": voice}),
        key(inputs={"i": attrs.evolve(voice, media_type="audio/flac")}),
    ]
    assert len(set(other)) == len(other)
    assert key("bob", shared=True) == key("ann", shared=True)
    assert key(cache_s=0.0) == key(cache=False) == key(inputs={"i": voice, "text": live}) == b""


@pytest.mark.trio
async def test_a_reader_is_told_how_long_its_worker_is_waited_for_and_why_it_waits_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    request = a_request(State.RUNNING)
    request.entry.attempt, request.worker_grace_s = 2, 1.5
    assert request.worker_message() == WorkerBack(request_id=request.request_id, attempt=2)
    request.entry.worker_lost_at = trio.current_time()
    await trio.sleep(0.25011)
    assert request.worker_message() == WorkerAway(request_id=request.request_id, wait_s=1.25)
    await trio.sleep(2)
    assert request.worker_message() == WorkerAway(request_id=request.request_id, wait_s=0.0)
    place = QueuePosition(3, 7, 1.5)
    plain: dict[str, Any] = {"request_id": request.request_id, "position": 3, "of": 7, "eta_s": 1.5}
    assert request.queued_message(place) == Queued(**plain)
    request.lost = "worker_lost", "it left"
    assert request.queued_message(place) == Queued(**plain, code="worker_lost", message="it left")
