"""Makes the last frame of an ended request whose frames are no longer kept."""

from protocol.wire.codec import encode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Failed
from relayd.requests.request import Request
from relayd.scheduling.model import State


def make_final_frame(request: Request) -> bytes:
    """Return a last frame, encoded, for a request that failed or was cancelled; its record is all that is needed."""
    request_id, attempt, seq = request.request_id, request.entry.attempt, max(0, request.log.next_seq - 1)
    message = request.message or ""
    if request.entry.state is State.CANCELLED:
        return encode(Cancelled(request_id=request_id, attempt=attempt, seq=seq, reason=message))
    code = request.code or ErrorCode.INTERNAL.value
    retryable = request.outcome.retryable
    if retryable is None:  # a record of an older relayd
        retryable = any(code == known and known.retryable for known in ErrorCode)
    return encode(
        Failed(
            request_id=request_id,
            attempt=attempt,
            seq=seq,
            code=code,
            message=message,
            details=request.details,
            retryable=retryable,
        )
    )
