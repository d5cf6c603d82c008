"""A connection's way in: WebSocket handshake, `hello`, and then the part it plays.

The only place in the daemon that knows how a link comes about; what it carries is `client_link`'s, `worker_link`'s
and `operator`'s business.
"""

import importlib.metadata
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import structlog
import trio
from trio_websocket import WebSocketRequest

from protocol.codec import decode
from protocol.errors import ErrorCode, LinkError, ProtocolError
from protocol.link import Link, serve_link
from protocol.messages import (
    FROM_ANYONE,
    FROM_CLIENT,
    FROM_OPERATOR,
    MAX_CONTROL_BYTES,
    MAX_INPUT_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    PATH,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    Error,
    Hello,
    Rejected,
    Table,
    Welcome,
)
from protocol.websocket import open_upgrade
from relayd.auth import PeerCredentials, Principal, Tokens
from relayd.client_link import ClientLink
from relayd.http.login import may_come_from
from relayd.intake import Intake
from relayd.operator import Operator
from relayd.relay import Relay
from relayd.worker_link import WorkerLink

log = structlog.get_logger("relayd.wire")

#: For the request's head; a slow one is cut off (DESIGN §10).
HANDSHAKE_S = 5.0
SERVER = f"relayd/{importlib.metadata.version('relayd')}"
#: Connections that have not logged in, beyond `max_connections`: with 900 of those, a limit of 1,024 files holds.
MAX_STRANGERS = 64
POLICY_VIOLATION = 1008
INTERNAL_ERROR = 1011
FULL = "the relay has all the connections it takes; try again later"
STALLED = Error(
    code=ErrorCode.SLOW_CONSUMER,
    message="this connection does not take what is sent to it; connect again, and attach for what is missing",
)


@attrs.define(eq=False)
class Connection:
    """A connection that has logged in."""

    connection_id: str
    link: Link
    principal: Principal
    #: What its program calls itself.
    agent: str = ""
    connected_at: float = attrs.field(factory=trio.current_time)

    def disconnect(self, reason: str) -> None:
        """End it now."""
        self.link.abort(reason)


