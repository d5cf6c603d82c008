"""Which connections the relay keeps: those that have logged in, and a budget of their own for strangers.

Strangers cannot shut anybody out: where there are too many, the one that has been silent longest makes room for the
next, first of the address that has most. A peer that logs in does so within milliseconds, and leaves them. Peers of
the unix socket are never counted, so that an operator always gets in.
"""

import resource
from collections.abc import Callable

import attrs
import structlog
import trio

from protocol.wire.messages import Rejected
from relayd.auth.login_throttle import LoginThrottle, address_of, network_of
from relayd.auth.tokens import PeerCredentials, Principal
from relayd.config.schema import Config
from relayd.net.proxies import is_trusted

log = structlog.get_logger("relayd.wire")

#: Files that the daemon itself needs: store, results that are being written, listeners, epoll sets.
OWN_FILES = 60
#: Strangers for whom there is room whatever the system grants.
MIN_STRANGERS = 64
#: One part in so many of `max_connections` is kept for workers and operators.
RESERVED_PART = 20
#: Between two lines of the log about strangers that were hung up on.
REPORT_S = 1.0
#: A connection of an address with too many failed logins is looked at after this time.
PENALTY_S = 0.5


def _nothing() -> None:
    pass


@attrs.define(eq=False)
class ConnectionSlot:
    """A connection, from its first byte to its last.

    Args:
        budget: counts it.
        peer: where the connection comes from, for logs.
        credentials: of a unix socket's peer; such a connection is not counted.
        hang_up: ends the connection while it is a stranger's.
    """

    budget: "ConnectionBudget"
    peer: str
    credentials: PeerCredentials | None = None
    hang_up: Callable[[], None] = _nothing
    known: bool = False
    released: bool = False
    #: The peer's address; of an IPv6 address, the network that one customer has (RFC 6177). `peer` may later be the
    #: client that a proxy reports.
    network: str = attrs.field(init=False)
    #: The other end of the connection, also where `peer` has become the client that it reports.
    source: str = attrs.field(init=False)
    #: Whom the head of its WebSocket handshake logs in, or why not: the user of a page.
    user: Principal | Rejected | None = None

    def __attrs_post_init__(self) -> None:
        self.network, self.source = network_of(self.peer), self.peer

    def log_in(self, role: str) -> bool:
        """Note that the peer has logged in; False where the relay has all the connections of that role it may have."""
        return self.budget.log_in(self, role)

    def log_out(self) -> None:
        """Note that the peer is a stranger again: an HTTP connection between two requests."""
        self.budget.log_out(self)

    def release(self) -> None:
        """Note that the connection is closed; without effect after the first call."""
        self.budget.release(self)


@attrs.define(eq=False)
class ConnectionBudget:
    """Counts connections; one for the whole daemon.

    Args:
        config: returns the current settings.
        failures: addresses with too many failed logins.
    """

    config: Callable[[], Config]
    failures: LoginThrottle = attrs.field(factory=LoginThrottle)
    #: Connections that have not been closed, those of the unix socket included.
    open: int = 0
    #: Connections that have logged in.
    known: int = 0
    #: Strangers that were hung up on to make room.
    dropped: int = 0
    #: The oldest first, of all and of each network.
    _strangers: dict[ConnectionSlot, None] = attrs.field(factory=dict)
    _by_network: dict[str, dict[ConnectionSlot, None]] = attrs.field(factory=dict)
    _reported: tuple[float, int] = (float("-inf"), 0)

    def __len__(self) -> int:
        return len(self._strangers)

    def admit(self, peer: str, credentials: PeerCredentials | None) -> ConnectionSlot:
        """Count a new connection; where there are too many strangers, another one is hung up on."""
        slot = ConnectionSlot(self, peer, credentials)
        self.open += 1
        if credentials is None:
            self._add(slot)
            self._make_room(slot)
        return slot

    def penalty_s(self, slot: ConnectionSlot) -> float:
        """How long to wait before a connection is looked at: its address failed to log in too often."""
        if slot.credentials is not None or not self.failures.is_throttled(address_of(slot.peer), trio.current_time()):
            return 0.0
        return PENALTY_S

    def log_in(self, slot: ConnectionSlot, role: str) -> bool:
        """See `ConnectionSlot.log_in`."""
        if slot.credentials is not None or slot.known:
            return True
        if self.is_full(role):
            return False
        self._remove(slot)
        slot.known = True
        self.known += 1
        return True

    def is_full(self, role: str) -> bool:
        """Whether no more connections of a role may log in; a few are kept for workers and operators."""
        most = self.config().limits.max_connections
        return self.known >= (most - most // RESERVED_PART if role == "client" else most)

    def log_out(self, slot: ConnectionSlot) -> None:
        """See `ConnectionSlot.log_out`."""
        if slot.known and not slot.released:
            slot.known = False
            self.known -= 1
            self._add(slot)
            self._make_room(slot)

    def release(self, slot: ConnectionSlot) -> None:
        """See `ConnectionSlot.release`."""
        if not slot.released:
            slot.released, slot.hang_up = True, _nothing  # it refers to the connection, which refers to this
            self.open -= 1
            self.known -= slot.known
            self._remove(slot)

    def _add(self, slot: ConnectionSlot) -> None:
        self._strangers[slot] = None
        self._by_network.setdefault(slot.network, {})[slot] = None

    def _remove(self, slot: ConnectionSlot) -> None:
        if slot in self._strangers:
            del self._strangers[slot]
            mine = self._by_network[slot.network]
            del mine[slot]
            if not mine:
                del self._by_network[slot.network]

    def _make_room(self, newest: ConnectionSlot) -> None:
        config = self.config()
        limits, mine = config.limits, self._by_network[newest.network]
        if not is_trusted(newest.peer, config) and len(mine) > limits.max_pending_per_address:
            self._drop(next(iter(mine)))
        elif len(self._strangers) > max(MIN_STRANGERS, min(limits.max_pending, self._files_left())):
            heaviest = max(self._by_network.values(), key=len)
            self._drop(next(iter(heaviest)))

    def _files_left(self) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - self.config().limits.max_connections - OWN_FILES

    def _drop(self, slot: ConnectionSlot) -> None:
        self._remove(slot)
        self.dropped += 1
        slot.hang_up()
        now = trio.current_time()
        since, reported = self._reported
        if now - since >= REPORT_S:
            self._reported = (now, self.dropped)
            log.warning(
                "connections dropped before their login", count=self.dropped - reported, waiting=len(self._strangers)
            )
