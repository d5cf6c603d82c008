"""The routes of conversations: those of every dialect that is served on the main port."""

from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute

from relayd.talk.talks import Talks


def routes() -> list[BaseRoute]:
    """Return all of them."""
    return []


def talks_of(connection: HTTPConnection) -> Talks:
    """Return the conversations of the daemon that serves a request or a WebSocket."""
    talks = connection.app.state.context.talks
    assert isinstance(talks, Talks)
    return talks
