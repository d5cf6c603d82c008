"""The daemon's listeners: TCP, with TLS if it is configured, and the unix socket.

One port serves both protocols (docs/design.md §10): the head of each connection is read; a request for a WebSocket goes
to the `Gateway`, any other request to the `HttpServer`.
"""

import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import structlog
import trio

from relayd.auth.tokens import PeerCredentials, peer_credentials
from relayd.config.schema import Config
from relayd.connections.budget import ConnectionSlot
from relayd.connections.gateway import Gateway
from relayd.http.server import HttpServer
from relayd.net.http_head import PrefixedStream, bearer_token, forwarded_for, needs_answer, read_head, wants_websocket
from relayd.net.proxies import client_of
from relayd.net.tls import ListenError

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


@asynccontextmanager
async def open_listeners(config: Config) -> AsyncIterator[list[trio.SocketListener]]:
    """Open the listening sockets of `config`, without TLS; the unix socket's file is deleted at the end.

    Raises:
        ListenError: an address is in use or not local, or the unix socket cannot be created.
    """
    listeners: list[trio.SocketListener] = []
    path, created = config.socket_path, None
    try:
        if config.listen_address is not None:
            host, port = config.listen_address
            try:
                listeners += await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
            except OSError as fault:
                raise ListenError(
                    f"cannot listen on {config.listen}: {fault.strerror or fault}; "
                    "choose another address with --listen, or stop the program that listens there"
                ) from fault
        if path is not None:
            listeners.append(await _unix_listener(path, config.unix_socket_mode))
            created = path
        yield listeners
    finally:
        for listener in listeners:
            listener.socket.close()
        if created is not None:
            created.unlink(missing_ok=True)


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


def describe(listeners: list[trio.SocketListener], tls: bool) -> list[str]:
    """Return the URLs of the listeners."""
    urls = []
    for listener in listeners:
        name = listener.socket.getsockname()
        if isinstance(name, str):
            urls.append(f"unix:{name}")
        else:
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            urls.append(f"{'wss' if tls else 'ws'}://{host}:{name[1]}")
    return urls


async def serve_listeners(
    listeners: list[trio.SocketListener],
    gateway: Gateway,
    http: HttpServer,
    tls_context: ssl.SSLContext | None,
    handlers: trio.Nursery,
) -> None:
    """Accept connections until cancelled; they continue in `handlers`, or in the gateway's reactor."""
    handler = partial(_serve_connection, gateway=gateway, http=http, tls_context=tls_context)
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, handler, handlers)


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


async def _serve_connection(
    stream: trio.SocketStream, gateway: Gateway, http: HttpServer, tls_context: ssl.SSLContext | None
) -> None:
    try:
        credentials = peer_credentials(stream.socket)
        peer = _peer(stream, credentials)
    except OSError:
        stream.socket.close()
        return  # it hung up before we looked
    connection_slot = gateway.budget.admit(peer, credentials)
    with trio.CancelScope() as scope:
        connection_slot.hang_up = scope.cancel
        await _serve_stranger(stream, connection_slot, gateway, http, tls_context)


async def _serve_stranger(
    stream: trio.SocketStream,
    connection_slot: ConnectionSlot,
    gateway: Gateway,
    http: HttpServer,
    tls_context: ssl.SSLContext | None,
) -> None:
    continues = False
    try:
        if penalty_s := gateway.budget.penalty_s(connection_slot):
            await trio.sleep(penalty_s)
        if tls_context is None or connection_slot.credentials is not None:
            continues = await _pass_on(stream, gateway, http, connection_slot, secure=False)
        else:
            tls = trio.SSLStream(stream, tls_context, server_side=True, https_compatible=True)
            with trio.fail_after(TLS_HANDSHAKE_S):
                await gateway.relay.principals.wait_stranger_turn(TLS_COST_S)
                await tls.do_handshake()
            await _pass_on(tls, gateway, http, connection_slot, secure=True)
    except (trio.BrokenResourceError, trio.TooSlowError, ssl.SSLError) as fault:
        log.debug("TLS handshake failed", peer=connection_slot.peer, why=str(fault.__cause__ or fault))
    finally:
        stream.socket.close()  # where the connection lives on, its socket is elsewhere by now
        if not continues:
            connection_slot.release()


async def _pass_on(
    stream: trio.abc.Stream, gateway: Gateway, http: HttpServer, connection_slot: ConnectionSlot, *, secure: bool
) -> bool:
    """Read the first head, and serve the connection as HTTP or as a WebSocket.

    Returns:
        Whether the connection continues without this task, and then releases its slot itself.
    """
    head = await read_head(stream)
    if needs_answer(head) and not wants_websocket(head):
        await http.context.wait_turn(connection_slot, bearer_token(head))
        head = await http.serve(PrefixedStream(stream, head), connection_slot, secure)
    if not wants_websocket(head):
        return False
    if connection_slot.credentials is None:
        client = client_of(connection_slot.peer, forwarded_for(head), http.context.relay.config)
        connection_slot.peer = client or connection_slot.peer
    return await gateway.serve(stream, head, connection_slot)


def _peer(stream: trio.SocketStream, credentials: PeerCredentials | None) -> str:
    if credentials is not None:
        return f"unix (pid {credentials.pid})"
    name = stream.socket.getpeername()
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
