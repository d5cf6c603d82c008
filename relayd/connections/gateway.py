"""A connection's way in: WebSocket handshake, `hello`, and then the part it plays.

The only place in the daemon that knows how a link comes about; what it carries is `client_link`'s, `worker_link`'s
and `operator`'s business. Messages are handed over as they come, by `relayd.net.reactor`: once a client has logged
in, its connection has no task any more.
"""

import importlib.metadata
import secrets
import time
from collections.abc import Callable
from typing import Protocol

import attrs
import structlog
import trio

from protocol.link.base import Link
from protocol.link.dial import serve_link
from protocol.link.limits import LinkLimits
from protocol.link.websocket_frames import INTERNAL_ERROR, POLICY_VIOLATION, PartialBudget
from protocol.wire.codec import decode
from protocol.wire.errors import ErrorCode, LinkError, ProtocolError, TextReceived
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.messages import (
    FROM_ANYONE,
    MAX_CONTROL_BYTES,
    MAX_INPUT_CHUNK_BYTES,
    PATH,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    Error,
    Hello,
    Rejected,
    Welcome,
)
from relayd.auth.login_throttle import TOO_MANY_LOGINS, LoginThrottle, address_of
from relayd.auth.origins import may_come_from
from relayd.auth.tokens import PeerCredentials, Principal, TokenRegistry
from relayd.config.schema import Limits
from relayd.connections.client import ClientHandler
from relayd.connections.operator import OperatorHandler
from relayd.connections.worker import WorkerHandler
from relayd.core.admission import Admission
from relayd.core.relay import Relay
from relayd.net.http_head import split_head
from relayd.net.reactor import Reactor
from relayd.net.socket_link import INTERNAL_LOG, INTERNAL_MESSAGE, SocketLink
from relayd.net.websocket_handshake import HandshakeRejected, Head, build_response, check_upgrade, parse_head

log = structlog.get_logger("relayd.wire")

#: For a peer that is refused to read why.
HANG_UP_S = 1.0
HANG_UP_READS = 64
SERVER = f"relayd/{importlib.metadata.version('relayd')}"
#: Between two looks at who has not said hello yet, at most: the time for it may be another by now.
NEWCOMERS_S = 1.0
#: Connections that have not logged in, beyond `max_connections`: with 900 of those, a limit of 1,024 files holds.
MAX_PENDING = 64
#: Unfinished messages of all connections together: each of 900 may be in the middle of a piece of an upload (256 KiB).
#: What strangers hold is bounded by their number, as none may send a message of more than 64 KiB.
MAX_PARTIAL_BYTES = 256 * 1024 * 1024
NO_TEXT = "text message; every message is binary (msgpack)"
FULL = "the relay has all the connections it takes; try again later"
STALLED = Error(
    code=ErrorCode.SLOW_CONSUMER,
    message="this connection does not take what is sent to it; connect again, and attach for what is missing",
)


class RoleHandler(Protocol):
    """What a connection is once it has logged in: a client's, a worker's, an operator's."""

    def on_messages(self, messages: list[bytes]) -> None:
        """Its messages, in order.

        Raises:
            ProtocolError: the peer broke the rules.
        """

    def close(self) -> None:
        """The link is gone: let go of all that it held."""


@attrs.define(eq=False)
class ConnectionSlot:
    """A connection from its first byte to its last, logged in or not.

    Args:
        gate: which counts it.
        peer: where it comes from, for logs.
        credentials: of a unix socket's peer.
    """

    gateway: "Gateway"
    peer: str
    credentials: PeerCredentials | None
    _left: bool = False

    def release(self) -> None:
        """Count it out; the first call counts."""
        if not self._left:
            self._left = True
            self.gateway.open -= 1


