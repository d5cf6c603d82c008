"""What the relay's state knows of the connections of workers and of those that watch."""

from typing import Protocol

from protocol.messages import Ack
from relayd.requests import Request


class WorkerPort(Protocol):
    """A worker's connection, as far as the relay's state sees it."""

    @property
    def worker_id(self) -> str:
        """The relay's name for it."""

    @property
    def connection_id(self) -> str:
        """Of its connection."""

    @property
    def principal(self) -> str:
        """Whose it is."""

    @property
    def engine(self) -> str:
        """What it runs."""

    @property
    def agent(self) -> str:
        """Its program and version."""

    @property
    def peer(self) -> str:
        """Where it connects from."""

    @property
    def rtt_s(self) -> float | None:
        """Round trip of the last ping."""

    @property
    def heard_at(self) -> float:
        """Trio time of the last sign of life."""

    def assign(self, request: Request, from_seq: int) -> None:
        """Send `assign`, and the inputs behind it."""

    def cancel(self, request_id: str, reason: str) -> None:
        """Send `cancel`."""

    def acknowledge(self, ack: Ack) -> None:
        """Send `ack`."""

    def drain(self, reason: str) -> None:
        """Send `drain`."""

    def undrain(self) -> None:
        """Send `undrain`."""

    def disconnect(self, reason: str) -> None:
        """End the connection."""


class Watcher(Protocol):
    """Somebody who wants to know what changed."""

    def touch(self, topic: str, key: str) -> None:
        """The row `key` of `topic` may look otherwise now; topic `queue`: the queue of space `key` has moved."""

    def stir(self, topic: str, key: str) -> None:
        """As `touch`, of something that changes all the time."""
