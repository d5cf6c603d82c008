"""Health, readiness and metrics."""

from starlette.routing import BaseRoute


def routes() -> list[BaseRoute]:
    """What it serves."""
    return []