@attrs.define(eq=False)
class Gate:
    """Where connections come in."""

    relay: Relay
    intake: Intake
    tokens: Tokens
    #: Begins the daemon's drain; an operator may ask for it.
    drain: Callable[[str], None]
    #: Connections from their first byte on, logged in or not.
    _open: int = 0

    async def serve(self, stream: trio.abc.Stream, peer: str, credentials: PeerCredentials | None) -> None:
        """One connection, from its first byte to its last; no fault of it gets out.

        Args:
            stream: TLS already spoken.
            peer: where it comes from, for logs.
            credentials: of a unix socket's peer.
        """
        if self._open >= self.relay.config.limits.max_connections + MAX_STRANGERS:
            log.warning("too many connections; hung up on one", peer=peer, open=self._open)
            return
        self._open += 1
        try:
            with trio.CancelScope(deadline=trio.current_time() + HANDSHAKE_S) as handshake:
                async with open_upgrade(stream) as request:
                    if refusal := self._refusal(request):
                        status, words = refusal
                        await request.reject(status, body=f"{words}\n".encode())
                        return
                    ws = await request.accept(subprotocol=SUBPROTOCOL)
                    handshake.deadline = float("inf")
                    limits = self.relay.config.limits
                    async with serve_link(
                        ws,
                        peer=peer,
                        ping_interval_s=limits.ping_interval_s,
                        dead_after_s=limits.dead_after_s,
                        send_timeout_s=limits.stall_timeout_s,
                        max_backlog_bytes=limits.max_backlog_bytes,
                        farewell=STALLED,
                    ) as link:
                        await self._serve_link(link, credentials)
        except LinkError as fault:
            log.debug("connection lost", peer=peer, why=str(fault))
        except Exception:
            log.exception("connection broke the relay's own rules", peer=peer)
        finally:
            self._open -= 1

    def _refusal(self, request: WebSocketRequest) -> tuple[int, str] | None:
        """HTTP status and words for a handshake that is not for us."""
        relay = self.relay
        headers = {name.lower(): value for name, value in request.headers}
        origin = headers.get(b"origin", b"").decode("ascii", "replace")
        allowed = relay.config.allowed_origins
        if request.path.partition("?")[0] != PATH:
            return 404, f"nothing here; the relay speaks at {PATH}"
        if SUBPROTOCOL not in request.proposed_subprotocols:
            return 400, f"ask for the WebSocket subprotocol {SUBPROTOCOL}"
        host: str = request._event.host  # trio_websocket leaves it out of the headers
        if not may_come_from(origin, host, allowed):
            return 403, f"origin {origin} is not in allowed_origins of relayd.toml"
        return (503, FULL) if self._full() else None

    def _full(self) -> bool:
        return len(self.relay.connections) >= self.relay.config.limits.max_connections

    async def _serve_link(self, link: Link, credentials: PeerCredentials | None) -> None:
        try:
            hello = await self._hello(link)
            principal = self._log_in(hello, credentials)
            if isinstance(principal, Rejected):
                log.warning("login refused", peer=link.peer, role=hello.role, code=principal.code)
                await _close(link, principal.code, principal.message, POLICY_VIOLATION)
                return
            await self._play(link, hello, principal)
        except ProtocolError as fault:
            log.warning("peer broke the protocol", peer=link.peer, why=str(fault))
            await _close(link, fault.code, str(fault), fault.close_code)
        except LinkError:
            raise
        except Exception:
            log.exception("connection broke the relay's own rules", peer=link.peer)
            await _close(link, ErrorCode.INTERNAL, "the relay made a mistake; see its log", INTERNAL_ERROR)

    async def _hello(self, link: Link) -> Hello:
        hello_timeout_s = self.relay.config.limits.hello_timeout_s
        with trio.move_on_after(hello_timeout_s):
            message = decode(await link.receive(), FROM_ANYONE)
            assert isinstance(message, Hello)
            if message.version != PROTOCOL_VERSION:
                raise ProtocolError(f"version {message.version}; this relay speaks version {PROTOCOL_VERSION}")
            return message
        raise _Silent(f"no hello within {hello_timeout_s:g} s; connect again")

    def _log_in(self, hello: Hello, credentials: PeerCredentials | None) -> Principal | Rejected:
        principal = self.tokens.log_in(hello, credentials, time.time())
        if isinstance(principal, Rejected):
            return principal
        if self._full():  # others have logged in since its handshake
            return Rejected.because(ErrorCode.RATE_LIMITED, FULL)
        most = principal.limits.max_connections
        mine = sum(other.principal.token_id == principal.token_id for other in self.relay.connections.values())
        if most is not None and mine >= most:
            message = f"the token of {principal.name!r} allows {most} connections at once; close one first"
            return Rejected.because(ErrorCode.RATE_LIMITED, message)
        return principal

    async def _play(self, link: Link, hello: Hello, principal: Principal) -> None:
        """The connection's part, until its link is gone, its token ends or is revoked."""
        relay = self.relay
        connection = Connection(secrets.token_hex(8), link, principal, hello.agent)
        relay.connections[connection.connection_id] = connection
        log.info("connected", peer=link.peer, role=principal.role, principal=principal.name, agent=hello.agent)
        play = {"worker": self._play_worker, "operator": self._play_operator}.get(principal.role, self._play_client)
        try:
            link.send(self._welcome(connection))
            with trio.move_on_after(_left_s(principal)) as token_life:
                await play(connection, hello)
            if token_life.cancelled_caught:
                await _close(link, ErrorCode.UNAUTHENTICATED, "the token has expired", POLICY_VIOLATION)
        finally:
            del relay.connections[connection.connection_id]
            relay.slow_consumers += link.stalled
            tell = log.warning if link.stalled else log.info
            tell("disconnected", peer=link.peer, principal=principal.name, why=link.reason or "closed")

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

    async def _play_client(self, connection: Connection, hello: Hello) -> None:
        await self._with_client(self._client(connection), None)

    async def _play_operator(self, connection: Connection, hello: Hello) -> None:
        client = self._client(connection, FROM_OPERATOR)
        async with _open_nursery() as nursery:
            operator = Operator(client, self.relay, self.tokens, nursery, self.drain)
            client.handlers |= operator.handlers
            await self._with_client(client, operator)

    def _client(self, connection: Connection, takes: Table = FROM_CLIENT) -> ClientLink:
        return ClientLink(
            connection.connection_id, connection.link, connection.principal, self.relay, self.intake, takes
        )

    async def _with_client(self, client: ClientLink, operator: Operator | None) -> None:
        relay = self.relay
        relay.clients[client.connection_id] = client
        relay.touch("clients", client.connection_id)
        try:
            await client.serve()
        finally:
            if operator is not None:
                operator.close()
            del relay.clients[client.connection_id]
            relay.touch("clients", client.connection_id)

    async def _play_worker(self, connection: Connection, hello: Hello) -> None:
        async with _open_nursery() as nursery:
            worker = WorkerLink(
                connection.connection_id, connection.link, connection.principal, self.relay, nursery, hello.agent
            )
            await worker.serve()


@asynccontextmanager
async def _open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that ends with its block; the block's own exception comes out bare, so that its kind still counts."""
    fault: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as raised:  # noqa: BLE001  raised again below, outside the nursery
            fault = raised
        nursery.cancel_scope.cancel()
    if fault is not None:
        raise fault


class _Silent(ProtocolError):
    """No `hello` came in time. A network that stood still does that too, so whoever it was may try again."""

    code = ErrorCode.IDLE_TIMEOUT
    close_code = POLICY_VIOLATION


def _left_s(principal: Principal) -> float:
    return float("inf") if principal.expires_at is None else max(0.0, principal.expires_at - time.time())


async def _close(link: Link, code: str, message: str, close_code: int) -> None:
    """Say why, and close."""
    try:
        link.send(Error(code=code, message=message))
    except LinkError:
        return
    await link.aclose(close_code, message)
