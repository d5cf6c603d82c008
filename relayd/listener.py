"""The daemon's doors: TCP (TLS where set) and the unix socket, each leading to the same `Gate`.

One port will serve HTTP as well (DESIGN §10): the head of a connection is to be read in `_welcome`, and what is no
upgrade to the relay's path handed to the HTTP application from there.
"""

import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import structlog
import trio

from relayd.auth import PeerCredentials, peer_credentials
from relayd.config import Config, Tls
from relayd.handshake import HEAD_END, NoHead, Refusal, parse_head, read_head
from relayd.wire import Gate, Visit, hang_up

log = structlog.get_logger("relayd.listener")

#: Connections that wait to be accepted: a relay that restarts is met by all its peers within seconds.
BACKLOG = 512
TLS_HANDSHAKE_S = 5.0
#: For the head of a connection's first request; a slow one is cut off (DESIGN §10).
HEAD_S = 5.0


class ListenError(Exception):
    """A door cannot be opened; the text says which and what to do."""


@asynccontextmanager
async def open_listeners(config: Config) -> AsyncIterator[list[trio.SocketListener]]:
    """Listening sockets for all that `config` names, TLS not included; the unix socket's file goes at the end.

    Raises:
        ListenError: an address is taken, or not this machine's.
    """
    listeners: list[trio.SocketListener] = []
    path, ours = config.socket_path, None
    try:
        if config.listen_address is not None:
            host, port = config.listen_address
            try:
                listeners += await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
            except OSError as fault:
                raise ListenError(
                    f"cannot listen on {config.listen}: {fault.strerror or fault}; "
                    "choose another address with --listen, or stop what listens there"
                ) from fault
        if path is not None:
            listeners.append(await _unix_listener(path, config.unix_socket_mode))
            ours = path
        yield listeners
    finally:
        for listener in listeners:
            listener.socket.close()
        if ours is not None:
            ours.unlink(missing_ok=True)


async def _unix_listener(path: Path, mode: int) -> trio.SocketListener:
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        # The state folder's lock is ours, so a file that is there was left by a relay that was killed.
        await trio.Path(path).unlink(missing_ok=True)
        before = os.umask(0o777 & ~mode)
        try:
            await sock.bind(str(path))
        finally:
            os.umask(before)
    except OSError as fault:
        sock.close()
        raise ListenError(f"cannot make the socket {path}: {fault.strerror}") from fault
    sock.listen(BACKLOG)
    return trio.SocketListener(sock)


def describe(listeners: list[trio.SocketListener], tls: bool) -> list[str]:
    """The URLs at which the listeners are reached."""
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
    listeners: list[trio.SocketListener], gate: Gate, context: ssl.SSLContext | None, handlers: trio.Nursery
) -> None:
    """Accept until cancelled; the connections live on in `handlers`, or in the gate's plane."""
    await trio.serve_listeners(partial(_welcome, gate=gate, context=context), listeners, handler_nursery=handlers)


async def _welcome(stream: trio.SocketStream, gate: Gate, context: ssl.SSLContext | None) -> None:
    async with stream:
        try:
            credentials = peer_credentials(stream.socket)
            peer = _peer(stream, credentials)
        except OSError:
            return  # it hung up before we looked
        visit = gate.enter(peer, credentials)
        if visit is None:
            return
        lives_on = False
        try:
            if context is None or credentials is not None:
                lives_on = await _lead(stream, gate, visit)
            else:
                lives_on = await _lead_over_tls(stream, gate, visit, context)
        finally:
            if not lives_on:
                visit.leave()


async def _lead_over_tls(stream: trio.SocketStream, gate: Gate, visit: Visit, context: ssl.SSLContext) -> bool:
    tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
    try:
        with trio.fail_after(TLS_HANDSHAKE_S):
            await tls.do_handshake()
    except (trio.BrokenResourceError, trio.TooSlowError, ssl.SSLError) as fault:
        log.debug("TLS handshake failed", peer=visit.peer, why=str(fault.__cause__ or fault))
        return False
    return await _lead(tls, gate, visit)


async def _lead(stream: trio.SocketStream | trio.SSLStream[trio.SocketStream], gate: Gate, visit: Visit) -> bool:
    """Read the head of a connection's first request and lead it where it wants to.

    Returns:
        whether it lives on without this task, and counts itself out.
    """
    try:
        with trio.fail_after(HEAD_S):
            data = await read_head(stream)
        head_bytes, _, early = data.partition(HEAD_END)
        head = parse_head(head_bytes)
    except (NoHead, trio.TooSlowError) as fault:
        log.debug("no request came", peer=visit.peer, why=str(fault))
        return False
    except Refusal as refusal:
        await hang_up(stream, refusal)
        return False
    return await gate.serve(stream, head, early, visit)


def _peer(stream: trio.SocketStream, credentials: PeerCredentials | None) -> str:
    if credentials is not None:
        return f"unix (pid {credentials.pid})"
    name = stream.socket.getpeername()
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def tls_context(config: Config) -> ssl.SSLContext | None:
    """The certificate to show, or None for plain TCP.

    Raises:
        ListenError: it cannot be used.
    """
    if config.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load_certificate(context, config.tls)
    return context


def load_certificate(context: ssl.SSLContext, tls: Tls) -> None:
    """Have `context` show what `tls` names, in all handshakes from now on.

    Raises:
        ListenError: it cannot be used; the context is then good for nothing.
    """
    try:
        context.load_cert_chain(tls.cert, tls.key, password=_no_password)
    except (OSError, ssl.SSLError) as fault:
        raise ListenError(f"cannot use the certificate {tls.cert} with the key {tls.key}: {fault}") from fault


def _no_password() -> str:
    """Without this OpenSSL would ask at the terminal for the password of a locked key, and a daemon would hang."""
    raise OSError("the key is locked with a password, which relayd cannot ask for; give it without one")
