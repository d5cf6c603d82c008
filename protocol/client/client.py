"""The client: `open_relay` connects, and returns a `RelayClient` that stays connected.

One task reads the link and passes each message, without waiting, to the stream or call it belongs to. When the link is
lost, a new one is made, and every stream asks for what it is missing.
"""

import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import trio

from protocol.client.address import from_environment, token_from_environment
from protocol.client.feeders import open_feeders
from protocol.client.inputs import InputSource, read_inputs
from protocol.client.pending_calls import PendingCall, PendingCalls
from protocol.client.stream import Stream, fresh_error
from protocol.client.watch import Watch
from protocol.link.background import open_background
from protocol.link.backoff import Backoff
from protocol.link.base import Link
from protocol.link.dial import Connect, run_with_reconnect
from protocol.wire.codec import decode, encode
from protocol.wire.errors import (
    ErrorCode,
    LinkClosed,
    LinkError,
    LoginRefused,
    ProtocolError,
    RequestRejected,
    UnknownType,
)
from protocol.wire.messages import (
    FRAMES,
    FROM_RELAY,
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    Delta,
    Done,
    Error,
    Find,
    Found,
    Hello,
    InputAck,
    Leave,
    Ping,
    Pong,
    Queued,
    Rejected,
    Snapshot,
    Spaces,
    SpacesReply,
    Status,
    StatusReply,
    Steer,
    Submit,
    Welcome,
    WorkerAway,
    WorkerBack,
)
from protocol.wire.messages import Watch as WatchMessage
from protocol.wire.validators import Message, Value

#: Time to report that a request is no longer wanted. Without the report, the relay cancels it later by itself.
LEAVE_S = 2.0
#: With which a call about an accepted request is refused, and never its stream: what it asks for cannot be stored now,
#: or the connection may only read.
_OF_CALLS = frozenset({ErrorCode.STORAGE_FULL, ErrorCode.FORBIDDEN})
Answer = TypeVar("Answer", bound=Message)


def new_request_id() -> str:
    """A random request id of 128 bits."""
    return secrets.token_hex(16)


