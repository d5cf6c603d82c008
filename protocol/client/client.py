"""The client: `open_relay`, and the `RelayClient` it gives.

One task reads the link and hands each message, without waiting, to the stream or question it belongs to. When the
link is lost, a new one is made and every stream asks for what it misses.
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
    Hello,
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
)
from protocol.wire.messages import Watch as WatchMessage
from protocol.wire.validators import Message, Value

#: To tell the relay that a request is not wanted any more. Without it the relay's resume window does the same, later.
LEAVE_S = 2.0
Answer = TypeVar("Answer", bound=Message)


def new_request_id() -> str:
    """A request id of 128 random bits."""
    return secrets.token_hex(16)


class RelayClient:
    """A relay, reached over a link that is made anew whenever it is lost; made by `open_relay`.

    Attributes:
        welcome: what the relay said at the last login: principal, limits, its version.
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
        self._changed = trio.Event()  # link up, or all over
        self._was_up = False
        self._fault: Callable[[], Exception] | None = None
        self._scope = trio.CancelScope()
        self._streams: dict[str, Stream] = {}
        self._calls = PendingCalls()
        self._watch: tuple[WatchMessage, Watch] | None = None
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            **dict.fromkeys((Accepted, Queued, *FRAMES.values()), self._to_stream),
            Rejected: self._rejected,
            Error: self._error,
            StatusReply: self._calls.status_reply,
            SpacesReply: self._calls.spaces_reply,
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
        request_id: str | None = None,
    ) -> AsyncIterator[Stream]:
        """Submit a request; the block begins when the relay has it safe in its store.

        Leaving the block before the request has ended cancels it, unless `detach`.

        Args:
            space: name of the space.
            params: as the space's schema wants them.
            inputs: name -> bytes, a path, or a tuple of either with its media type. Read whole into memory.
            priority: 0..9; higher goes first.
            queue_timeout_s: how long it may wait for a slot; None takes the space's.
            run_timeout_s: how long it may run; None takes the space's.
            detach: the request goes on when its client is gone.
            retry: when its worker is lost, try elsewhere `never`, `before_output` (while nothing was streamed) or
                `always`; see `protocol.client.stream.Restarted` for what that does to frames that were given out.
            request_id: 32 lower-case hex digits, to submit what may have been submitted before; None makes one.

        Raises:
            RequestRejected: the relay does not take it; here, or from the stream.
            ValueError: an argument breaks the rules of the wire.
            OSError: an input file cannot be read.
            LinkError: the relay is gone for good.

        Cancellation: the relay is told to cancel the request, within `LEAVE_S`.
        """
        data, infos = await read_inputs(inputs or {})
        message = Submit(
            request_id=request_id or new_request_id(),
            space=space,
            params=dict(params or {}),
            inputs=infos,
            priority=priority,
            queue_timeout_s=queue_timeout_s,
            run_timeout_s=run_timeout_s,
            detach=detach,
            retry=retry,
        )
        stream = Stream(message.request_id, submit=encode(message), inputs=data)
        try:
            self._open(stream)
            await stream.wait_accepted()
            yield stream
        finally:
            if detach:
                self._release(stream)
            elif not stream.ended:
                await self._cancel_and_leave(stream)
            self._close(stream)

    @asynccontextmanager
    async def attach(self, request_id: str, after_seq: int = -1, *, attempt: int = 0) -> AsyncIterator[Stream]:
        """Read a request's frames, of this or an earlier program. Leaving the block cancels nothing.

        Args:
            request_id: of a request of this principal; an operator may listen in on all.
            after_seq: the last frame at hand already; -1 for none.
            attempt: whose frame that is; with it, a later attempt that began below is told by `Restarted`. 0 leaves
                out the frames up to `after_seq` of whichever attempt there is.

        Raises:
            RequestRejected: `request_not_found`; from the stream.
        """
        stream = Stream(request_id, after_seq=after_seq, attempt=attempt)
        try:
            self._open(stream)
            yield stream
        finally:
            self._release(stream)
            self._close(stream)

    async def cancel(self, request_id: str, reason: str = "") -> StatusReply:
        """Cancel a request, and return how it stands then; one that runs ends a moment later.

        While its stream is open on this relay, every new link tells the relay again, so that no cut and no restart
        loses it.

        Raises:
            RequestRejected: `request_not_found`.
        """
        cancel = Cancel(request_id=request_id, reason=reason)
        if stream := self._streams.get(request_id):
            stream.repeat_cancel(cancel)
        # A cancel that is carried out has no answer: the status behind it tells that it was read.
        return await self._call(Status(request_id=request_id), StatusReply, cancel)

    async def status(self, request_id: str) -> StatusReply:
        """How a request stands.

        Raises:
            RequestRejected: `request_not_found`.
        """
        return await self._call(Status(request_id=request_id), StatusReply)

    async def spaces(self) -> list[dict[str, Value]]:
        """The spaces this principal may use, a map each."""
        _last, question = await self._call_until_answered(Spaces(), SpacesReply)
        return [space for page in question.pages for space in page.spaces]

    @asynccontextmanager
    async def watch(self, topics: Sequence[str] = ()) -> AsyncIterator[Watch]:
        """Follow what the relay does; for operators. One at a time.

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
        """Have the relay do something; for operators.

        Args:
            action: `cancel` `promote` `drain_worker` ...
            target: id or name of what it is done to.
            options: as the action needs.

        Returns:
            what the relay has to say of it.

        Raises:
            RequestRejected: it was not done; `request_id` is then the target.
            LinkBroken: the link went before the answer came; whether it was done is not known.
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
        """Have the relay send nothing more of it to this connection, and not count it as a holder."""
        if not stream.ended and self._streams.get(stream.request_id) is stream:
            self._send_if_up(Leave(request_id=stream.request_id))

    async def _cancel_and_leave(self, stream: Stream) -> None:
        stream.fail(partial(LinkClosed, "the stream's block was left"))
        with trio.move_on_after(LEAVE_S, shield=True):
            try:
                link = await self._wait_link()
                link.send(Cancel(request_id=stream.request_id, reason="its client left"))
                await link.drained()
            except LinkError:
                return  # the relay sees that its holder is gone, and cancels it after its resume window

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
        """Ask until it is answered, over as many links as that takes."""
        while True:
            link = await self._wait_link()
            question = PendingCall(ask, repeat=repeat)
            self._calls.add(question)
            try:
                self._send_all(link, (*before, ask))
                await question.done.wait()
            finally:
                self._calls.forget(question)
            if question.fault is not None:
                raise question.fault()
            if isinstance(question.answer, kind):
                return question.answer, question

    def _send_all(self, link: Link, messages: Sequence[Message]) -> None:
        try:
            for message in messages:
                link.send(message)
        except LinkError:  # the reader is about to notice, and tells everyone
            return

    def _send_if_up(self, message: Message) -> None:
        if self._link is not None:
            self._send_all(self._link, (message,))

    # -- the link's task -------------------------------------------------------------------------------------

    async def run(self, connect: Callable[..., Any]) -> None:
        """Keep linked; only `open_relay` calls it."""
        with self._scope:
            try:
                await connect(self._serve, on_down=self._on_link_down)
                self._end(partial(LinkClosed, "the link was closed"))
            except LoginRefused as refusal:
                self._end(fresh_error(refusal))

    async def stop(self) -> None:
        """End it all; only `open_relay` calls it."""
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
                    continue  # of a newer relay, and nothing that this client asked for
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
        if not self._calls.rejected(refusal) and refusal.request_id is not None:
            self._to_stream(refusal)

    def _error(self, error: Error) -> None:
        if error.code == ErrorCode.UNKNOWN_TYPE:  # it does not take something of ours, and says not which
            self._calls.reject_all(error)
            if self._watch is not None:
                self._watch[1].fail(partial(RequestRejected, "", error.code, error.message))
        elif error.code == ErrorCode.PROTOCOL_ERROR:  # trying again would break the same rule again
            self._end(partial(ProtocolError, f"the relay says: {error.message}"))

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
    """Connect and log in to a relay; the link is made anew whenever it is lost, until the block ends.

    Args:
        url: `ws://host:port`, `wss://...` or `unix:PATH`; None takes RELAY_URL, else the local unix socket.
        token: None takes RELAY_TOKEN, else the file that RELAY_TOKEN_FILE names, else logs in without one; "" logs in
            without one whatever the environment says.
        role: `client` or `operator`.
        agent: what this program calls itself.
        reconnect: False ends everything with LinkBroken at the first loss.
        on_reconnect: told, of each loss and each failed try, why, and in how many seconds the next try follows.
        on_up: told of each login, the first too.
        ssl_context: for wss://; None takes the system's certificate authorities.
        backoff: waiting times between tries.
        connect_to: makes the transport in place of sockets.
        readonly: for operators: the relay refuses every steer of this connection.

    Raises:
        ConnectError: the first try failed. LoginRefused (one of these) where the relay said no.
        ValueError: the URL or the token's source is unusable.
    """
    address = from_environment(url)
    hello = Hello(
        version=PROTOCOL_VERSION,
        role=role,
        token=(token_from_environment() if token is None else token) or None,
        agent=agent if agent is not None else f"relay-client/{version('relayd')}",
        readonly=readonly,
    )
    relay = RelayClient(reconnect=reconnect, on_reconnect=on_reconnect, on_up=on_up)
    connect = partial(
        run_with_reconnect, address, hello, backoff=backoff, ssl_context=ssl_context, connect_to=connect_to
    )
    async with open_background(partial(relay.run, connect), relay.stop):
        await relay.wait_first()
        yield relay