@attrs.define(eq=False)
class PendingConnection:
    """A plain connection between its handshake and its login; it takes its link's messages meanwhile."""

    link: SocketLink
    gateway: "Gateway"
    connection_slot: ConnectionSlot
    #: Trio time by which its hello must come, and how long that is.
    due: float
    patience_s: float
    waiting: bool = True

    def on_messages(self, messages: list[bytes]) -> None:
        """See `protocol.link.limits.LinkHandler`: the first is the hello."""
        self.waiting = False
        connection = self.gateway.log_in(self.link, messages[0], self.connection_slot)
        if connection is not None:
            self.gateway.start(connection, messages[1:])

    def on_text(self, text: str) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        self.waiting = False
        send_protocol_error(self.link, TextReceived(NO_TEXT))

    def on_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        self.waiting = False
        log.debug("connection lost", peer=self.link.peer, why=self.link.reason)

    def on_transport_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        self.connection_slot.release()

    def time_out(self) -> None:
        """Its time is over."""
        if self.waiting:
            self.waiting = False
            try:
                send_protocol_error(self.link, _Silent(self.patience_s))
            except Exception:
                log.exception(INTERNAL_LOG, peer=self.link.peer)
                self.link.abort(INTERNAL_MESSAGE)


@attrs.define(eq=False)
class Connection:
    """A connection that has logged in; it takes its link's messages. No fault of it gets out."""

    connection_id: str
    link: Link
    principal: Principal
    gateway: "Gateway"
    connection_slot: "ConnectionSlot"
    #: What its program calls itself.
    agent: str = ""
    connected_at: float = attrs.field(factory=trio.current_time)
    part: RoleHandler | None = None

    def begin(self) -> None:
        """It has its part, and takes its messages from now on."""
        self.gateway.relay.connections[self.connection_id] = self
        self.link.set_handler(self)

    def disconnect(self, reason: str) -> None:
        """End it now."""
        self.link.abort(reason)

    def on_messages(self, messages: list[bytes]) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        assert self.part is not None
        try:
            self.part.on_messages(messages)
        except ProtocolError as fault:
            send_protocol_error(self.link, fault)
        except Exception:
            log.exception(INTERNAL_LOG, peer=self.link.peer)
            self.send_internal_error()

    def send_internal_error(self) -> None:
        """The relay broke over it: say so, and close."""
        send_error_and_close(self.link, ErrorCode.INTERNAL, INTERNAL_MESSAGE, INTERNAL_ERROR)

    def on_text(self, text: str) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        send_protocol_error(self.link, TextReceived(NO_TEXT))

    def on_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        link, relay = self.link, self.gateway.relay
        try:
            if self.part is not None:
                self.part.close()
        except Exception:
            log.exception(INTERNAL_LOG, peer=link.peer)
        finally:
            del relay.connections[self.connection_id]
            relay.slow_consumers += link.stalled
            tell = log.warning if link.stalled else log.info
            tell("disconnected", peer=link.peer, principal=self.principal.name, why=link.reason or "closed")

    def on_transport_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        self.connection_slot.release()


