"""Errors before the first byte of a response: a status, a code and a message; each API shapes them its own way."""

from collections.abc import Mapping
from typing import Any

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Failed
from protocol.wire.messages import Rejected
from protocol.wire.validators import Value

#: `cancelled` is no code of the wire: there it is a frame of its own. 410, as what was asked for will never come.
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
    ErrorCode.SPACE_PAUSED: 503,
    ErrorCode.SPACE_FULL: 503,
    ErrorCode.NO_WORKER: 503,
    ErrorCode.MODEL_NOT_LOADED: 503,
    ErrorCode.SLOW_CONSUMER: 503,
    ErrorCode.SHUTTING_DOWN: 503,
    ErrorCode.QUEUE_TIMEOUT: 504,
    ErrorCode.RUN_TIMEOUT: 504,
    ErrorCode.IDLE_TIMEOUT: 504,
    ErrorCode.STORAGE_FULL: 507,
}
#: What a client is told to wait that may try again, where the relay does not know better.
RETRY_AFTER_S = 5.0
_MAY_RETRY = frozenset({429, 503})


class HttpError(Exception):
    """A request of HTTP's that gets an error in place of what it asked for.

    Attributes:
        status: of HTTP.
        code: one of `ErrorCode`, or a word for what only HTTP knows (`not_found`, `method_not_allowed`, ...).
        message: what happened and what to do next.
        details: field -> what is wrong with it, or figures.
        retryable: whether the same request may succeed later.
        retry_after_s: how long to wait, where that makes sense.
        headers: more of them.
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
    def of(cls, told: Rejected | Failed | Cancelled) -> "HttpError":
        """What the relay or a worker said, as HTTP says it."""
        if isinstance(told, Cancelled):
            return cls(CANCELLED, told.reason or "the request was cancelled")
        retry_after_s = told.retry_after_s if isinstance(told, Rejected) else None
        return cls(told.code, told.message, details=told.details, retryable=told.retryable, retry_after_s=retry_after_s)


class ResponseAborted(Exception):
    """A response that began cannot be finished: the connection is cut, so that nobody takes it for whole."""
