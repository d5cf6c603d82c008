"""`describe` and `ping`: answered from memory. Home Assistant waits a second."""

from relayd.wyoming.connection import Connection
from relayd.wyoming.events import Event


async def describe(connection: Connection, event: Event) -> None:
    """Tell what there is."""
    del event
    await connection.send("info", connection.offer.info())


async def ping(connection: Connection, event: Event) -> None:
    """Answer with the same text."""
    await connection.send("pong", {"text": event.optional("text")})
