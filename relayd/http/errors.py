"""Errors before the first byte of a response: a status, a code and a message; each API has its own format for them."""

from collections.abc import Mapping
from typing import Any

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Failed
from protocol.wire.messages import Rejected
from protocol.wire.validators import Value

#: Not a code of the wire protocol, which has a `cancelled` frame. 410, because the result will never exist.
CANCELLED = "cancelled"
STATUS: Mapping[str, int] = {
    ErrorCode.PROTOCOL_ERROR: 400,
    ErrorCode.UNKNOWN_TYPE: 400,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.SPACE_NOT_FOUND: 404,
    ErrorCode.REQUEST_NOT_FOUND: 404,
    ErrorCode.SPACE_EXISTS: 409,
    ErrorCode.ID_CONFLICT: 409,
    CANCELLED: 410,
    ErrorCode.INPUT_TOO_LARGE: 413,
    ErrorCode.INVALID_PARAMS: 422,
    ErrorCode.INPUT_MISSING: 422,
    ErrorCode.INPUT_MISMATCH: 422,
    ErrorCode.QUEUE_FULL: 429,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.RESULT_TOO_LARGE: 500,
    ErrorCode.INTERNAL: 500,
    ErrorCode.ENGINE_FAILED: 502,
    ErrorCode.WORKER_LOST: 502,
    ErrorCode.SOURCE_FAILED: 502,
    ErrorCode.SPACE_PAUSED: 503,
    ErrorCode.SPACE_FULL: 503,
    ErrorCode.NO_WORKER: 503,
    ErrorCode.MODEL_NOT_LOADED: 503,
    ErrorCode.SLOW_CONSUMER: 503,
    ErrorCode.SHUTTING_DOWN: 503,
    ErrorCode.NOT_OWNER: 503,
    ErrorCode.QUEUE_TIMEOUT: 504,
    ErrorCode.RUN_TIMEOUT: 504,
    ErrorCode.IDLE_TIMEOUT: 504,
    ErrorCode.FEED_TIMEOUT: 504,
    ErrorCode.STORAGE_FULL: 507,
}
#: `Retry-After` of retryable errors that have no better estimate.
RETRY_AFTER_S = 5.0
_MAY_RETRY = frozenset({429, 503})


class HttpError(Exception):
    """An HTTP request is answered with an error.

    Attributes:
        status: the HTTP status.
        code: one of `ErrorCode`, or a code that only HTTP has (`not_found`, `method_not_allowed`, ...).
        message: what happened and what to do next.
        details: field -> what is wrong with it; or figures.
        retryable: whether the same request may succeed later.
        retry_after_s: how long to wait before a retry; None if unknown.
        headers: additional headers.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        details: Mapping[str, Value] | None = None,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.status = STATUS.get(code, 500) if status is None else status
        self.code = str(code)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})
        self.retryable = ErrorCode(code).retryable if retryable is None and code in set(ErrorCode) else bool(retryable)
        if retry_after_s is None and self.retryable and self.status in _MAY_RETRY:
            retry_after_s = RETRY_AFTER_S
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        if self.status == 401:
            self.headers.setdefault("WWW-Authenticate", "Bearer")
        if retry_after_s is not None:
            self.headers.setdefault("Retry-After", str(max(1, round(retry_after_s + 0.499))))

    @classmethod
    def of(cls, message: Rejected | Failed | Cancelled) -> "HttpError":
        """Convert a message of the relay or of a worker."""
        if isinstance(message, Cancelled):
            return cls(CANCELLED, message.reason or "the request was cancelled")
        retry_after_s = message.retry_after_s if isinstance(message, Rejected) else None
        return cls(
            message.code,
            message.message,
            details=message.details,
            retryable=message.retryable,
            retry_after_s=retry_after_s,
        )


class ResponseAborted(Exception):
    """A started response cannot be finished: the connection is reset, so that it does not look complete."""
