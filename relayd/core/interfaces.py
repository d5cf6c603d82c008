"""Narrow protocols through which the relay's state, its parts and the connections use each other."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import trio

from protocol.link.base import Link
from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Ack
from protocol.wire.validators import Message, Value
from relayd.auth.tokens import Principal
from relayd.config.schema import Config
from relayd.core.principals import Principals
from relayd.core.space import Space
from relayd.frames.frame_log import FrameReader
from relayd.requests.request import Request
from relayd.scheduling.model import Decision
from relayd.scheduling.scheduler import Scheduler
from relayd.stats.counters import Stats
from relayd.store.base import Store
from relayd.store.records import UpdateRequest


class WorkerPort(Protocol):
    """A worker's connection, as the relay's state sees it."""

    @property
    def worker_id(self) -> str:
        """The worker's id in the relay."""

    @property
    def connection_id(self) -> str:
        """Id of the connection."""

    @property
    def principal_name(self) -> str:
        """Name of the worker's principal."""

    def may_serve(self, space: str) -> bool:
        """Whether the worker's principal may serve a space."""

    @property
    def engine(self) -> str:
        """Name of the worker's engine."""

    @property
    def agent(self) -> str:
        """The worker's program and version."""

    @property
    def peer(self) -> str:
        """Address that the worker connects from."""

    @property
    def rtt_s(self) -> float | None:
        """Round-trip time of the last ping in seconds; None before the first."""

    @property
    def received_at(self) -> float:
        """Trio time at which data was last received."""

    def assign(self, request: Request, from_seq: int) -> None:
        """Send `assign`, followed by the inputs."""

    def cancel(self, request_id: str, reason: str) -> None:
        """Send `cancel`."""

    def acknowledge(self, ack: Ack) -> None:
        """Send `ack`."""

    def drain(self, reason: str) -> None:
        """Send `drain`."""

    def undrain(self) -> None:
        """Send `undrain`."""

    def ping(self) -> None:
        """Send `ping`, whose answer shows that the worker is still there."""

    def disconnect(self, reason: str) -> None:
        """End the connection."""


class ConnectionPort(Protocol):
    """A connection that has logged in, as the relay's state sees it."""

    @property
    def link(self) -> Link:
        """The link that carries the connection."""

    @property
    def principal(self) -> Principal:
        """The principal that logged in."""

    @property
    def agent(self) -> str:
        """The peer's program and version."""

    @property
    def connected_at(self) -> float:
        """Trio time of the login."""

    def disconnect(self, reason: str) -> None:
        """End the connection now."""


class ClientPort(Protocol):
    """A client's connection, as views and counters see it."""

    sampled_bytes: int

    @property
    def connection_id(self) -> str:
        """Id of the connection."""

    @property
    def link(self) -> Link:
        """The link that carries the connection."""

    @property
    def principal(self) -> Principal:
        """The principal that logged in."""

    @property
    def held_requests(self) -> Mapping[str, Request]:
        """The requests that the client holds, by request id."""

    @property
    def readers(self) -> Mapping[str, FrameReader]:
        """The client's open readers, by request id."""

    @property
    def backlog_bytes(self) -> int:
        """Bytes that were sent and that the transport has not accepted yet."""

    @property
    def frames_sent(self) -> int:
        """Number of frames sent since the login."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent since the login."""

    def unsent_readers(self) -> list[FrameReader]:
        """Return the readers of ended requests that have not sent all frames yet."""

    def send(self, message: Message) -> None:
        """Send a message that the relay itself makes."""


class RelayState(Protocol):
    """The relay's state, as spaces and workers see it."""

    draining: trio.Event
    config: Config
    store: Store
    nursery: trio.Nursery
    scheduler: Scheduler
    stats: Stats
    requests: dict[str, Request]

    def apply(self, decisions: Iterable[Decision]) -> None:
        """Carry out the scheduler's decisions."""

    def save_status(self, request: Request) -> None:
        """Post the status of a request to the store."""

    def mark_changed(self, topic: str, key: str) -> None:
        """Notify the watchers that a row may have changed."""

    def wake_positions(self) -> None:
        """Wake the task that sends positions if a queue has moved."""


class FeedingRelay(RelayState, Protocol):
    """The relay's state, as live inputs see it."""

    principals: Principals

    @property
    def spaces(self) -> Mapping[str, Space]:
        """The open spaces."""

    def fail(self, request: Request, code: ErrorCode, message: str) -> None:
        """End a request as failed."""

    def fail_internal(self, request: Request) -> None:
        """Fail a request after an error in the relay's own code."""

    def mark_busy(self, topic: str, key: str) -> None:
        """Like `mark_changed`, for a row that changes all the time."""


class ResultsOwner(Protocol):
    """The relay's state, as results see it: their requests, and the actions they may ask for."""

    config: Config
    store: Store
    nursery: trio.Nursery
    requests: dict[str, Request]
    principals: Principals

    @property
    def spaces(self) -> Mapping[str, Space]:
        """The open spaces."""

    def live_requests(self) -> list[Request]:
        """Return the requests that have not ended."""

    def is_finalizing(self, request: Request) -> bool:
        """Whether the end of a request is not stored yet; such a request must not be removed."""

    def status_update(self, request: Request) -> UpdateRequest:
        """Return the status of a request as a record for the store."""

    def fail(self, request: Request, code: ErrorCode, message: str) -> None:
        """End a request as failed."""

    def remove_request(self, request: Request) -> None:
        """Remove a request that has ended."""

    def acknowledge(self, worker_id: str, ack: Ack) -> None:
        """Send `ack` to a worker, if it is connected: it may forget the attempt."""


class TalksPort(Protocol):
    """The conversations, as an operator sees them."""

    def in_use(self) -> list[str]:
        """Return the ids of those that somebody has opened, or that are being answered."""

    def row(self, talk_id: str) -> dict[str, Value] | None:
        """Return the row of one; None if it is not in use."""

    async def end_replies(self, talk_id: str, reason: str) -> int | None:
        """End the replies of one, and wait until that is stored.

        Returns:
            How many there were; None if it is not in use.
        """


class Watcher(Protocol):
    """Receives notifications about changed rows."""

    def mark_changed(self, topic: str, key: str) -> None:
        """Note that the row `key` of `topic` may have changed; topic `queue`: the queue of space `key` has moved."""

    def mark_busy(self, topic: str, key: str) -> None:
        """Like `mark_changed`, for a row that changes all the time."""
