"""The errors of the VoxCPM server, and which of the relay's are told as which of them."""

from collections.abc import Mapping
from typing import Any

from protocol.wire.errors import ErrorCode
from relayd.http.errors import HttpError
from relayd.http.json_encoding import jsonable
from relayd.talk.dialects.json_messages import parse_object

Message = dict[str, Any]

#: Error of the relay -> theirs; GENERATION_FAILED for what else happens to a request.
CODES: Mapping[str, str] = {
    ErrorCode.INVALID_PARAMS: "INVALID_PARAMS",
    ErrorCode.INPUT_MISSING: "INVALID_PARAMS",
    ErrorCode.MODEL_NOT_LOADED: "MODEL_NOT_LOADED",
    ErrorCode.NO_WORKER: "MODEL_NOT_LOADED",
    ErrorCode.SPACE_NOT_FOUND: "MODEL_NOT_LOADED",
    ErrorCode.SPACE_PAUSED: "MODEL_NOT_LOADED",
    ErrorCode.QUEUE_FULL: "RATE_LIMITED",
    ErrorCode.QUEUE_TIMEOUT: "RATE_LIMITED",
    ErrorCode.RATE_LIMITED: "RATE_LIMITED",
    ErrorCode.FORBIDDEN: "INTERNAL_ERROR",
    ErrorCode.INTERNAL: "INTERNAL_ERROR",
    ErrorCode.STORAGE_FULL: "INTERNAL_ERROR",
    ErrorCode.SHUTTING_DOWN: "INTERNAL_ERROR",
    ErrorCode.NOT_OWNER: "INTERNAL_ERROR",
}


class Failure(Exception):
    """A message is answered with an error."""

    def __init__(self, code: str, message: str, details: Message | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.details = code, message, details or {}


def parse(data: str | bytes) -> Message:
    """Parse a message; raises `Failure`."""
    if isinstance(data, bytes):
        raise Failure("UNSUPPORTED_FORMAT", "Binary messages from client are not supported")
    try:
        return parse_object(data)
    except ValueError:
        raise Failure("INVALID_JSON", "Invalid JSON format") from None


def invalid(faults: Message) -> Failure:
    """Return the error for params, by what is wrong with each."""
    said = ", ".join(f"{name}: {what}" for name, what in faults.items())
    return Failure("INVALID_PARAMS", f"Validation failed: {said}", faults)


def failure_of(refusal: HttpError) -> Failure:
    """Return the error that a refusal or failure of the relay is told as."""
    code, details = CODES.get(refusal.code, "GENERATION_FAILED"), jsonable(refusal.details)
    return invalid(details) if code == "INVALID_PARAMS" and details else Failure(code, refusal.message, details)
