"""The daemon's listeners: TCP, with TLS if it is configured, and the unix socket.

One port serves both protocols (docs/design.md §10): the head of each connection is read; a request for a WebSocket goes
to the `Gateway` unless the HTTP application has its path, any other request to the `HttpServer`. A door is a further
port, with an application of its own and without the relay's own protocol.
"""

import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol

import attrs
import structlog
import trio

from relayd.auth.tokens import PeerCredentials, peer_credentials
from relayd.config.rules import split_listen
from relayd.config.schema import Config
from relayd.connections.budget import ConnectionBudget, ConnectionSlot
from relayd.connections.gateway import Gateway
from relayd.http.server import HttpServer
from relayd.net.hang_up import answer_and_hang_up
from relayd.net.http_head import PrefixedStream, bearer_token, forwarded_for, needs_answer, read_head, wants_websocket
from relayd.net.proxies import client_of
from relayd.net.tls import ListenError
from relayd.net.websocket_handshake import HandshakeRejected

log = structlog.get_logger("relayd.listener")

#: Connections that wait to be accepted: a relay that restarts is met by all its peers within seconds.
BACKLOG = 4096
#: Connections accepted before other tasks have their turn.
MAX_ACCEPTED = 64
TLS_HANDSHAKE_S = 5.0
#: What a handshake takes of the event loop's time with an RSA key of 2,048 bits.
TLS_COST_S = 0.002
#: What the system is out of when a connection cannot be accepted: it may find some again.
_OUT_OF_ROOM = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
OUT_OF_ROOM_S = 0.1
#: What befell the connection and not the listener, and that there is none (accept(2)).
_PASSING = frozenset(
    (
        *(errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT),
        *(errno.ENETDOWN, errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH),
    )
)


class Port(Protocol):
    """A further port: where it listens, and which setting says so."""

    @property
    def listen(self) -> str:
        """`HOST:PORT`."""

    @property
    def setting(self) -> str:
        """Where that can be changed, for errors."""


@asynccontextmanager
async def open_listeners(config: Config) -> AsyncIterator[list[trio.SocketListener]]:
    """Open the listening sockets of `config`, without TLS; the unix socket's file is deleted at the end.

    Raises:
        ListenError: an address is in use or not local, or the unix socket cannot be created.
    """
    listeners: list[trio.SocketListener] = []
    path, created = config.socket_path, None
    try:
        if config.listen:
            listeners += await _tcp_listeners(config.listen, "--listen")
        if path is not None:
            listeners.append(await _unix_listener(path, config.unix_socket_mode))
            created = path
        yield listeners
    finally:
        for listener in listeners:
            listener.socket.close()
        if created is not None:
            created.unlink(missing_ok=True)


@asynccontextmanager
async def open_doors(doors: Sequence[Port]) -> AsyncIterator[list[list[trio.SocketListener]]]:
    """Open the listening sockets of doors, in their order.

    Raises:
        ListenError: as for `open_listeners`.
    """
    opened: list[list[trio.SocketListener]] = []
    try:
        for door in doors:
            opened.append(await _tcp_listeners(door.listen, door.setting))  # noqa: PERF401  closed below
        yield opened
    finally:
        for listener in chain.from_iterable(opened):
            listener.socket.close()


async def _tcp_listeners(listen: str, setting: str) -> list[trio.SocketListener]:
    host, port = split_listen(listen)
    try:
        return await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    except OSError as fault:
        raise ListenError(
            f"cannot listen on {listen}: {fault.strerror or fault}; "
            f"choose another address with {setting}, or stop the program that listens there"
        ) from fault


async def _unix_listener(path: Path, mode: int) -> trio.SocketListener:
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        # This process has the lock of the state folder, so an existing file was left by a relay that was killed.
        await trio.Path(path).unlink(missing_ok=True)
        before = os.umask(0o777 & ~mode)
        try:
            await sock.bind(str(path))
        finally:
            os.umask(before)
    except OSError as fault:
        sock.close()
        raise ListenError(f"cannot create the socket {path}: {fault.strerror}") from fault
    sock.listen(BACKLOG)
    return trio.SocketListener(sock)


def describe(listeners: list[trio.SocketListener], tls: bool, scheme: str = "") -> list[str]:
    """Return the URLs of the listeners; with a scheme of their own, if they have one."""
    urls = []
    for listener in listeners:
        name = listener.socket.getsockname()
        if isinstance(name, str):
            urls.append(f"unix:{name}")
        else:
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            urls.append(f"{scheme or ('wss' if tls else 'ws')}://{host}:{name[1]}")
    return urls


@attrs.frozen
class Entrance:
    """What is behind the listeners of a port.

    Args:
        gateway: serves the relay's own protocol, and counts all connections.
        http: serves HTTP, and the WebSockets of its application.
        tls_context: of TCP connections; None without TLS.
        is_door: whether the relay's own protocol is not spoken here.
    """

    gateway: Gateway
    http: HttpServer
    tls_context: ssl.SSLContext | None
    is_door: bool = False