@attrs.define(eq=False)
class Gateway:
    """Where connections come in."""

    relay: Relay
    admission: Admission
    tokens: TokenRegistry
    reactor: Reactor
    #: Of the tasks of connections that have some.
    nursery: trio.Nursery
    #: Begins the daemon's drain; an operator may ask for it.
    drain: Callable[[str], None]
    failures: LoginThrottle = attrs.field(factory=LoginThrottle)
    #: Connections from their first byte on, logged in or not.
    open: int = 0
    _partial: PartialBudget = attrs.field(factory=lambda: PartialBudget(MAX_PARTIAL_BYTES))
    _link_limits: tuple[Limits, LinkLimits] | None = None
    #: Who has shaken hands of late, the first first.
    _pending: list[PendingConnection] = attrs.field(factory=list)
    _some_pending: trio.Event = attrs.field(factory=trio.Event)

    # -- who comes

    def count_in(self, peer: str, credentials: PeerCredentials | None) -> ConnectionSlot | None:
        """Count a connection in; None where there are too many, and it is to be hung up on."""
        if self.open >= self.relay.config.limits.max_connections + MAX_PENDING:
            log.warning("connection rejected: limit reached", peer=peer, open=self.open)
            return None
        self.open += 1
        return ConnectionSlot(self, peer, credentials)

    async def serve(self, stream: trio.abc.Stream, data: bytes, connection_slot: ConnectionSlot) -> bool:
        """One WebSocket, from its handshake on; no fault of it gets out.

        Args:
            stream: TLS already spoken. Of a plain socket, its descriptor may be taken over.
            data: the head of its request, and what came behind it.
            arrival: the connection's.

        Returns:
            whether the connection lives on without this task, and counts itself out.
        """
        try:
            text, early = split_head(data)
            head = parse_head(text)
            if refusal := self.refusal(head):
                raise refusal
            check_upgrade(head, SUBPROTOCOL)
            answer = build_response(head, SUBPROTOCOL)
            if isinstance(stream, trio.SocketStream):
                self._take_over(stream, answer, early, connection_slot)
                return True
            await stream.send_all(answer)
            async with serve_link(stream, peer=connection_slot.peer, limits=self.link_limits, early=early) as link:
                link.set_max_message_bytes(MAX_CONTROL_BYTES)
                connection = await self._log_in(link, connection_slot)
                if connection is not None:
                    self._greet(connection)
                    await self._serve(connection)
        except HandshakeRejected as refusal:
            await reject_handshake(stream, refusal)
        except (LinkError, trio.BrokenResourceError, trio.ClosedResourceError) as fault:
            log.debug("connection lost", peer=connection_slot.peer, why=str(fault))
        except Exception:
            log.exception(INTERNAL_LOG, peer=connection_slot.peer)
        return False

    def _take_over(
        self, stream: trio.SocketStream, answer: bytes, early: bytes, connection_slot: ConnectionSlot
    ) -> None:
        # A stranger is not kept a megabyte for.
        link = self.reactor.register(
            stream, connection_slot.peer, self.link_limits, answer, max_message_bytes=MAX_CONTROL_BYTES
        )
        try:
            patience_s = self.relay.config.limits.hello_timeout_s
            pending = PendingConnection(link, self, connection_slot, self.reactor.now + patience_s, patience_s)
            self._pending.append(pending)
            self._some_pending.set()
            link.set_handler(pending)
            if early:
                link.feed_early(early)
        except BaseException:
            link.abort(INTERNAL_MESSAGE)
            raise

    async def serve_login_timeouts(self) -> None:
        """Hang up on who sends no hello in time, until cancelled."""
        waiting = self._pending
        while True:
            if not waiting:
                self._some_pending = trio.Event()
                await self._some_pending.wait()
            now = trio.current_time()
            await trio.sleep_until(min(waiting[0].due, now + NEWCOMERS_S))
            self._give_up_on_late(trio.current_time())

    def _give_up_on_late(self, now: float) -> None:
        for pending in self._pending:
            if pending.due <= now:
                pending.time_out()
        self._pending[:] = [pending for pending in self._pending if pending.waiting]

    @property
    def link_limits(self) -> LinkLimits:
        """What peers are held to, by the settings as they are now."""
        limits = self.relay.config.limits
        if self._link_limits is None or self._link_limits[0] is not limits:
            link_limits = LinkLimits(
                ping_interval_s=limits.ping_interval_s,
                dead_after_s=limits.dead_after_s,
                send_timeout_s=limits.stall_timeout_s,
                max_backlog_bytes=limits.max_backlog_bytes,
                farewell=STALLED,
                budget=self._partial,
            )
            self._link_limits = limits, link_limits
        return self._link_limits[1]

    def refusal(self, head: Head) -> HandshakeRejected | None:
        """Why a handshake is not for us."""
        origin = head.get("origin")
        if head.path != PATH:
            return HandshakeRejected(404, f"nothing here; the relay speaks at {PATH}")
        if not may_come_from(origin, head.get("host"), self.relay.config.allowed_origins):
            return HandshakeRejected(403, f"origin {origin} is not in allowed_origins of relayd.toml")
        return HandshakeRejected(503, FULL) if self._full() else None

    def _full(self) -> bool:
        return len(self.relay.connections) >= self.relay.config.limits.max_connections

    # -- who it is

    async def _log_in(self, link: Link, connection_slot: ConnectionSlot) -> Connection | None:
        """Wait for the hello; None where there was none, or one that is refused: the link is then closed."""
        patience_s = self.relay.config.limits.hello_timeout_s
        connection = None
        try:
            with trio.fail_after(patience_s):
                data = await link.receive()
            connection = self.log_in(link, data, connection_slot)
        except trio.TooSlowError:
            send_protocol_error(link, _Silent(patience_s))
        except TextReceived as fault:
            send_protocol_error(link, fault)
        if connection is None:
            await link.aclose()
        return connection

    def log_in(self, link: Link, data: bytes, connection_slot: ConnectionSlot) -> Connection | None:
        """Look at the first message; None where it is no hello, or one that is refused: the link then closes."""
        try:
            hello = decode(data, FROM_ANYONE)
            assert isinstance(hello, Hello)
            if hello.version != PROTOCOL_VERSION:
                raise ProtocolError(f"version {hello.version}; this relay speaks version {PROTOCOL_VERSION}")
            principal = self._principal(hello, connection_slot)
        except ProtocolError as fault:
            send_protocol_error(link, fault)
        except Exception:
            log.exception(INTERNAL_LOG, peer=link.peer)
            send_error_and_close(link, ErrorCode.INTERNAL, INTERNAL_MESSAGE, INTERNAL_ERROR)
        else:
            if isinstance(principal, Principal):
                connection = Connection(secrets.token_hex(8), link, principal, self, connection_slot, hello.agent)
                link.set_max_message_bytes(MAX_MESSAGE_BYTES)
                log.info("connected", peer=link.peer, role=principal.role, principal=principal.name, agent=hello.agent)
                return connection
            if principal.retry_after_s is None:  # else it was told often enough
                log.warning("login refused", peer=link.peer, role=hello.role, code=principal.code)
            send_error_and_close(link, principal.code, principal.message, POLICY_VIOLATION)
        return None

    def _principal(self, hello: Hello, connection_slot: ConnectionSlot) -> Principal | Rejected:
        principal = self.tokens.log_in(hello, connection_slot.credentials, time.time())
        if isinstance(principal, Rejected):
            return self._throttled(principal, hello, connection_slot)
        if self._full():  # others have logged in since its handshake
            return Rejected.because(ErrorCode.RATE_LIMITED, FULL)
        most = principal.limits.max_connections
        if most is not None:
            mine = sum(other.principal.token_id == principal.token_id for other in self.relay.connections.values())
            if mine >= most:
                message = f"the token of {principal.name!r} allows {most} connections at once; close one first"
                return Rejected.because(ErrorCode.RATE_LIMITED, message)
        return principal

    def _throttled(self, refusal: Rejected, hello: Hello, connection_slot: ConnectionSlot) -> Rejected:
        """A refused login; of too many from one address, one that says so."""
        if refusal.code != ErrorCode.UNAUTHENTICATED or not hello.token or connection_slot.credentials is not None:
            return refusal
        wait_s = self.failures.add(address_of(connection_slot.peer), trio.current_time())
        if wait_s is None:
            return refusal
        return Rejected.because(ErrorCode.RATE_LIMITED, TOO_MANY_LOGINS, retry_after_s=wait_s)

    # -- its part

    def start(self, connection: Connection, messages: list[bytes]) -> None:
        """Begin the part of a connection that the plane carries.

        Args:
            connection: it was admitted.
            messages: what came behind its hello.
        """
        self._greet(connection)
        principal = connection.principal
        # A client at rest needs no task; a worker and an operator have some of their own, and few are there.
        if principal.role != "client" or principal.expires_at is not None:
            connection.link.buffer_again(messages)
            self.nursery.start_soon(self._serve_in_task, connection)
            return
        connection.part = self._client(connection)
        connection.begin()
        if messages:
            connection.on_messages(messages)

    def _greet(self, connection: Connection) -> None:
        try:
            connection.link.send(self._welcome(connection))
        except LinkError:
            log.debug("connection lost", peer=connection.link.peer, why=connection.link.reason)

    async def _serve_in_task(self, connection: Connection) -> None:
        """As `_stay`, in a task of its own; no fault of it gets out."""
        try:
            await self._serve(connection)
        except Exception:
            log.exception(INTERNAL_LOG, peer=connection.link.peer)
            connection.send_internal_error()
            connection.connection_slot.release()
        except BaseException:
            connection.link.abort("the relay has stopped")
            connection.connection_slot.release()
            raise

    async def _serve(self, connection: Connection) -> None:
        """Play the connection's part until its link is gone or its token has ended."""
        link, principal = connection.link, connection.principal
        async with trio.open_nursery() as nursery:
            connection.part = self._part(connection, nursery)
            connection.begin()
            with trio.move_on_after(_left_s(principal)) as token_life:
                await link.wait_gone()
            if token_life.cancelled_caught:
                send_error_and_close(link, ErrorCode.UNAUTHENTICATED, "the token has expired", POLICY_VIOLATION)
            nursery.cancel_scope.cancel()

    def _part(self, connection: Connection, nursery: trio.Nursery) -> RoleHandler:
        if connection.principal.role == "worker":
            worker = WorkerHandler(
                connection.connection_id, connection.link, connection.principal, self.relay, nursery, connection.agent
            )
            if isinstance(connection.link, SocketLink):
                connection.link.use_bulk_mode()
                nursery.start_soon(
                    self.reactor.serve_worker_link,
                    connection.link,
                    worker.forward_audio,
                    connection.send_internal_error,
                )
            return worker
        client = self._client(connection)
        if connection.principal.role == "operator":
            OperatorHandler.join(client, self.relay, self.tokens, nursery, self.drain)
        return client

    def _client(self, connection: Connection) -> ClientHandler:
        client = ClientHandler(
            connection.connection_id, connection.link, connection.principal, self.relay, self.admission
        )
        client.begin()
        return client

    def _welcome(self, connection: Connection) -> Welcome:
        limits = self.relay.config.limits
        return Welcome(
            connection_id=connection.connection_id,
            principal=connection.principal.name,
            limits={
                "max_control_bytes": MAX_CONTROL_BYTES,
                "max_message_bytes": MAX_MESSAGE_BYTES,
                "max_input_chunk_bytes": MAX_INPUT_CHUNK_BYTES,
                "max_input_bytes": limits.max_input_bytes,
                "max_result_bytes": limits.max_result_bytes,
                "resume_window_s": limits.resume_window_s,
            },
            ping_interval_s=limits.ping_interval_s,
            server=SERVER,
        )


