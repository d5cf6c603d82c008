"""Accepts WebSocket connections: the handshake, the login by `hello`, and then a handler for the role.

This is the only module in the daemon that knows how a link is made; its messages are handled in `client`, `worker` and
`operator`. `relayd.net.reactor` passes them to the handlers as they arrive, so the connection of a client has no task
of its own once it has logged in.
"""

import importlib.metadata
import secrets
import time
from collections.abc import Callable
from functools import partial

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
    MAX_UNACKED_BYTES,
    PATH,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    Error,
    Hello,
    Rejected,
    Welcome,
)
from relayd.auth.login_throttle import TOO_MANY_LOGINS, address_of
from relayd.auth.origins import RefusedOrigins, may_come_from, refusal_message
from relayd.auth.tokens import Principal, TokenRegistry
from relayd.config.schema import Limits
from relayd.connections.budget import ConnectionBudget, ConnectionSlot
from relayd.connections.client import ClientHandler
from relayd.connections.connection import (
    Connection,
    RoleHandler,
    log_lines,
    send_error_and_close,
    send_protocol_error,
)
from relayd.connections.operator import OperatorHandler
from relayd.connections.pending import HelloMissing, PendingConnection
from relayd.connections.worker import WorkerHandler
from relayd.core.accounts import Accounts, Visit, as_role
from relayd.core.admission import Admission
from relayd.core.principals import RETRY_S, LinkMeter, full_message, is_limited
from relayd.core.relay import Relay
from relayd.net.hang_up import answer_and_hang_up
from relayd.net.http_head import split_head
from relayd.net.reactor import Reactor
from relayd.net.socket_link import INTERNAL_LOG, INTERNAL_MESSAGE, SocketLink
from relayd.net.websocket_handshake import HandshakeRejected, Head, build_response, check_upgrade, parse_head

log = structlog.get_logger("relayd.wire")

SERVER = f"relayd/{importlib.metadata.version('relayd')}"
#: Longest interval between two checks for connections without a hello: the setting may have changed.
LOGIN_CHECK_S = 1.0
#: Unfinished messages of all connections together: each of 900 may be in the middle of a piece of an upload (256 KiB).
#: Connections that have not logged in are limited in number, and each to messages of 64 KiB.
MAX_PARTIAL_BYTES = 256 * 1024 * 1024
FULL = "the relay has reached its limit of connections; try again later"
STALLED = Error(
    code=ErrorCode.SLOW_CONSUMER,
    message="this connection does not read what is sent to it; connect again, and attach to get what is missing",
)


