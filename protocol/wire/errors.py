"""The error codes of the wire, and the exceptions of both ends.

There are three kinds of error, never mixed (see CONTRIBUTING.md): a peer that breaks the rules is `ProtocolError`; a
lost transport is `LinkClosed` (closed by this side) or `LinkBroken` (by the other side, or the network); a refusal is
a value, `protocol.wire.messages.Rejected`, and travels as one.
"""

from enum import StrEnum
from typing import Any


class ErrorCode(StrEnum):
    """Every code that `error`, `rejected` and `failed` messages may have (docs/design.md §5)."""

    PROTOCOL_ERROR = "protocol_error"
    UNKNOWN_TYPE = "unknown_type"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    SPACE_NOT_FOUND = "space_not_found"
    SPACE_EXISTS = "space_exists"
    SPACE_PAUSED = "space_paused"
    SPACE_FULL = "space_full"
    NO_WORKER = "no_worker"
    INVALID_PARAMS = "invalid_params"
    INPUT_MISSING = "input_missing"
    INPUT_TOO_LARGE = "input_too_large"
    INPUT_MISMATCH = "input_mismatch"
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limited"
    ID_CONFLICT = "id_conflict"
    SOURCE_FAILED = "source_failed"
    REQUEST_NOT_FOUND = "request_not_found"
    QUEUE_TIMEOUT = "queue_timeout"
    RUN_TIMEOUT = "run_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    FEED_TIMEOUT = "feed_timeout"
    WORKER_LOST = "worker_lost"
    ENGINE_FAILED = "engine_failed"
    MODEL_NOT_LOADED = "model_not_loaded"
    RESULT_TOO_LARGE = "result_too_large"
    SLOW_CONSUMER = "slow_consumer"
    STORAGE_FULL = "storage_full"
    SHUTTING_DOWN = "shutting_down"
    NOT_OWNER = "not_owner"
    INTERNAL = "internal"

    @property
    def retryable(self) -> bool:
        """Whether the same request, sent again later and unchanged, may succeed."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        ErrorCode.SPACE_PAUSED,
        ErrorCode.SPACE_FULL,
        ErrorCode.NO_WORKER,
        ErrorCode.QUEUE_FULL,
        ErrorCode.RATE_LIMITED,
        ErrorCode.QUEUE_TIMEOUT,
        ErrorCode.RUN_TIMEOUT,
        ErrorCode.IDLE_TIMEOUT,
        ErrorCode.WORKER_LOST,
        ErrorCode.ENGINE_FAILED,
        ErrorCode.MODEL_NOT_LOADED,
        ErrorCode.SLOW_CONSUMER,
        ErrorCode.STORAGE_FULL,
        ErrorCode.SHUTTING_DOWN,
        ErrorCode.NOT_OWNER,
        ErrorCode.INTERNAL,
    }
)


class ProtocolError(Exception):
    """The peer broke a rule of the wire; it is answered with `error`, then the connection is closed.

    Only `UnknownType` is answered without closing.
    """

    code = ErrorCode.PROTOCOL_ERROR
    #: The code that the connection is closed with (RFC 6455 section 7.4.1).
    close_code = 1002


class TextReceived(ProtocolError):
    """A text message arrived, but every message must be binary."""

    close_code = 1003


class UnknownType(ProtocolError):
    """A well-formed message whose `type` this end does not accept from this peer."""

    code = ErrorCode.UNKNOWN_TYPE


class BadText(ProtocolError):
    """A message holds strings that are not UTF-8, as of a JavaScript text that was cut in the middle of an emoji.

    Whoever knows whom the message is about may answer that one alone, and keep the connection.

    Attributes:
        wire: the message, with "?" for each byte that is in no character.
        fields: where these strings are, the path joined by dots, and what is wrong with them.
    """

    def __init__(self, wire: dict[str, Any], fields: dict[str, str]) -> None:
        super().__init__("; ".join(f"{name} {fault}" for name, fault in fields.items()))
        self.wire = wire
        self.fields = fields


class EncodeError(ValueError):
    """A message of our own cannot be encoded: it is too large, too deep, or has a type that msgpack lacks.

    Attributes:
        fields: the values that are at fault, the path joined by dots, and what is wrong with them and what to do; empty
            if no single value is at fault.
    """

    def __init__(self, message: str, fields: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.fields = fields or {}

    def fields_in(self, name: str) -> dict[str, str]:
        """Return `fields`, as somebody knows them who wrote only what is in the field `name` of the message."""
        return {where.removeprefix(f"{name}."): words for where, words in self.fields.items()}

    def describe_in(self, name: str) -> str:
        """Return `fields_in` as a sentence; if no single value is at fault, the message."""
        return "; ".join(f"{where} {words}" for where, words in self.fields_in(name).items()) or str(self)


class LinkError(Exception):
    """The transport is lost; nothing more can be sent or received on this link."""


class LinkClosed(LinkError):
    """This side closed the link."""


class LinkBroken(LinkError):
    """The other side closed the link, or the network did."""


class ConnectError(LinkError):
    """No link could be made: nothing listens there, TLS failed, or the relay refused the handshake."""


class LoginRefused(ConnectError):
    """The relay answered and refused the login. Unless the code is retryable, trying again unchanged will not help.

    Attributes:
        code: the reason, one of `ErrorCode` (`unauthenticated`, `forbidden`, `space_not_found`, ...).
        url: with `not_owner`: the relay to log in to instead; "" if it is not known.
    """

    def __init__(self, code: str, message: str, url: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.url = url


class RequestError(Exception):
    """A request ended in another way than `completed`.

    Attributes:
        request_id: the request's id.
        code: one of `ErrorCode`.
        message: what happened and what to do next.
        details: for `invalid_params`, field -> what is wrong with it; otherwise further facts, or empty.
        retryable: whether sending the same request again may help.
    """

    def __init__(
        self,
        request_id: str,
        code: str,
        message: str,
        details: dict[str, object] | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.request_id = request_id
        self.code = code
        self.message = message
        self.details = details or {}
        self.retryable = retryable


class InputClosed(Exception):
    """A live input takes no more: it was ended, or its request has completed."""


class RequestRejected(RequestError):
    """The relay rejected the request."""


class RequestFailed(RequestError):
    """The request was accepted, but failed."""


class RequestCancelled(RequestError):
    """The request was cancelled by its client, by an operator or because a connection was closed."""

    def __init__(self, request_id: str, reason: str) -> None:
        super().__init__(request_id, "cancelled", reason)
