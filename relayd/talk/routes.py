"""The routes of conversations, and their doors: those of every dialect."""

from starlette.routing import BaseRoute

from relayd.config.schema import Talk
from relayd.http.server import Door
from relayd.talk.dialects import gpu_server, own, realtime, tts_server
from relayd.talk.dialects.openapi import PATHS as PATHS


def routes(settings: Talk) -> list[BaseRoute]:
    """Return those of the main port."""
    more = tts_server.routes() if settings.tts_server else []
    return [*own.routes(), *gpu_server.routes(), *realtime.routes(), *more]


def doors(settings: Talk) -> list[Door]:
    """Return the further ports."""
    return [Door(settings.listen, "[talk] listen", gpu_server.make_app)] if settings.listen else []
