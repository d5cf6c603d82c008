"""The task of a live request: it keeps the request's deadlines, and does nothing else."""

from typing import TYPE_CHECKING

import structlog
import trio

from protocol.errors import ErrorCode
from relayd.requests import Expiry, Request
from relayd.states import Finish

if TYPE_CHECKING:
    from relayd.relay import Relay

log = structlog.get_logger("relayd")


async def watch_deadlines(relay: "Relay", request: Request) -> None:
    """The task of a live request: wait until something changes or a deadline comes, until it has ended.

    Frames move the idle deadline without waking this task; it looks again when the old one comes.
    """
    limits = relay.config.limits
    while request.live:
        changed = request.changed
        try:
            when, expiry = request.deadline(limits.resume_window_s, limits.cancel_grace_s)
            with trio.move_on_at(when):
                await changed.wait()
                continue
            when, expiry = request.deadline(limits.resume_window_s, limits.cancel_grace_s)
            if when <= trio.current_time():
                _expire(relay, request, expiry)
        except Exception:
            log.exception("request broke the relay's own rules", request_id=request.request_id)
            relay.fail_broken(request)


def _expire(relay: "Relay", request: Request, expiry: Expiry) -> None:
    """Carry out what a deadline says."""
    request_id = request.request_id
    match expiry:
        case Expiry.NOBODY_HOLDS:
            relay.cancel(request, "its client went away and did not come back")
        case Expiry.QUEUE_TIMEOUT:
            relay.fail(
                request,
                ErrorCode.QUEUE_TIMEOUT,
                f"no slot of space {request.submit.space!r} was free within {request.queue_timeout_s:g} s; "
                "try again later, or with a longer queue_timeout_s",
            )
        case Expiry.RUN_TIMEOUT:
            relay.fail(
                request,
                ErrorCode.RUN_TIMEOUT,
                f"it ran for {request.run_timeout_s:g} s; ask for less, or raise run_timeout_s",
            )
        case Expiry.IDLE_TIMEOUT:
            message = f"its worker sent nothing for {request.idle_timeout_s:g} s"
            relay.lose(request_id, ErrorCode.IDLE_TIMEOUT, message)
        case Expiry.WORKER_GONE:
            message = f"worker {request.entry.worker_id or '(before the restart)'} is gone"
            relay.lose(request_id, ErrorCode.WORKER_LOST, message)
        case Expiry.CANCEL_UNANSWERED:
            relay.carry_out([Finish(request.entry, None, "its worker did not answer the cancel")])
