"""Waits for what a client of OpenAI's API asked for, as long as such clients do."""

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from protocol.wire.errors import ErrorCode
from relayd.core.space import Space
from relayd.http.context import HttpContext
from relayd.http.errors import HttpError
from relayd.http.request_stream import RequestStream

T = TypeVar("T")

#: Between two looks for a worker while a request is queued, at least.
MIN_LOOK_S = 1.0


async def wait_for_worker(context: HttpContext, space: Space) -> None:
    """Wait for a worker before anything is submitted: until one has come, it may be unknown what a space accepts.

    A space that refuses while it is empty, or is paused, says so itself when it is asked.

    Raises:
        HttpError: 503; none has come.
    """
    relay = context.relay
    scheduled = relay.scheduler.state.spaces[space.name]
    if scheduled.rules.refuse_when_empty or scheduled.paused:
        return
    with trio.move_on_after(relay.config.http.no_worker_wait_s):
        while not relay.workers.serving(space.name):
            await relay.workers.joined.wait()
    if not relay.workers.serving(space.name):
        raise _no_worker(space.name)


async def begun(
    held: RequestStream, open_result: Callable[[RequestStream], Awaitable[T]], no_worker_wait_s: float
) -> T:
    """Wait until the engine has begun.

    Args:
        held: the request.
        open_result: waits for the beginning; it may be cancelled and called again.
        no_worker_wait_s: how long a request that is still queued may be without a worker.

    Raises:
        HttpError: the request ended before; or it is still queued, and has had no worker for at least this long.
    """
    served, relay, space = True, held.relay, held.request.submit.space
    while True:
        with trio.move_on_after(max(MIN_LOOK_S, no_worker_wait_s)):
            return await open_result(held)
        before, served = served, not held.queued or relay.workers.serving(space)
        if not served and not before:
            raise _no_worker(space)


def _no_worker(space: str) -> HttpError:
    message = f"no worker of space {space!r} takes requests now; try again when one is connected (GET /v1/models)"
    return HttpError(ErrorCode.NO_WORKER, message, retryable=True)


def refuse_to_wait(held: RequestStream, max_wait_s: float) -> None:
    """Refuse a long wait: HTTP clients do not see their position, and many give up after a minute.

    Raises:
        HttpError: 429; the request would wait longer than `http.max_wait_s`.
    """
    place = held.place()
    if place is not None and place.eta_s is not None and place.eta_s > max_wait_s:
        message = (
            f"{place.of} requests are queued; this one would start in about {place.eta_s:.0f} s, and the relay lets "
            f"HTTP clients wait {max_wait_s:g} s (http.max_wait_s)"
        )
        raise HttpError(ErrorCode.QUEUE_FULL, message, retry_after_s=math.ceil(place.eta_s - max_wait_s))
