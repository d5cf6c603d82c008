"""The routes of conversations: those of every dialect that is served on the main port."""

from starlette.routing import BaseRoute

from relayd.talk.dialects import own


def routes() -> list[BaseRoute]:
    """Return all of them."""
    return own.routes()