class RelayClient:
    """A relay, reached over a link that is restored whenever it is lost; made by `open_relay`.

    Attributes:
        welcome: what the relay sent at the last login: principal, limits, its version.
    """

    welcome: Welcome

    def __init__(
        self,
        *,
        reconnect: bool,
        on_reconnect: Callable[[LinkError, float], None] | None,
        on_up: Callable[[Welcome], None] | None,
    ) -> None:
        self._reconnect = reconnect
        self._on_reconnect = on_reconnect
        self._on_up = on_up
        self._link: Link | None = None
        self._changed = trio.Event()  # set when the link is up, or the client has ended
        self._was_up = False
        self._fault: Callable[[], Exception] | None = None
        self._scope = trio.CancelScope()
        self._streams: dict[str, Stream] = {}
        self._calls = PendingCalls()
        self._watch: tuple[WatchMessage, Watch] | None = None
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            **dict.fromkeys((Accepted, InputAck, Queued, WorkerAway, WorkerBack, *FRAMES.values()), self._to_stream),
            Rejected: self._rejected,
            Error: self._error,
            StatusReply: self._calls.status_reply,
            SpacesReply: self._calls.spaces_reply,
            Found: self._calls.found,
            Done: self._calls.done,
            Snapshot: self._to_watch,
            Delta: self._to_watch,
            Ping: self._ping,
        }

    # -- what a client does ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def submit(
        self,
        space: str,
        params: Mapping[str, Value] | None = None,
        *,
        inputs: Mapping[str, InputSource] | None = None,
        priority: int = 5,
        queue_timeout_s: float | None = None,
        run_timeout_s: float | None = None,
        detach: bool = False,
        retry: str = "before_output",
        cache: bool = True,
        group: str | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[Stream]:
        """Submit a request; the block begins once the relay has stored it safely.

        Leaving the block before the request has ended cancels it, unless `detach` is set.

        Args:
            space: name of the space.
            params: valid for the space's schema.
            inputs: name -> bytes, or a path: whole inputs, read completely into memory. Or an async iterator of str or
                bytes, which is sent as it yields while the block lasts; its exceptions cancel the request and are
                raised by the block. Or `Live()`, to be fed by `Stream.feed`; or `From(request_id)`, the output of
                another request. A tuple with the media type may be in the place of bytes, a path or an iterator.
            priority: 0..9; higher goes first.
            queue_timeout_s: how long it may wait for a slot; None uses the space's limit.
            run_timeout_s: how long it may run; None uses the space's limit.
            detach: the request continues when its client has gone.
            retry: whether to try again if its worker is lost: `never`, `before_output` (while nothing was streamed) or
                `always`; see `protocol.client.stream.Restarted` for what this does to frames already delivered.
            cache: whether a relay that keeps results may answer it with that of an equal request; see
                `protocol.wire.frames.Completed.cached`.
            group: a name of the program's own; a cancel of one request of a group cancels the others, too.
            request_id: 32 lower-case hex digits, to repeat a submit that may have arrived; None makes a new one.

        Raises:
            RequestRejected: the relay rejected the request; raised here or by the stream.
            ValueError: an argument breaks a rule of the wire, or the relay is too old for live inputs.
            OSError: an input file cannot be read.
            LinkError: the relay is permanently unreachable.

        Cancellation: the request is cancelled at the relay, within `LEAVE_S`.
        """
        made = await read_inputs(inputs or {})
        if any(info.is_fed for info in made.infos.values()) and "max_unacked_bytes" not in self.welcome.limits:
            raise ValueError(f"{self.welcome.server or 'this relay'} is too old for live inputs; send them whole")
        message = Submit(
            request_id=request_id or new_request_id(),
            space=space,
            params=dict(params or {}),
            inputs=made.infos,
            priority=priority,
            queue_timeout_s=queue_timeout_s,
            run_timeout_s=run_timeout_s,
            detach=detach,
            retry=retry,
            cache=None if cache else False,
            group=group,
        )
        stream = Stream(message.request_id, submit=encode(message), inputs=made.data, live=made.live)
        faults: list[Exception] = []
        try:
            self._open(stream)
            async with open_feeders(stream, made.sources, faults):
                await stream.wait_accepted()
                yield stream
        finally:
            if detach and not faults:
                self._release(stream)
            elif not stream.ended:
                await self._cancel_and_leave(stream, faults)
            self._close(stream)

    @asynccontextmanager
    async def attach(self, request_id: str, after_seq: int = -1, *, attempt: int = 0) -> AsyncIterator[Stream]:
        """Read the frames of a request, also one of an earlier program. Leaving the block does not cancel it.

        Args:
            request_id: a request of this principal; an operator may read any request.
            after_seq: the last frame already received; -1 for none.
            attempt: the attempt of that frame; with it, `Restarted` reports a later attempt that began below. 0 skips
                the frames up to `after_seq` of any attempt.

        Raises:
            RequestRejected: `request_not_found`; raised by the stream.
        """
        stream = Stream(request_id, after_seq=after_seq, attempt=attempt)
        try:
            self._open(stream)
            yield stream
        finally:
            self._release(stream)
            self._close(stream)

    async def cancel(self, request_id: str, reason: str = "") -> StatusReply:
        """Cancel a request and return its state; a running request ends a moment later.

        While its stream is open on this relay, the cancel is repeated on every new link, so that neither a lost link
        nor a restart loses it.

        Raises:
            RequestRejected: `request_not_found`.
        """
        cancel = Cancel(request_id=request_id, reason=reason)
        if stream := self._streams.get(request_id):
            stream.repeat_cancel(cancel)
        # A successful cancel has no answer: the status sent after it shows that it was read.
        return await self._call(Status(request_id=request_id), StatusReply, cancel)

    async def status(self, request_id: str) -> StatusReply:
        """The current state of a request.

        Raises:
            RequestRejected: `request_not_found`.
        """
        return await self._call(Status(request_id=request_id), StatusReply)

    async def spaces(self) -> list[dict[str, Value]]:
        """The spaces that this principal may use, each as a map."""
        _last, call = await self._call_until_answered(Spaces(), SpacesReply)
        return call.rows

    async def find(
        self,
        prefix: str = "",
        *,
        spaces: Sequence[str] = (),
        states: Sequence[str] = (),
        principals: Sequence[str] = (),
        limit: int = 100,
    ) -> tuple[list[dict[str, Value]], int]:
        """Requests of this principal, or for operators of all, the latest first; and how many fit, with those left out.

        Args:
            prefix: what their ids begin with.
            spaces: only of these; none means of all.
            states: only in these.
            principals: only of these.
            limit: at most so many, up to 1,000.
        """
        found, call = await self._call_until_answered(
            Find(prefix=prefix, spaces=list(spaces), states=list(states), principals=list(principals), limit=limit),
            Found,
        )
        return call.rows, found.total

    @asynccontextmanager
    async def watch(self, topics: Sequence[str] = ()) -> AsyncIterator[Watch]:
        """Follow what the relay does; for operators. Only one watch at a time.

        Args:
            topics: of `relay` `spaces` `workers` `requests` `clients` `history` `log` `audit`; none means all.
        """
        if self._watch is not None:
            raise RuntimeError("this relay is being watched already; open another connection")
        message, watch = WatchMessage(topics=list(topics)), Watch()
        self._watch = (message, watch)
        try:
            if self._fault is not None:
                raise self._fault()
            self._send_if_up(message)
            yield watch
        finally:
            self._watch = None

    async def steer(self, action: str, target: str = "", **options: Value) -> dict[str, Value]:
        """Carry out an operator's action.

        Args:
            action: `cancel` `promote` `drain_worker` ...
            target: id or name of the object to act on.
            options: those that the action needs.

        Returns:
            the data that the relay sent with its answer.

        Raises:
            RequestRejected: it was not done; `request_id` is then the target.
            LinkBroken: the link was lost before the answer came; whether it was done is not known.
        """
        steer = Steer(steer_id=secrets.token_hex(8), action=action, target=target, options=options)
        return (await self._call(steer, Done, repeat=False)).data

    # -- streams and questions -------------------------------------------------------------------------------

    def _open(self, stream: Stream) -> None:
        if self._fault is not None:
            raise self._fault()
        if stream.request_id in self._streams:
            raise ValueError(f"request {stream.request_id} is open on this relay already")
        self._streams[stream.request_id] = stream
        if self._link is not None and self._link.gone is None:
            stream.open(self._link)

    def _close(self, stream: Stream) -> None:
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]

    def _release(self, stream: Stream) -> None:
        """Ask the relay to send no more of it to this connection, and not to count it as a holder."""
        if not stream.ended and self._streams.get(stream.request_id) is stream:
            self._send_if_up(Leave(request_id=stream.request_id))

    async def _cancel_and_leave(self, stream: Stream, faults: list[Exception]) -> None:
        # Another thread may be reading the stream: it gets the fault of an iterator, too.
        stream.fail(lambda: faults[0] if faults else LinkClosed("the stream's block was left"))
        with trio.move_on_after(LEAVE_S, shield=True):
            try:
                link = await self._wait_link()
                link.send(Cancel(request_id=stream.request_id, reason="its client left"))
                await link.drained()
            except LinkError:
                return  # the relay notices that its holder has gone, and cancels it after its resume window

    async def _wait_link(self) -> Link:
        while True:
            if self._fault is not None:
                raise self._fault()
            if self._link is not None and self._link.gone is None:
                return self._link
            await self._changed.wait()

    async def _call(self, ask: Message, kind: type[Answer], *before: Message, repeat: bool = True) -> Answer:
        return (await self._call_until_answered(ask, kind, *before, repeat=repeat))[0]

    async def _call_until_answered(
        self, ask: Message, kind: type[Answer], *before: Message, repeat: bool = True
    ) -> tuple[Answer, PendingCall]:
        """Repeat a call over as many links as it takes to get an answer."""
        while True:
            link = await self._wait_link()
            call = PendingCall(ask, repeat=repeat)
            self._calls.add(call)
            try:
                self._send_all(link, (*before, ask))
                await call.done.wait()
            finally:
                self._calls.forget(call)
            if call.fault is not None:
                raise call.fault()
            if isinstance(call.answer, kind):
                return call.answer, call

    def _send_all(self, link: Link, messages: Sequence[Message]) -> None:
        try:
            for message in messages:
                link.send(message)
        except LinkError:  # the reader notices too, and informs everyone
            return

    def _send_if_up(self, message: Message) -> None:
        if self._link is not None:
            self._send_all(self._link, (message,))

    # -- the link's task -------------------------------------------------------------------------------------

    async def run(self, connect: Callable[..., Any]) -> None:
        """Stay linked; only `open_relay` calls it."""
        with self._scope:
            try:
                await connect(self._serve, on_down=self._on_link_down)
                self._end(partial(LinkClosed, "the link was closed"))
            except LoginRefused as refusal:
                self._end(fresh_error(refusal))

    async def stop(self) -> None:
        """End everything; only `open_relay` calls it."""
        self._end(partial(LinkClosed, "the relay's block was left"))

    def _end(self, fault: Callable[[], Exception]) -> None:
        if self._fault is None:
            self._fault = fault
        for stream in self._streams.values():
            stream.fail(fault)
        self._calls.fail(fault)
        if self._watch is not None:
            self._watch[1].fail(fault)
        self._change()
        self._scope.cancel()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_first(self) -> None:
        """Wait for the first login; only `open_relay` calls it."""
        await self._wait_link()

    def _on_link_down(self, fault: LinkError, delay_s: float) -> None:
        if not self._was_up or not self._reconnect:
            self._end(fresh_error(fault))
        elif self._on_reconnect is not None:
            self._on_reconnect(fault, delay_s)

    async def _serve(self, link: Link, welcome: Welcome) -> None:
        self.welcome, self._link, self._was_up = welcome, link, True
        try:
            if self._on_up is not None:
                self._on_up(welcome)
            for stream in tuple(self._streams.values()):
                stream.open(link)
            if self._watch is not None:
                self._watch[1].begin()
                link.send(self._watch[0])
            self._change()
            async for data in link:
                try:
                    message = decode(data, FROM_RELAY)
                except UnknownType:
                    continue  # from a newer relay, and not an answer to this client
                if handler := self._handlers.get(type(message)):
                    handler(message)
        finally:
            self._link = None
            self._calls.on_link_lost(link.reason or "the link was closed")

    # -- messages from the relay -----------------------------------------------------------------------------

    def _to_stream(self, message: Any) -> None:
        if stream := self._streams.get(message.request_id):
            stream.on_message(message)

    def _rejected(self, refusal: Rejected) -> None:
        """Tell whoever asked, which it does not say. A stream may be refused at any time; a call's own answer comes.

        A request that is not known ends both, since neither may wait for another answer.
        """
        stream = self._streams.get(refusal.request_id or "")
        if stream is None or stream.ended or (stream.accepted and refusal.code in _OF_CALLS):
            self._calls.rejected(refusal)
            return
        if refusal.code == ErrorCode.REQUEST_NOT_FOUND:
            self._calls.rejected(refusal)
        stream.on_message(refusal)

    def _error(self, error: Error) -> None:
        if error.code == ErrorCode.UNKNOWN_TYPE:  # the relay rejected a message of ours, without saying which
            self._calls.reject_all(error)
            if self._watch is not None:
                self._watch[1].fail(partial(RequestRejected, "", error.code, error.message))
        elif error.code == ErrorCode.PROTOCOL_ERROR:  # trying again would break the same rule again
            self._end(partial(ProtocolError, f"the relay reported: {error.message}"))

    def _to_watch(self, message: Snapshot | Delta) -> None:
        if self._watch is not None:
            self._watch[1].on_page(message)

    def _ping(self, ping: Ping) -> None:
        self._send_if_up(Pong(timestamp=ping.timestamp))