@attrs.define(eq=False)
class Gateway:
    """Accepts connections; one for the whole daemon."""

    relay: Relay
    admission: Admission
    tokens: TokenRegistry
    accounts: Accounts
    reactor: Reactor
    #: Runs the tasks of connections that need one.
    nursery: trio.Nursery
    #: Begins the daemon's drain, with the reason; an operator may ask for it.
    drain: Callable[[str], None]
    budget: ConnectionBudget
    _partial: PartialBudget = attrs.field(factory=lambda: PartialBudget(MAX_PARTIAL_BYTES))
    _link_limits: tuple[Limits, LinkLimits] | None = None
    #: Connections without a hello, the oldest first.
    _pending: list[PendingConnection] = attrs.field(factory=list)
    _some_pending: trio.Event = attrs.field(factory=trio.Event)
    _refused_origins: RefusedOrigins = attrs.field(factory=RefusedOrigins)

    # -- handshake

    async def serve(self, stream: trio.abc.Stream, data: bytes, connection_slot: ConnectionSlot) -> bool:
        """Serve one WebSocket from its handshake on; raises no exceptions but `trio.Cancelled`.

        Args:
            stream: the stream, after the TLS handshake if there is one; the descriptor of a plain socket is taken over.
            data: the head of its request, and the bytes received behind it.
            connection_slot: the slot of the connection.

        Returns:
            Whether the connection continues without this task, and then releases its slot itself.
        """
        try:
            text, early = split_head(data)
            head = parse_head(text)
            if refusal := self.refusal(head, connection_slot):
                raise refusal
            check_upgrade(head, SUBPROTOCOL)
            if connection_slot.credentials is None:
                visit = Visit(head.get, connection_slot.source, isinstance(stream, trio.SSLStream))
                connection_slot.user = self.accounts.visitor(visit)
            answer = build_response(head, SUBPROTOCOL)
            if isinstance(stream, trio.SocketStream):
                self._take_over(stream, answer, early, connection_slot)
                return True
            await stream.send_all(answer)
            async with serve_link(stream, peer=connection_slot.peer, limits=self.link_limits, early=early) as link:
                link.set_max_message_bytes(MAX_CONTROL_BYTES)
                link.meter = self._stranger_meter(link, connection_slot)
                connection = await self._log_in(link, connection_slot)
                if connection is not None:
                    self._greet(connection)
                    await self._serve(connection)
        except HandshakeRejected as refusal:
            await answer_and_hang_up(stream, refusal.to_bytes())
        except (LinkError, trio.BrokenResourceError, trio.ClosedResourceError) as fault:
            log.debug("connection lost", peer=connection_slot.peer, why=str(fault))
        except Exception:
            log.exception(INTERNAL_LOG, peer=connection_slot.peer)
        return False

    def _take_over(
        self, stream: trio.SocketStream, answer: bytes, early: bytes, connection_slot: ConnectionSlot
    ) -> None:
        # Before its login a peer may send control messages only, so that it cannot make the relay hold a megabyte.
        link = self.reactor.register(
            stream, connection_slot.peer, self.link_limits, answer, max_message_bytes=MAX_CONTROL_BYTES
        )
        try:
            timeout_s = self.relay.config.limits.hello_timeout_s
            pending = PendingConnection(
                link, connection_slot, self._log_in_pending, self.reactor.now + timeout_s, timeout_s
            )
            self._pending.append(pending)
            self._some_pending.set()
            connection_slot.hang_up = partial(link.abort, "too many connections without a login")
            link.meter = self._stranger_meter(link, connection_slot)
            link.set_handler(pending)
            if early:
                link.feed_early(early)
        except BaseException:
            link.abort(INTERNAL_MESSAGE)
            raise

    def _stranger_meter(self, link: Link, connection_slot: ConnectionSlot) -> LinkMeter | None:
        """None for the unix socket: a flood of strangers must not keep an operator out."""
        if connection_slot.credentials is not None:
            return None
        return LinkMeter(link, self.relay.principals.strangers(), self.relay.principals)

    async def serve_login_timeouts(self) -> None:
        """Close connections that send no hello in time, until cancelled."""
        waiting = self._pending
        while True:
            if not waiting:
                self._some_pending = trio.Event()
                await self._some_pending.wait()
            now = trio.current_time()
            await trio.sleep_until(min(waiting[0].due, now + LOGIN_CHECK_S))
            self._time_out_pending(trio.current_time())

    def _time_out_pending(self, now: float) -> None:
        for pending in self._pending:
            if pending.due <= now:
                pending.time_out()
        self._pending[:] = [pending for pending in self._pending if pending.waiting]

    @property
    def link_limits(self) -> LinkLimits:
        """The limits of new links, from the current settings."""
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

    def refusal(self, head: Head, connection_slot: ConnectionSlot) -> HandshakeRejected | None:
        """Why a handshake is rejected; None if it is accepted."""
        origin = head.get("origin")
        if head.path != PATH:
            return HandshakeRejected(404, f"not found; the relay's WebSocket path is {PATH}")
        if not may_come_from(origin, head.get("host"), self.relay.config.allowed_origins):
            self._refused_origins.add(origin)
            return HandshakeRejected(403, refusal_message(origin))
        full = connection_slot.credentials is None and self.budget.is_full("worker")
        return HandshakeRejected(503, FULL) if full else None

    # -- login

    async def _log_in(self, link: Link, connection_slot: ConnectionSlot) -> Connection | None:
        """Wait for the hello; None if none was received or the login is refused: the link is then closed."""
        timeout_s = self.relay.config.limits.hello_timeout_s
        connection = None
        try:
            with trio.fail_after(timeout_s):
                data = await link.receive()
            connection = self.log_in(link, data, connection_slot)
        except trio.TooSlowError:
            send_protocol_error(link, HelloMissing(timeout_s))
        except TextReceived as fault:
            send_protocol_error(link, fault)
        if connection is None:
            await link.aclose()
        return connection

    def _log_in_pending(self, pending: PendingConnection, hello: bytes, messages: list[bytes]) -> None:
        """Log in a connection of the reactor, and start it."""
        connection = self.log_in(pending.link, hello, pending.connection_slot)
        if connection is not None:
            self.start(connection, messages)

    def log_in(self, link: Link, data: bytes, connection_slot: ConnectionSlot) -> Connection | None:
        """Log in by the first message; None if it is not a hello or the login is refused: the link then closes."""
        try:
            hello = decode(data, FROM_ANYONE)
            assert isinstance(hello, Hello)
            if hello.version != PROTOCOL_VERSION:
                raise ProtocolError(f"version {hello.version}; this relay uses version {PROTOCOL_VERSION}")
            principal = self._principal(hello, connection_slot)
        except ProtocolError as fault:
            send_protocol_error(link, fault)
        except Exception:
            log.exception(INTERNAL_LOG, peer=link.peer)
            send_error_and_close(link, ErrorCode.INTERNAL, INTERNAL_MESSAGE, INTERNAL_ERROR)
        else:
            if isinstance(principal, Principal):
                connection = Connection(
                    secrets.token_hex(8),
                    link,
                    principal,
                    self.relay,
                    connection_slot.release,
                    hello.agent,
                    knows_video=bool(hello.video),
                )
                link.meter = None
                if is_limited(principal):
                    connection.usage = self.relay.principals.usage_of(principal.name)
                    link.meter = LinkMeter(link, connection.usage, self.relay.principals)
                link.set_max_message_bytes(MAX_MESSAGE_BYTES)
                if (more := log_lines(connection.usage)) is not None:
                    role, name = principal.role, principal.name
                    log.info("connected", peer=link.peer, role=role, principal=name, agent=hello.agent, **more)
                return connection
            if principal.retry_after_s is None:  # otherwise its address is throttled, and was logged before
                log.warning("login refused", peer=link.peer, role=hello.role, code=principal.code)
            send_error_and_close(link, principal.code, principal.message, POLICY_VIOLATION)
        return None

    def _principal(self, hello: Hello, connection_slot: ConnectionSlot) -> Principal | Rejected:
        principal = self._of_page(hello, connection_slot)
        if principal is None:
            principal = self.tokens.log_in(hello, connection_slot.credentials, time.time())
        if isinstance(principal, Rejected):
            return self._throttled(principal, hello, connection_slot)
        if message := full_message(principal, self.relay.config.limits.principal, self.relay.connections.values()):
            return Rejected.because(ErrorCode.RATE_LIMITED, message, retry_after_s=RETRY_S)
        if not connection_slot.log_in(principal.role):  # others have logged in since its handshake
            return Rejected.because(ErrorCode.RATE_LIMITED, FULL, retry_after_s=RETRY_S)
        return principal

    def _of_page(self, hello: Hello, connection_slot: ConnectionSlot) -> Principal | Rejected | None:
        """The user whom the handshake has logged in, if the hello has no token."""
        user = connection_slot.user
        if hello.token or not isinstance(user, Principal):
            return None if hello.token else user
        if user.token_id is None or not self.accounts.is_live(user.token_id):
            return None  # it has ended since the handshake
        return as_role(user, hello.role, readonly=hello.readonly)

    def _throttled(self, refusal: Rejected, hello: Hello, connection_slot: ConnectionSlot) -> Rejected:
        """Return the answer to a refused login: `refusal`, or that there were too many from its address."""
        if refusal.code != ErrorCode.UNAUTHENTICATED or not hello.token or connection_slot.credentials is not None:
            return refusal
        wait_s = self.budget.failures.add(address_of(connection_slot.peer), trio.current_time())
        if wait_s is None:
            return refusal
        return Rejected.because(ErrorCode.RATE_LIMITED, TOO_MANY_LOGINS, retry_after_s=wait_s)

    # -- role

    def start(self, connection: Connection, messages: list[bytes]) -> None:
        """Start a connection of the reactor.

        Args:
            connection: a connection that has logged in.
            messages: the messages received behind its hello.
        """
        self._greet(connection)
        principal = connection.principal
        # An idle client needs no task; workers and operators have tasks anyway, and there are few of them.
        if principal.role != "client" or principal.expires_at is not None:
            connection.link.buffer_again(messages)
            self.nursery.start_soon(self._serve_in_task, connection)
            return
        connection.role_handler = self._client(connection)
        connection.begin()
        if messages:
            connection.on_messages(messages)

    def _greet(self, connection: Connection) -> None:
        try:
            connection.link.send(self._welcome(connection))
        except LinkError:
            log.debug("connection lost", peer=connection.link.peer, why=connection.link.reason)

    async def _serve_in_task(self, connection: Connection) -> None:
        """Run `_serve` as a task; raises no exceptions but `trio.Cancelled`."""
        try:
            await self._serve(connection)
        except Exception:
            log.exception(INTERNAL_LOG, peer=connection.link.peer)
            connection.send_internal_error()
            connection.release_slot()
        except BaseException:
            connection.link.abort("the relay has stopped")
            connection.release_slot()
            raise

    async def _serve(self, connection: Connection) -> None:
        """Serve a connection in its role until its link has ended or its token has expired."""
        link, principal = connection.link, connection.principal
        async with trio.open_nursery() as nursery:
            connection.role_handler = self._role_handler(connection, nursery)
            connection.begin()
            with trio.move_on_after(_left_s(principal)) as token_life:
                await link.wait_gone()
            if token_life.cancelled_caught:
                send_error_and_close(link, ErrorCode.UNAUTHENTICATED, "the token has expired", POLICY_VIOLATION)
            nursery.cancel_scope.cancel()

    def _role_handler(self, connection: Connection, nursery: trio.Nursery) -> RoleHandler:
        if connection.principal.role == "worker":
            worker = WorkerHandler(
                connection.connection_id, connection.link, connection.principal, self.relay, nursery, connection.agent
            )
            worker.usage = connection.usage
            if isinstance(connection.link, SocketLink):
                connection.link.use_bulk_mode()
                nursery.start_soon(
                    self.reactor.serve_worker_link,
                    connection.link,
                    worker.forward_audio,
                    connection.send_internal_error,
                )
            return worker
        if connection.principal.role != "operator":
            return self._client(connection)
        operator = OperatorHandler(
            connection.connection_id,
            connection.link,
            connection.principal,
            self.relay,
            self.admission,
            knows_video=connection.knows_video,
            tokens=self.tokens,
            accounts=self.accounts,
            nursery=nursery,
            drain=self.drain,
        )
        operator.begin()
        return operator

    def _client(self, connection: Connection) -> ClientHandler:
        client = ClientHandler(
            connection.connection_id,
            connection.link,
            connection.principal,
            self.relay,
            self.admission,
            connection.usage,
            connection.knows_video,
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
                "max_unacked_bytes": MAX_UNACKED_BYTES,
                "max_input_bytes": limits.max_input_bytes,
                "max_result_bytes": limits.max_result_bytes,
                "resume_window_s": limits.resume_window_s,
                "feed_idle_timeout_s": limits.feed_idle_timeout_s,
            },
            ping_interval_s=limits.ping_interval_s,
            server=SERVER,
        )


def _left_s(principal: Principal) -> float:
    return float("inf") if principal.expires_at is None else max(0.0, principal.expires_at - time.time())
