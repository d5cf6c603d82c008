"""Errors as OpenAI's API has them."""

from protocol.wire.validators import Value
from relayd.http.errors import HttpError

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(refusal: HttpError) -> dict[str, Value]:
    """Return the body of an error in OpenAI's format; `param` is the first invalid field of the body."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    field = next(iter(refusal.details), None) if refusal.status in (400, 422) else None
    kind = _KINDS.get(refusal.status, kind)
    return {"error": {"message": refusal.message, "type": kind, "param": field or None, "code": refusal.code}}


def forbid_retry(refusal: HttpError) -> None:
    """Tell the openai package not to send a request again that would fail again, or that has waited already.

    It sends every 5xx twice more otherwise, and waits as long again each time.
    """
    if refusal.status == 504 or not refusal.retryable:
        refusal.headers.setdefault("x-should-retry", "false")
