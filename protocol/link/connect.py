"""Connects a client to a relay: the transport, with TLS if asked for, and the WebSocket handshake (`websockets`)."""

import errno
import os
import ssl
from typing import TYPE_CHECKING

import attrs
import trio

from protocol.client.address import Address
from protocol.wire.errors import ConnectError
from protocol.wire.messages import SUBPROTOCOL

if TYPE_CHECKING:
    from websockets.client import ClientProtocol

#: Limit for the answer to the handshake; bytes behind the head of a successful answer do not count.
MAX_ANSWER_BYTES = 16 * 1024
#: Limit for the text of a refusal that is shown.
MAX_REFUSAL_CHARS = 300
_RECEIVE_BYTES = 4096
_HEAD_END = b"\r\n\r\n"


async def connect(address: Address, ssl_context: ssl.SSLContext | None = None) -> trio.abc.Stream:
    """Open a transport to `address`, TLS included.

    Args:
        address: the relay's address.
        ssl_context: for `tls`; None uses the system's certificate authorities.

    Raises:
        ConnectError: the relay could not be reached, or TLS failed; the message says why.
    """
    try:
        if address.kind == "unix":
            return await trio.open_unix_socket(address.path)
        if address.kind == "tcp":
            return await trio.open_tcp_stream(address.host, address.port)
        stream = await trio.open_ssl_over_tcp_stream(
            address.host,
            address.port,
            https_compatible=True,
            ssl_context=ssl_context or ssl.create_default_context(),
        )
        try:
            await stream.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream
    except trio.BrokenResourceError as fault:
        raise ConnectError(f"{address}: TLS failed: {fault.__cause__ or fault}; {_tls_hint(address, fault)}") from fault
    except OSError as fault:
        reasons = _reasons(fault)
        if reasons <= {os.strerror(errno.ENOENT), os.strerror(errno.ECONNREFUSED)}:
            raise ConnectError(f"no relay listens at {address}") from fault
        raise ConnectError(f"cannot reach {address}: {'; '.join(sorted(reasons))}") from fault


def _tls_hint(address: Address, fault: BaseException) -> str:
    if isinstance(fault.__cause__, ssl.SSLCertVerificationError):
        return "if you trust its authority, name the file of its certificate in SSL_CERT_FILE"
    return f"if it does not speak TLS, use {attrs.evolve(address, kind='tcp')}"


def _reasons(fault: OSError) -> set[str]:
    """The reasons as text; Trio groups the failures of several addresses."""
    cause = fault.__cause__
    if isinstance(cause, BaseExceptionGroup):
        return set().union(*(_reasons(one) for one in cause.exceptions if isinstance(one, OSError)))
    if isinstance(cause, OSError):
        return _reasons(cause)
    if fault.errno is not None and fault.errno in errno.errorcode:
        return {os.strerror(fault.errno)}
    return {fault.strerror or str(fault)}


async def perform_handshake(stream: trio.abc.Stream, address: Address) -> bytes:
    """Perform the WebSocket handshake; returns the bytes received behind the answer. Does not close the stream.

    Raises:
        ConnectError: the handshake was refused or not finished.
    """
    # Imported here, because a relay and the commands that work on a store are not clients.
    from websockets.client import ClientProtocol
    from websockets.typing import Subprotocol
    from websockets.uri import WebSocketURI

    uri = WebSocketURI(address.kind == "tls", address.host or "localhost", address.port or 80, address.resource, "")
    client = ClientProtocol(uri, subprotocols=[Subprotocol(SUBPROTOCOL)])
    client.send_request(client.connect())
    cut_off = f"{address} is not a relay, or it closed the connection: the WebSocket handshake did not finish"
    if address.kind == "tcp":
        cut_off += f"; if it speaks TLS, use {attrs.evolve(address, kind='tls')}"
    try:
        await stream.send_all(b"".join(client.data_to_send()))
        answer = bytearray()
        while _HEAD_END not in answer and len(answer) < MAX_ANSWER_BYTES:
            data = await stream.receive_some(_RECEIVE_BYTES)
            if not data:
                raise ConnectError(cut_off)
            answer += data
        head, end, early = bytes(answer).partition(_HEAD_END)
        if b" 101" in head.partition(b"\r\n")[0]:
            client.receive_data(head + end)
        else:  # the body gives the reason
            client.receive_data(bytes(answer))
            await _read_refusal(stream, client, len(answer))
            early = b""
    except (trio.BrokenResourceError, trio.ClosedResourceError) as fault:
        raise ConnectError(cut_off) from fault
    _check_answer(client, address, cut_off)
    return early


async def _read_refusal(stream: trio.abc.Stream, client: "ClientProtocol", size: int) -> None:
    """Read the rest of an answer that refuses the upgrade."""
    while client.handshake_exc is None and size < MAX_ANSWER_BYTES:
        data = await stream.receive_some(_RECEIVE_BYTES)
        size += len(data)
        if data:
            client.receive_data(bytes(data))
        else:
            client.receive_eof()
            return


def _check_answer(client: "ClientProtocol", address: Address, cut_off: str) -> None:
    from websockets.exceptions import InvalidHandshake
    from websockets.http11 import Response

    answer = next((event for event in client.events_received() if isinstance(event, Response)), None)
    fault = client.handshake_exc
    if answer is not None and answer.status_code != 101:
        body = (answer.body or b"").decode("utf-8", "replace").strip()[:MAX_REFUSAL_CHARS]
        moved = answer.headers.get("Location", "")[:MAX_REFUSAL_CHARS] if 300 <= answer.status_code < 400 else ""
        why = f"; use {moved}" if moved else f": {body}" if body else ""
        raise ConnectError(f"{address} answered HTTP {answer.status_code}{why}")
    if fault is not None or answer is None:
        because = f" ({fault})" if isinstance(fault, InvalidHandshake) else ""
        raise ConnectError(cut_off + because) from fault
    if client.subprotocol != SUBPROTOCOL:
        if client.subprotocol is None:
            raise ConnectError(cut_off)
        raise ConnectError(f"{address} speaks {client.subprotocol!r}, not {SUBPROTOCOL}")
