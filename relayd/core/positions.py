"""Sends clients the positions of their queued requests when they change, at most four times a second."""

import time

import structlog
import trio

from relayd.core.relay import Relay
from relayd.requests.request import Request
from relayd.scheduling.model import QueuePosition

log = structlog.get_logger("relayd.positions")

#: docs/design.md §5: `queued` is pushed at most 4 times a second.
INTERVAL_S = 0.25
#: The largest share of the relay's time that sending may use: with 10,000 queued requests, each step moves them all.
MAX_SHARE = 0.1


async def serve_positions(relay: Relay) -> None:
    """Push `queued` to the holders of every request whose position changed, until cancelled."""
    while True:
        await relay.positions_changed.wait()
        relay.positions_changed = trio.Event()
        began = time.perf_counter()
        try:
            send_positions(relay)
        except Exception:
            log.exception("internal error in position loop")
        await trio.sleep(max(INTERVAL_S, (time.perf_counter() - began) / MAX_SHARE))


def send_positions(relay: Relay) -> None:
    """Send the changed positions of every space that has moved since the last call."""
    now = trio.current_time()
    spaces = relay.scheduler.state.moved & relay.spaces.keys()
    relay.scheduler.state.moved.clear()
    for name in spaces:
        relay.mark_changed("spaces", name)
        relay.mark_changed("queue", name)
        if not relay.scheduler.state.spaces[name].queue:
            continue
        for request_id, position in relay.scheduler.positions(name, now).items():
            request = relay.requests[request_id]
            if request.last_position_sent != (position.position, position.of):
                send_position(request, position)


def send_position(request: Request, position: QueuePosition) -> None:
    """Push the position of a request to its holders."""
    request.last_position_sent = (position.position, position.of)
    for holder in request.holders:
        holder.on_position(request, position)
