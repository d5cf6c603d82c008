"""Everything known of one request, for operators: its row, timeline, params and readers."""

import msgpack

from protocol.wire.codec import encode
from protocol.wire.errors import EncodeError
from protocol.wire.messages import Done
from protocol.wire.structs import KIB
from protocol.wire.validators import Value
from relayd.core.relay import Relay
from relayd.requests.request import Request
from relayd.requests.summary import summarize
from relayd.scheduling.model import State
from relayd.views.rows import request_row
from relayd.views.token_rows import Row

#: Of what it asked for; the rest of a description is below 16 KiB, but for `details`.
ASKED_BYTES = 24 * KIB
#: Of the details of its error, which are a worker's.
DETAILS_BYTES = 8 * KIB
MAX_READERS = 32


def request_detail(relay: Relay, request: Request) -> Row:
    """What `steer` `describe` answers with."""
    position = None
    if request.entry.state is State.QUEUED:
        queue = relay.scheduler.state.spaces[request.submit.space].queue
        position = next(number for number, entry in enumerate(queue, 1) if entry is request.entry)
    submit, frames = request.submit, request.log
    told: Row = {
        "request": request_row(relay, request.request_id, position),
        "timeline": [msgpack.unpackb(step) for step in request.timeline],
        "timeline_left_out": request.timeline_dropped,
        "retry": submit.retry,
        "detach": submit.detach,
        "queue_timeout_s": request.queue_timeout_s,
        "run_timeout_s": request.run_timeout_s,
        "idle_timeout_s": request.idle_timeout_s,
        "format": request.format.to_map() if request.format else None,
        "details": _bounded(request.details),
        "holders": len(request.holders),
        "readers": [
            {"connection_id": connection_id, "principal": client.principal.name, "behind_frames": behind}
            for connection_id, client in relay.clients.items()
            if (reader := client.readers.get(request.request_id)) and (behind := frames.next_seq - reader.seq) >= 0
        ][:MAX_READERS],
    }
    asked: Row = msgpack.unpackb(request.summary or summarize(submit, ASKED_BYTES))
    return told | asked


def _bounded(details: dict[str, Value]) -> dict[str, Value]:
    try:
        fits = len(encode(Done(action="describe", data={"details": {"": details}}))) <= DETAILS_BYTES
    except EncodeError:  # one level deeper than they came, they may be too deep
        fits = False
    return details if fits else {"cut": "too large to be told here; its last frame has them"}
