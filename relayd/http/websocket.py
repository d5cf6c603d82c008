"""One WebSocket of the HTTP application: an ASGI `websocket` scope over a `StreamLink`.

The link frames, limits, pings and closes as it does for the relay's own protocol. The application's handler runs in the
connection's task. Messages that it has not read hold the peer up, and its sends wait while the peer does not read.
"""

from urllib.parse import unquote

import attrs
import h11
import structlog
import trio
from starlette.types import ASGIApp, Message, Scope
from starlette.websockets import WebSocketDisconnect

from protocol.link.base import CLOSE_S
from protocol.link.limits import LinkLimits
from protocol.link.stream_link import StreamLink
from protocol.link.websocket_frames import ABNORMAL, GOING_AWAY, INTERNAL_ERROR, POLICY_VIOLATION
from protocol.wire.errors import LinkError
from protocol.wire.messages import MAX_CONTROL_BYTES
from relayd.core.principals import LinkMeter, PrincipalUsage, is_limited
from relayd.http.connection import ASGI
from relayd.http.context import Exchange, HttpContext
from relayd.net.hang_up import answer_and_hang_up
from relayd.net.http_head import MAX_HEAD_BYTES, bearer_token
from relayd.net.websocket_handshake import HandshakeRejected, Head, build_response, check_upgrade

log = structlog.get_logger("relayd.http")

NORMAL = 1000
#: The longest message of a peer; before its login, of `MAX_CONTROL_BYTES`.
MAX_MESSAGE_BYTES = 1024 * 1024
#: Messages that the handler has not read; with more, reading pauses.
MAX_UNREAD_BYTES = 1024 * 1024
#: A send returns when no more than this waits to be sent: what waits cannot be taken back.
MAX_UNSENT_BYTES = 64 * 1024
#: What a message, and each of its bytes, is taken to cost of the event loop's time once the handler has it.
MESSAGE_COST_S = 1e-4
BYTE_COST_S = 1e-8
#: How long a handler may go on once its WebSocket is closed.
LEAVE_S = 5.0
#: Statuses of handshakes that the handler has not answered, by the code with which it would be closed otherwise.
_STATUS = {NORMAL: 403, POLICY_VIOLATION: 401, GOING_AWAY: 503, INTERNAL_ERROR: 500}
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


