"""A request's holders and its resume window: `hold`, `release` and `renew`."""

import pytest
import trio
import trio.testing

from protocol.wire.messages import Rejected, Submit
from relayd.config.schema import SpaceConfig
from relayd.frames.frame_log import FrameReader
from relayd.requests.request import Expiry, Request
from relayd.scheduling.model import QueuePosition, ScheduledRequest, State

WINDOW_S, CANCEL_GRACE_S = 30.0, 10.0
#: So long that the resume window, while it runs, is what ends first.
PATIENT = SpaceConfig(queue_timeout_s=3_600, run_timeout_s=3_600, idle_timeout_s=3_600)


class FakeHolder:
    """A client's connection that sends nothing."""

    backlog_bytes = 0

    def send_frames(self, frames: list[bytes], size: int) -> None: ...

    def on_all_sent(self, reader: FrameReader) -> None: ...

    def on_read_error(self, reader: FrameReader) -> None: ...

    def on_accepted(self, request: Request) -> None: ...

    def on_position(self, request: Request, place: QueuePosition) -> None: ...

    def on_worker(self, request: Request) -> None: ...

    def on_rejected(self, request: Request, refusal: Rejected) -> None: ...

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
    request.hold(holder)
    assert request.holders == {holder}
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
