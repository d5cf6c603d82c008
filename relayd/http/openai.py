"""OpenAI's speech API."""

from starlette.routing import BaseRoute

from protocol.fields import Value
from relayd.http.refusals import Refusal

#: What of the paths is this API's: errors there have its shape.
PATHS = ("/v1/audio", "/v1/models")


def error_body(refusal: Refusal) -> dict[str, Value]:
    """An error as OpenAI's API tells it."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"error": {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}}


def routes() -> list[BaseRoute]:
    """What it serves."""
    return []
