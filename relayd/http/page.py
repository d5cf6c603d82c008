"""The relay's page."""

from starlette.routing import BaseRoute


def routes() -> list[BaseRoute]:
    """What it serves."""
    return []
