"""The routes of conversations: those of every dialect that is served on the main port."""

from starlette.routing import BaseRoute

from relayd.talk.dialects import own
from relayd.talk.dialects.openapi import PATHS as PATHS


def routes() -> list[BaseRoute]:
    """Return all of them."""
    return own.routes()
