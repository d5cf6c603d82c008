"""The details of one request, for operators: its row, timeline, params, readers and what its attempts printed."""

import msgpack

from protocol.wire.codec import encode
from protocol.wire.errors import EncodeError
from protocol.wire.messages import Done
from protocol.wire.structs import KIB
from protocol.wire.validators import Value
from relayd.core.relay import Relay
from relayd.requests.request import Request
from relayd.scheduling.model import State
from relayd.views.rows import request_row
from relayd.views.token_rows import Row

#: Limit for the summary of its submission; the rest of the reply, without `details`, is below 16 KiB.
SUMMARY_BYTES = 24 * KIB
#: Limit for the details of its error, which come from a worker.
DETAILS_BYTES = 8 * KIB
#: Limit for what its attempts printed.
REPORT_BYTES = 8 * KIB
MAX_READERS = 32


def request_detail(relay: Relay, request: Request) -> Row:
    """Return the reply to the `steer` action `describe`."""
    position = None
    if request.entry.state is State.QUEUED:
        queue = relay.scheduler.state.spaces[request.submit.space].queue
        position = next(number for number, entry in enumerate(queue, 1) if entry is request.entry)
    submit, frames = request.submit, request.log
    detail: Row = {
        "request": request_row(relay, request.request_id, position),
        "timeline": [msgpack.unpackb(step) for step in request.timeline],
        "timeline_left_out": request.timeline_dropped,
        "retry": submit.retry,
        "detach": submit.detach,
        "group": submit.group,
        "queue_timeout_s": request.queue_timeout_s,
        "run_timeout_s": request.run_timeout_s,
        "idle_timeout_s": request.idle_timeout_s,
        "format": request.format.to_map() if request.format else None,
        "video": request.video.to_map() if request.video else None,
        "details": _bounded(request.details),
        "report": request.report.encode()[-REPORT_BYTES:].decode(errors="ignore"),
        "holders": len(request.holders),
        "readers": [
            {"connection_id": connection_id, "principal": client.principal.name, "behind_frames": behind}
            for connection_id, client in relay.clients.items()
            if (reader := client.readers.get(request.request_id)) and (behind := frames.next_seq - reader.seq) >= 0
        ][:MAX_READERS],
    }
    summary: Row = msgpack.unpackb(request.summary or request.summarize(SUMMARY_BYTES))
    return detail | summary


def _bounded(details: dict[str, Value]) -> dict[str, Value]:
    try:
        fits = len(encode(Done(action="describe", data={"details": {"": details}}))) <= DETAILS_BYTES
    except EncodeError:  # they are nested one level deeper here than in their frame, which may be too deep
        fits = False
    return details if fits else {"cut": "too large to be shown here; the request's last frame has them"}
