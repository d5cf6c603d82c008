"""The daemon's listeners: TCP, with TLS if it is configured, and the unix socket.

One port serves both protocols (docs/design.md §10): the head of each connection is read; a request for a WebSocket goes
to the `Gateway`, any other request to the `HttpServer`.
"""

import errno
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import structlog
import trio

from relayd.auth.tokens import PeerCredentials, peer_credentials
from relayd.config.schema import Config
from relayd.connections.gateway import Gateway
from relayd.connections.pending import ConnectionSlot
from relayd.http.server import HttpServer
from relayd.net.http_head import PrefixedStream, forwarded_for, needs_answer, read_head, wants_websocket
from relayd.net.tls import ListenError

log = structlog.get_logger("relayd.listener")

#: Connections that may wait to be accepted: all peers of a relay reconnect within seconds of its restart.
BACKLOG = 512
TLS_HANDSHAKE_S = 5.0
#: Errors of `accept` that say that a system resource is used up for now; it is tried again after an interval.
_OUT_OF_RESOURCES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
OUT_OF_RESOURCES_S = 0.1


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
    """Accept connections like `trio.serve_listeners`, but `handler` must close the stream or take over its socket."""
    while True:
        try:
            stream = await listener.accept()
        except OSError as fault:
            if fault.errno not in _OUT_OF_RESOURCES:
                raise
            log.error("connections cannot be accepted; trying again", why=fault.strerror, every_s=OUT_OF_RESOURCES_S)
            await trio.sleep(OUT_OF_RESOURCES_S)
        else:
            handlers.start_soon(handler, stream)


async def _serve_connection(
    stream: trio.SocketStream, gateway: Gateway, http: HttpServer, tls_context: ssl.SSLContext | None
) -> None:
    continues, connection_slot = False, None
    try:
        credentials = peer_credentials(stream.socket)
        connection_slot = gateway.count_in(_peer(stream, credentials), credentials)
    except OSError:
        pass  # the peer has disconnected already
    try:
        if connection_slot is None:
            return
        if tls_context is None or connection_slot.credentials is not None:
            continues = await _pass_on(stream, gateway, http, connection_slot, secure=False)
        else:
            tls = trio.SSLStream(stream, tls_context, server_side=True, https_compatible=True)
            with trio.fail_after(TLS_HANDSHAKE_S):
                await tls.do_handshake()
            await _pass_on(tls, gateway, http, connection_slot, secure=True)
    except (trio.BrokenResourceError, trio.TooSlowError, ssl.SSLError) as fault:
        assert connection_slot is not None
        log.debug("TLS handshake failed", peer=connection_slot.peer, why=str(fault.__cause__ or fault))
    finally:
        stream.socket.close()  # if the connection continues, its descriptor was detached from this socket
        if connection_slot is not None and not continues:
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
        head = await http.serve(PrefixedStream(stream, head), connection_slot.peer, connection_slot.credentials, secure)
    if not wants_websocket(head):
        return False
    if connection_slot.credentials is None and http.context.relay.config.behind_proxy:
        connection_slot.peer = forwarded_for(head) or connection_slot.peer
    return await gateway.serve(stream, head, connection_slot)


def _peer(stream: trio.SocketStream, credentials: PeerCredentials | None) -> str:
    if credentials is not None:
        return f"unix (pid {credentials.pid})"
    name = stream.socket.getpeername()
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