@asynccontextmanager
async def open_relay(
    url: str | None = None,
    *,
    token: str | None = None,
    role: str = "client",
    agent: str | None = None,
    reconnect: bool = True,
    on_reconnect: Callable[[LinkError, float], None] | None = None,
    on_up: Callable[[Welcome], None] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    backoff: Backoff | None = None,
    connect_to: Connect | None = None,
    readonly: bool = False,
) -> AsyncIterator[RelayClient]:
    """Connect and log in to a relay; until the block ends, the link is restored whenever it is lost.

    Args:
        url: `ws://host:port`, `wss://...` or `unix:PATH`, or several of them with commas between them, which stand in
            for each other; None uses RELAY_URL, else the local unix socket.
        token: None uses RELAY_TOKEN, else the file named by RELAY_TOKEN_FILE, else no token; "" uses no token whatever
            the environment says.
        role: `client` or `operator`.
        agent: this program's name for itself.
        reconnect: False raises LinkBroken at the first loss instead.
        on_reconnect: called at each loss and failed attempt, with the reason and the seconds until the next attempt.
        on_up: called at each login, the first one included.
        ssl_context: for wss://; None uses the system's certificate authorities.
        backoff: waiting times between attempts.
        connect_to: makes the transport instead of opening a socket.
        readonly: for operators: the relay refuses every steer from this connection.

    Raises:
        ConnectError: the first attempt failed. LoginRefused (a subclass) if the relay refused the login.
        ValueError: the URL, or the source of the token, is not usable.
    """
    address = from_environment(url)
    hello = Hello(
        version=PROTOCOL_VERSION,
        role=role,
        token=(token_from_environment() if token is None else token) or None,
        agent=agent if agent is not None else f"relay-client/{version('relayd')}",
        readonly=readonly,
        video=True,
    )
    relay = RelayClient(reconnect=reconnect, on_reconnect=on_reconnect, on_up=on_up)
    connect = partial(
        run_with_reconnect, address, hello, backoff=backoff, ssl_context=ssl_context, connect_to=connect_to
    )
    async with open_background(partial(relay.run, connect), relay.stop):
        await relay.wait_first()
        yield relay