@attrs.define(eq=False)
class WebSocketSession:
    """Serves one WebSocket, from its handshake to its close.

    Args:
        app: has a route for it.
        context: counts it.
        stream: TLS already spoken.
        exchange: of its handshake.
        head: of its handshake.
        data: the same, as received.
        early: what was received behind it.
    """

    app: ASGIApp
    context: HttpContext
    stream: trio.abc.Stream
    exchange: Exchange
    head: Head
    data: bytes
    early: bytes
    _http: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.SERVER, MAX_HEAD_BYTES))
    #: A denial, as far as the handler has made it.
    _denial: list[bytes] = attrs.field(factory=list)
    _connected: bool = False
    _link: StreamLink | None = None
    _nursery: trio.Nursery | None = None
    #: Code and reason of the close; None until the server itself closes.
    _close: tuple[int, str] | None = None

    async def serve(self) -> None:
        """Serve it to its end.

        Raises:
            HandshakeRejected: the handshake is not valid.
        """
        scope = self._make_scope()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._limit_login)
            try:
                await self._run_app(scope)
                self._close = self._close or (NORMAL, "")
            finally:
                if self._link is not None:
                    await self._link.aclose(*self._close or (GOING_AWAY, ""))
                    self._note_end(self._link)
            if self._link is None and not self.exchange.answered:
                await self._deny(_STATUS[self._close[0]])
            nursery.cancel_scope.cancel()

    def _make_scope(self) -> Scope:
        check_upgrade(self.head, None)
        try:
            self._http.receive_data(self.data + b"\r\n\r\n")
            request = self._http.next_event()
        except h11.RemoteProtocolError as fault:
            raise HandshakeRejected(400, "this is not HTTP") from fault
        assert isinstance(request, h11.Request)
        path, _, query = self.head.target.partition("?")
        return {
            "type": "websocket",
            "asgi": dict(ASGI),
            "http_version": "1.1",
            "scheme": "wss" if self.exchange.secure else "ws",
            "path": unquote(path),
            "raw_path": path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "root_path": "",
            "headers": [*((name, value) for name, value in request.headers if name != b"host"), self._host()],
            "client": None,
            "server": None,
            "subprotocols": self._offered(),
            "state": {"exchange": self.exchange},
            "extensions": {"websocket.http.response": {}},
        }

    def _host(self) -> tuple[bytes, bytes]:
        return b"host", self.head.get("host").encode("latin-1")

    def _offered(self) -> list[str]:
        return [name.strip() for name in self.head.get("sec-websocket-protocol").split(",") if name.strip()]

    def _note_end(self, link: StreamLink) -> None:
        self.context.relay.slow_consumers += link.stalled
        log_event = log.warning if link.stalled else log.debug
        log_event("WebSocket closed", peer=link.peer, path=self.head.path, why=link.reason)

    # -- the handler

    async def _run_app(self, scope: Scope) -> None:
        """Run the handler; a fault of it ends only its WebSocket."""
        exchange = self.exchange
        exchange.reading = exchange.scope
        self.context.exchanges.add(exchange)
        try:
            with exchange.scope:
                if not self.context.leaving:
                    await self.context.wait_turn(exchange.slot, bearer_token(self.data + b"\r\n\r\n"))
                    await self.app(scope, self.receive, self.send)
        except* WebSocketDisconnect:
            pass
        except* Exception:
            log.exception("internal error in WebSocket handler", path=self.head.path, peer=exchange.slot.peer)
            self._close = INTERNAL_ERROR, "internal error; see the relay's log"
        finally:
            self.context.exchanges.discard(exchange)
        if self.context.leaving:
            self._close = GOING_AWAY, "the relay is shutting down"
        elif exchange.scope.cancelled_caught and self._close is None:
            self._close = POLICY_VIOLATION, "the token has been revoked or has expired"

    async def _limit_login(self) -> None:
        timeout_s = self.context.relay.config.limits.hello_timeout_s
        await trio.sleep(timeout_s)
        if self.exchange.principal is None:
            self._close = POLICY_VIOLATION, f"no login within {timeout_s:g} s"
            self.exchange.abort()

    async def _limit_handler(self, link: StreamLink) -> None:
        await link.wait_gone()
        await trio.sleep(LEAVE_S)
        self.exchange.abort()

    # -- for the application

    async def receive(self) -> Message:
        """Return the next message; waits for the principal's share of the event loop's time, too.

        Cancellation: nothing is lost; the next call returns the message.
        """
        if not self._connected:
            await trio.lowlevel.checkpoint()
            self._connected = True
            return {"type": "websocket.connect"}
        if self._link is None:
            await trio.sleep_forever()  # nothing comes before the handler has accepted
        link = self._link
        usage = self._charge_to(link)
        try:
            if usage is not None:
                await self.context.relay.principals.wait_turn(usage, 0.0)
            message = await link.receive_any()
        except LinkError:
            code = link.close_code if link.close_code is not None else ABNORMAL
            return {"type": "websocket.disconnect", "code": code, "reason": link.reason}
        if usage is not None:
            usage.charge(MESSAGE_COST_S + BYTE_COST_S * len(message), trio.current_time())
        return {"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message}

    async def send(self, message: Message) -> None:
        """Send a message, or answer the handshake; waits while the peer does not read.

        Raises:
            OSError: the WebSocket is closed.
            RuntimeError: the message is not valid in ASGI at this point.
            h11.LocalProtocolError: the denial is not valid HTTP.

        Cancellation: the message is sent whole, or not at all.
        """
        kind = message["type"]
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._link is not None and kind == "websocket.send":
            await self._send(self._link, message)
        elif self._link is not None and kind == "websocket.close":
            self._link.close_soon(message.get("code", NORMAL), message.get("reason") or "")
        elif self._link is not None or self.exchange.answered:
            raise RuntimeError(f"{kind} is not valid here: the WebSocket is accepted or closed")
        elif kind == "websocket.accept":
            await self._accept(message)
        elif kind == "websocket.close":
            await self._deny(403)
        elif kind == "websocket.http.response.start":
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            self._denial.append(self._http.send(h11.Response(status_code=message["status"], headers=headers)))
        elif kind == "websocket.http.response.body":
            self._denial.append(self._http.send(h11.Data(data=message.get("body", b""))))
            if not message.get("more_body", False):
                await self._finish_denial()
        else:
            raise RuntimeError(f"{kind} is not valid here")

    async def _send(self, link: StreamLink, message: Message) -> None:
        try:
            if (text := message.get("text")) is not None:
                link.send_text(text)
            else:
                link.send_nowait(message["bytes"])
            await link.drained(MAX_UNSENT_BYTES)
        except LinkError as fault:
            raise OSError(str(fault)) from fault

    # -- the handshake

    async def _accept(self, message: Message) -> None:
        subprotocol = message.get("subprotocol")
        if subprotocol is not None and subprotocol not in self._offered():
            raise RuntimeError(f"the client has not offered the subprotocol {subprotocol!r}")
        if message.get("headers"):
            raise RuntimeError("headers of an accepted handshake are not supported")
        limits = self.context.relay.config.limits
        link_limits = LinkLimits(
            ping_interval_s=limits.ping_interval_s,
            dead_after_s=limits.dead_after_s,
            send_timeout_s=limits.stall_timeout_s,
            max_backlog_bytes=limits.max_backlog_bytes,
            max_message_bytes=limits.max_backlog_bytes,
            max_inbox_bytes=MAX_UNREAD_BYTES,
            budget=self.context.partial,
        )
        assert self._nursery is not None
        self._link = link = StreamLink(
            self.stream, self.exchange.slot.peer, link_limits, is_client=False, early=self.early
        )
        link.tolerate_stall = True
        self._charge_to(link)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S) as sending:
            try:
                await self.stream.send_all(build_response(self.head, subprotocol))
            except _GONE:
                link.lose()
        if sending.cancelled_caught:
            link.lose()
        self.context.responses[101] = self.context.responses.get(101, 0) + 1
        self._nursery.start_soon(_run_shielded, link)
        self._nursery.start_soon(self._limit_handler, link)

    def _charge_to(self, link: StreamLink) -> PrincipalUsage | None:
        """Have the link's turns charged to its principal, or to the strangers; None where there is no limit."""
        principal, principals = self.exchange.principal, self.context.relay.principals
        link.set_max_message_bytes(MAX_CONTROL_BYTES if principal is None else MAX_MESSAGE_BYTES)
        if principal is None:
            usage = principals.strangers() if self.exchange.slot.credentials is None else None
        else:
            usage = principals.usage_of(principal.name) if is_limited(principal) else None
        if usage is None:
            link.meter = None
        elif not isinstance(link.meter, LinkMeter) or link.meter.usage is not usage:
            link.meter = LinkMeter(link, usage, principals)
        return usage

    async def _deny(self, status: int) -> None:
        """Deny the handshake with an empty body, unless the handler has begun to deny it."""
        if not self._denial:
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            self._denial.append(self._http.send(h11.Response(status_code=status, headers=headers)))
            await self._finish_denial()

    async def _finish_denial(self) -> None:
        self._denial.append(self._http.send(h11.EndOfMessage()))
        self.exchange.answered = True
        await answer_and_hang_up(self.stream, b"".join(self._denial))


async def _run_shielded(link: StreamLink) -> None:
    """Run a link until `aclose` ends it, whatever is cancelled: its close frame must still go out."""
    with trio.CancelScope(shield=True):
        await link.run()