class _Silent(ProtocolError):
    """No `hello` came in time. A network that stood still does that too, so whoever it was may try again."""

    code = ErrorCode.IDLE_TIMEOUT
    close_code = POLICY_VIOLATION

    def __init__(self, patience_s: float) -> None:
        super().__init__(f"no hello within {patience_s:g} s; connect again")


def _left_s(principal: Principal) -> float:
    return float("inf") if principal.expires_at is None else max(0.0, principal.expires_at - time.time())


def send_protocol_error(link: Link, fault: ProtocolError) -> None:
    """The peer broke a rule: say which, and close."""
    log.warning("peer broke the protocol", peer=link.peer, why=str(fault))
    send_error_and_close(link, fault.code, str(fault), fault.close_code)


def send_error_and_close(link: Link, code: str, message: str, close_code: int) -> None:
    """Say why, and close."""
    try:
        link.send(Error(code=code, message=message))
    except LinkError:
        return
    link.close_soon(close_code, message)


async def reject_handshake(stream: trio.abc.Stream, refusal: HandshakeRejected) -> None:
    """Answer no, and see to it that the peer can read it: closing over unread bytes resets the connection."""
    try:
        with trio.move_on_after(HANG_UP_S):
            await stream.send_all(refusal.to_bytes())
            if isinstance(stream, trio.SocketStream):
                await stream.send_eof()
                for _ in range(HANG_UP_READS):
                    if not await stream.receive_some():
                        break
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
