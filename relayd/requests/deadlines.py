"""The task of a live request: it keeps the request's deadlines, and does nothing else."""

from collections.abc import Callable

import structlog
import trio

from relayd.config.schema import Limits
from relayd.requests.request import Expiry, Request

log = structlog.get_logger("relayd")


async def watch_deadlines(
    request: Request,
    limits: Limits,
    expire: Callable[[Request, Expiry], None],
    fail: Callable[[Request], None],
) -> None:
    """Wait until something changes or a deadline comes, until the request has ended.

    Frames move the idle deadline without waking this task; it looks again when the old one comes.

    Args:
        request: whose deadlines.
        limits: the relay's.
        expire: carries out what a deadline says.
        fail: ends the request where that raises; must not raise itself.
    """
    while request.live:
        changed = request.changed
        try:
            when, expiry = request.deadline(limits.resume_window_s, limits.cancel_grace_s)
            with trio.move_on_at(when):
                await changed.wait()
                continue
            when, expiry = request.deadline(limits.resume_window_s, limits.cancel_grace_s)
            if when <= trio.current_time():
                expire(request, expiry)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
            fail(request)
