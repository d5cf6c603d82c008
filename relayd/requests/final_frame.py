"""The last frame of an ended request whose frames are gone."""

from protocol.wire.codec import encode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Failed
from relayd.requests.request import Request
from relayd.scheduling.model import State


def make_final_frame(request: Request) -> bytes:
    """Return the last frame of a request that failed or was cancelled, made from its record alone."""
    request_id, attempt, seq = request.request_id, request.entry.attempt, max(0, request.log.next_seq - 1)
    words = request.message or ""
    if request.entry.state is State.CANCELLED:
        return encode(Cancelled(request_id=request_id, attempt=attempt, seq=seq, reason=words))
    code = request.code or ErrorCode.INTERNAL.value
    retryable = any(code == known and known.retryable for known in ErrorCode)
    return encode(
        Failed(request_id=request_id, attempt=attempt, seq=seq, code=code, message=words, retryable=retryable)
    )
