"""What the relay's state and its parts need of each other and of connections, as narrow protocols."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import trio

from protocol.link.base import Link
from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Ack
from protocol.wire.validators import Message
from relayd.auth.tokens import Principal
from relayd.config.schema import Config
from relayd.frames.frame_log import FrameReader
from relayd.requests.request import Request
from relayd.scheduling.model import Decision
from relayd.scheduling.scheduler import Scheduler
from relayd.stats.counters import Stats
from relayd.store.base import Store
from relayd.store.records import UpdateRequest


class WorkerPort(Protocol):
    """A worker's connection, as far as the relay's state sees it."""

    @property
    def worker_id(self) -> str:
        """The relay's name for it."""

    @property
    def connection_id(self) -> str:
        """Of its connection."""

    @property
    def principal_name(self) -> str:
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
    def received_at(self) -> float:
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


class ConnectionPort(Protocol):
    """A connection that has logged in, as far as the relay's state sees it."""

    @property
    def link(self) -> Link:
        """What carries it."""

    @property
    def principal(self) -> Principal:
        """Whose it is."""

    @property
    def agent(self) -> str:
        """Its program and version."""

    @property
    def connected_at(self) -> float:
        """Trio time of its login."""

    def disconnect(self, reason: str) -> None:
        """End it now."""


class ClientPort(Protocol):
    """A client's connection, as far as views and counters see it."""

    sampled_bytes: int

    @property
    def connection_id(self) -> str:
        """Of its connection."""

    @property
    def link(self) -> Link:
        """What carries it."""

    @property
    def principal(self) -> Principal:
        """Whose it is."""

    @property
    def held_requests(self) -> Mapping[str, Request]:
        """The requests it holds."""

    @property
    def readers(self) -> Mapping[str, FrameReader]:
        """What it reads, by request id."""

    @property
    def backlog_bytes(self) -> int:
        """What it has not taken yet."""

    @property
    def frames_sent(self) -> int:
        """Since its login."""

    @property
    def bytes_sent(self) -> int:
        """Since its login."""

    def unsent_readers(self) -> list[FrameReader]:
        """Readers of ended requests that have not sent all yet."""

    def send(self, message: Message) -> None:
        """Send a message of the relay's own."""


class RelayState(Protocol):
    """The relay's state, as its spaces and workers see it."""

    config: Config
    store: Store
    nursery: trio.Nursery
    scheduler: Scheduler
    stats: Stats
    requests: dict[str, Request]

    def apply(self, decisions: Iterable[Decision]) -> None:
        """Carry out what the scheduler decided."""

    def save_status(self, request: Request) -> None:
        """Post a request's status to the store."""

    def mark_changed(self, topic: str, key: str) -> None:
        """Tell the watchers that a row may have changed."""

    def wake_positions(self) -> None:
        """Have positions sent if a queue has moved."""


class ResultsOwner(Protocol):
    """What results need of the relay's state: the requests they belong to, and the three things they ask for."""

    config: Config
    store: Store
    nursery: trio.Nursery
    requests: dict[str, Request]

    def live_requests(self) -> list[Request]:
        """Those that have not ended."""

    def is_finalizing(self, request: Request) -> bool:
        """Whether the end of a request is not safe yet; such a request must not be forgotten."""

    def status_update(self, request: Request) -> UpdateRequest:
        """How a request stands, as the store keeps it."""

    def fail(self, request: Request, code: ErrorCode, message: str) -> None:
        """End a request as failed."""

    def remove_request(self, request: Request) -> None:
        """Drop a request that has ended."""

    def acknowledge(self, worker_id: str, ack: Ack) -> None:
        """Have a worker forget an attempt, if it is there."""


class Watcher(Protocol):
    """Somebody who wants to know what changed."""

    def mark_changed(self, topic: str, key: str) -> None:
        """The row `key` of `topic` may look otherwise now; topic `queue`: the queue of space `key` has moved."""

    def mark_busy(self, topic: str, key: str) -> None:
        """As `touch`, of something that changes all the time."""
