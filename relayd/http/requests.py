"""Requests over HTTP, for any space."""

from starlette.routing import BaseRoute

from protocol.fields import Value
from relayd.http.refusals import Refusal


def error_body(refusal: Refusal) -> dict[str, Value]:
    """An error as this API tells it."""
    told: dict[str, Value] = {
        "code": refusal.code,
        "message": refusal.message,
        "retryable": refusal.retryable,
        "retry_after_s": refusal.retry_after_s,
        "details": refusal.details,
    }
    return {"error": told}


def routes() -> list[BaseRoute]:
    """What it serves."""
    return []