#: Serves a connection to its end.
Serve = Callable[[trio.SocketStream, ConnectionSlot], Awaitable[None]]


async def serve_foreign(
    listeners: list[trio.SocketListener], budget: ConnectionBudget, serve: Serve, handlers: trio.Nursery
) -> None:
    """Accept connections of another protocol than HTTP and the relay's own until cancelled; they live in `handlers`."""

    async def serve_one(stream: trio.SocketStream) -> None:
        try:
            slot = budget.admit(_peer(stream, None), None)
        except OSError:
            stream.socket.close()
            return  # it hung up before we looked
        try:
            with trio.CancelScope() as scope:
                slot.hang_up = scope.cancel
                await serve(stream, slot)
        finally:
            stream.socket.close()
            slot.release()

    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, serve_one, handlers)


async def serve_listeners(listeners: list[trio.SocketListener], entrance: Entrance, handlers: trio.Nursery) -> None:
    """Accept connections until cancelled; they continue in `handlers`, or in the gateway's reactor."""
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, partial(_serve_connection, entrance=entrance), handlers)


async def _accept(
    listener: trio.SocketListener, handler: Callable[[trio.SocketStream], Awaitable[None]], handlers: trio.Nursery
) -> None:
    """As `trio.serve_listeners`; but `welcome` closes its stream, or keeps its socket.

    Connections are accepted many at a time: in a flood the kernel's queue would overflow while the tasks of those
    before have their turn, and whoever is dropped from it tries again only a second later.
    """
    sock = socket.socket(fileno=os.dup(listener.socket.fileno()))
    sock.setblocking(False)
    with sock:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                for _ in range(MAX_ACCEPTED):
                    accepted, _address = sock.accept()
                    stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
                    handlers.start_soon(handler, stream)
            except OSError as fault:
                if fault.errno in _PASSING:
                    continue
                if fault.errno not in _OUT_OF_ROOM:
                    raise
                log.error("no connection can be accepted; trying again", why=fault.strerror, every_s=OUT_OF_ROOM_S)
                await trio.sleep(OUT_OF_ROOM_S)


async def _serve_connection(stream: trio.SocketStream, entrance: Entrance) -> None:
    try:
        credentials = peer_credentials(stream.socket)
        peer = _peer(stream, credentials)
    except OSError:
        stream.socket.close()
        return  # it hung up before we looked
    connection_slot = entrance.gateway.budget.admit(peer, credentials)
    with trio.CancelScope() as scope:
        connection_slot.hang_up = scope.cancel
        await _serve_stranger(stream, connection_slot, entrance)


async def _serve_stranger(stream: trio.SocketStream, connection_slot: ConnectionSlot, entrance: Entrance) -> None:
    continues, gateway, tls_context = False, entrance.gateway, entrance.tls_context
    try:
        if penalty_s := gateway.budget.penalty_s(connection_slot):
            await trio.sleep(penalty_s)
        if tls_context is None or connection_slot.credentials is not None:
            continues = await _pass_on(stream, connection_slot, entrance, secure=False)
        else:
            tls = trio.SSLStream(stream, tls_context, server_side=True, https_compatible=True)
            with trio.fail_after(TLS_HANDSHAKE_S):
                await gateway.relay.principals.wait_stranger_turn(TLS_COST_S)
                await tls.do_handshake()
            await _pass_on(tls, connection_slot, entrance, secure=True)
    except (trio.BrokenResourceError, trio.TooSlowError, ssl.SSLError) as fault:
        log.debug("TLS handshake failed", peer=connection_slot.peer, why=str(fault.__cause__ or fault))
    finally:
        stream.socket.close()  # where the connection lives on, its socket is elsewhere by now
        if not continues:
            connection_slot.release()


async def _pass_on(
    stream: trio.abc.Stream, connection_slot: ConnectionSlot, entrance: Entrance, *, secure: bool
) -> bool:
    """Read the first head, and serve the connection as HTTP or as a WebSocket.

    Returns:
        Whether the connection continues without this task, and then releases its slot itself.
    """
    http = entrance.http
    head = await read_head(stream)
    if needs_answer(head) and not wants_websocket(head):
        await http.context.wait_turn(connection_slot, bearer_token(head))
        head = await http.serve(PrefixedStream(stream, head), connection_slot, secure)
    if not wants_websocket(head):
        return False
    if connection_slot.credentials is None:
        client = client_of(connection_slot.peer, forwarded_for(head), http.context.relay.config)
        connection_slot.peer = client or connection_slot.peer
    if http.has_websocket(head):
        await http.serve_websocket(stream, head, connection_slot, secure)
    elif entrance.is_door:
        await answer_and_hang_up(stream, HandshakeRejected(404, "there is no WebSocket at this path").to_bytes())
    else:
        return await entrance.gateway.serve(stream, head, connection_slot)
    return False


def _peer(stream: trio.SocketStream, credentials: PeerCredentials | None) -> str:
    if credentials is not None:
        return f"unix (pid {credentials.pid})"
    name = stream.socket.getpeername()
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
