"""The task of a live request, which watches the request's deadlines."""

from collections.abc import Callable

import structlog
import trio

from relayd.config.schema import Limits
from relayd.requests.request import Expiry, Request

log = structlog.get_logger("relayd")


async def watch_deadlines(
    request: Request,
    limits: Callable[[], Limits],
    expire: Callable[[Request, Expiry], None],
    fail: Callable[[Request], None],
) -> None:
    """Watch the deadlines of a request until it has ended.

    Frames move the idle deadline without waking this task; it computes the deadline again when the old one has passed.

    Args:
        request: the request to watch.
        limits: returns the relay's limits, which a reload changes.
        expire: carries out the consequence of a deadline that has passed.
        fail: ends the request if `expire` raises; must not raise itself.
    """

    def deadline() -> tuple[float, Expiry]:
        now = limits()
        return request.deadline(now.resume_window_s, now.cancel_grace_s, now.feed_idle_timeout_s)

    while request.live:
        changed = request.changed
        try:
            when, expiry = deadline()
            with trio.move_on_at(when):
                await changed.wait()
                continue
            when, expiry = deadline()
            if when <= trio.current_time():
                expire(request, expiry)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
            fail(request)
