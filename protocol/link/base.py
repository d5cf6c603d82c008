"""The `Link`: messages in both directions over one WebSocket, independent of the transport.

A link decides what may be sent, keeps what was received, detects a peer that is silent or stalled, and ends the
connection. Subclasses move the bytes: `protocol.link.stream_link` over any Trio stream, with tasks, and `relayd.net`
over the relay's sockets, without tasks. Only functions that are `async` wait.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Self

import trio

from protocol.link.carrier import Carrier
from protocol.link.limits import LINGER_S, MESSAGE_COST_BYTES, LinkHandler, LinkLimits, TurnMeter
from protocol.link.liveness import Alive, Dead, LinkFacts, Stalled, assess
from protocol.link.websocket_frames import (
    ABNORMAL,
    CLOSE,
    PING,
    POLICY_VIOLATION,
    PONG,
    Close,
    Event,
    Fault,
    Parser,
    Ping,
    Pong,
    close_payload,
    cut_reason,
)
from protocol.wire.codec import encode
from protocol.wire.errors import ErrorCode, LinkBroken, LinkClosed, LinkError, TextReceived
from protocol.wire.validators import Message

#: Time for the queued messages to go out, and again for the peer to answer our close frame.
CLOSE_S = 2.0


class Link(Carrier):
    """A connection that carries messages in both directions; made by `serve_link`, `open_link` and the relay's reactor.

    Attributes:
        peer: the other end, for people and logs: `127.0.0.1:1234`, `unix`.
        rtt_s: round-trip time of the last ping, in seconds; None before the first pong.
        reason: why the link ended, as text; empty while it is open.
        close_code: the WebSocket close code, ours or the peer's; None while the link is open or if there was none.
        backlog_bytes: bytes queued that the transport has not accepted yet; set only by the link itself.
        stopped: whether the transport is closed and nothing more will happen.
        stalled: whether the link ended, or is about to, because the peer accepted no data.
        tolerate_stall: whether a peer that is silent, but whose machine still acknowledges data, gets `send_timeout_s`
            to accept what is being sent, instead of `dead_after_s`: a program that does not read answers no pings.
        received_at: Trio time of the last bytes received from the peer, including pongs.
        taken_at: Trio time at which sending last made progress.
    """

    __slots__ = (
        "_changed",
        "_close_by",
        "_drained",
        "_inbox",
        "_inbox_bytes",
        "_limits",
        "_lingers",
        "_low_water",
        "_notified",
        "_ping_due",
        "_pinged_at",
        "_pings",
        "_waiting_bytes",
        "backlog_bytes",
        "close_code",
        "closing",
        "end_kind",
        "handler",
        "meter",
        "parser",
        "peer",
        "reading_paused",
        "reason",
        "received_at",
        "rtt_s",
        "stalled",
        "stopped",
        "taken_at",
        "tolerate_stall",
    )

    def __init__(self, peer: str, limits: LinkLimits, *, is_client: bool) -> None:
        now = trio.current_time()
        self.peer = peer
        self.rtt_s: float | None = None
        self.reason = ""
        self.close_code: int | None = None
        self.stalled = False
        self.stopped = False
        self.tolerate_stall = False
        self.received_at = self.taken_at = now
        self._limits = limits
        self.parser = Parser(masked=not is_client, max_message_bytes=limits.max_message_bytes, budget=limits.budget)
        self.end_kind: type[LinkError] | None = None
        self.closing: tuple[int, str] | None = None
        self._close_by = float("inf")
        self._lingers = False
        self.handler: LinkHandler | None = None
        self.meter: TurnMeter | None = None
        self._notified = 0  # calls made to the handler about the end
        self._inbox: deque[bytes | str] | None = None
        self._inbox_bytes = 0
        self.reading_paused = False
        self.backlog_bytes = 0
        self._waiting_bytes = 0
        self._drained: list[tuple[int, Callable[[], None]]] | None = None
        self._low_water: float = float("inf")  # the lowest low-water mark of the callbacks
        self._changed: trio.Event | None = None
        self._ping_due = now + limits.ping_interval_s
        self._pinged_at: float | None = None
        self._pings = 0

    # -- sending ---------------------------------------------------------------------------------------------

    def send_nowait(self, data: bytes) -> None:
        """Queue one binary message; never waits.

        Raises:
            LinkClosed: this side closed the link.
            LinkBroken: the link ended earlier, or breaks now because the peer does not read what is queued; LinkClosed
                in the second case if the limits contain a farewell message.
            ValueError: the message is longer than the limit.
        """
        self._check_room(len(data))
        self._put(data)

    def _check_room(self, size: int) -> None:
        """Check that a message of `size` bytes may be queued; raises as `send_nowait`."""
        self._check()
        if size > self._limits.max_message_bytes:
            raise ValueError(f"a message of {size} bytes; the limit is {self._limits.max_message_bytes}")
        if self.backlog_bytes + size > self._limits.max_backlog_bytes:
            self._stall(f"{self.backlog_bytes} bytes are queued for {self.peer}, which does not read them")
            self._check()

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """Call `send_nowait` for each frame in order; a subclass may send them together."""
        for data in frames:
            self.send_nowait(data)

    def send(self, message: Message) -> None:
        """Encode and queue a message; never waits.

        Raises:
            EncodeError: the message cannot be encoded; nothing was queued.
            LinkClosed: as for `send_nowait`.
            LinkBroken: as for `send_nowait`.
        """
        self.send_nowait(encode(message))

    def on_drained(self, callback: Callable[[], None], low_water: int) -> Callable[[], None]:
        """Call `callback` each time the backlog falls from above `low_water` bytes to `low_water` or less.

        The callback runs in the code that writes to the transport: it may call `send_nowait`, but must neither wait nor
        raise.

        Returns:
            a function that removes the callback.
        """
        entry = (low_water, callback)
        if self._drained is None:
            self._drained = []
        self._drained.append(entry)
        self._low_water = min(self._low_water, low_water)

        def remove() -> None:
            if self._drained and entry in self._drained:
                self._drained.remove(entry)

        return remove

    async def drained(self, below_bytes: int = 0) -> None:
        """Wait until at most `below_bytes` are queued.

        Raises:
            LinkClosed: this side closed the link.
            LinkBroken: the link ended.
        """
        await trio.lowlevel.checkpoint()
        self._check()
        while self.backlog_bytes > below_bytes:
            await self._change()
            self._check()

    def _on_sent(self, size: int) -> None:
        """Note that the transport has accepted `size` bytes of the backlog."""
        before = self.backlog_bytes
        self.backlog_bytes = left = before - size
        if self._changed is not None:
            self._wake()
        if self._drained and self.closing is None and self.end_kind is None:
            for low_water, callback in tuple(self._drained):
                if left <= low_water < before:
                    callback()

    # -- receiving -------------------------------------------------------------------------------------------

    def set_max_message_bytes(self, max_bytes: int) -> None:
        """Accept no longer messages from now on; the link's limits still apply."""
        self.parser.max_message_bytes = min(max_bytes, self._limits.max_message_bytes)

    async def receive(self) -> bytes:
        """Return the next binary message, including messages received before the peer closed.

        Up to `max_inbox_bytes` are read ahead. If more is unread, the link stops reading, pongs included, so the peer
        may consider this end dead: call `receive` at least once in each `dead_after_s`.

        Raises:
            LinkClosed: this side closed the link.
            LinkBroken: the link ended, and every message received has been returned.
            ProtocolError: the peer sent a text message; close with 1003.

        Cancellation: nothing is lost; the next call returns the message.
        """
        message = await self.receive_any()
        if isinstance(message, str):
            raise TextReceived("text message; every message is binary (msgpack)")
        return message

    async def receive_any(self) -> bytes | str:
        """As `receive`, but return text messages too."""
        await trio.lowlevel.checkpoint()
        while True:
            if self.closing is not None or self.end_kind is LinkClosed:
                raise LinkClosed(self.reason or "closed")
            if self._inbox:
                message = self._inbox.popleft()
                self._inbox_bytes -= len(message) + MESSAGE_COST_BYTES
                if self.reading_paused and self._inbox_bytes <= self._limits.max_inbox_bytes:
                    self._read_again()
                return message
            self._check()
            await self._change()

    def __aiter__(self) -> Self:
        """Iterate over messages until the link ends; `reason` then says why. Raises ProtocolError like `receive`."""
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self.receive()
        except LinkError:
            raise StopAsyncIteration from None

    def set_handler(self, handler: LinkHandler) -> None:
        """Pass messages to `handler` as they arrive instead of keeping them for `receive`; first those kept so far.

        The handler is notified of the end even if the link has ended already.
        """
        self.handler = handler
        kept, self._inbox, self._inbox_bytes = self._inbox or (), None, 0
        self.reading_paused, was_paused = False, self.reading_paused
        for is_text, group in groupby(kept, lambda message: isinstance(message, str)):
            if self.closed_here:
                break  # closed by the handler, or by this side earlier
            if (inbox := self._paused_inbox()) is not None:
                inbox.extend(group)  # the handler has called `pause`
            elif is_text:
                for text in group:
                    handler.on_text(str(text))
            else:
                handler.on_messages([message for message in group if isinstance(message, bytes)])
        if was_paused and not self.reading_paused:
            self._read_again()
        if self.gone is not None:
            self._schedule_notify()

    def pause(self, messages: list[bytes]) -> None:
        """Stop reading, and keep `messages` and what has been received behind them, until `set_handler` is called.

        Args:
            messages: those of the handler's last call that it has not handled.
        """
        self.handler, self._inbox, self._inbox_bytes = None, deque(messages), 0
        self.reading_paused = True
        self._add_to_inbox(sum(map(len, messages)) + MESSAGE_COST_BYTES * len(messages))

    def pause_reading(self) -> None:
        """Stop reading until `resume_reading` or `set_handler` is called."""
        self.reading_paused = True
        self._add_to_inbox(0)

    def resume_reading(self) -> None:
        """Read again, unless messages wait for `set_handler` or `receive`."""
        if self.reading_paused and not self._inbox:
            self._read_again()

    def _read_again(self) -> None:
        self.reading_paused = False
        self.received_at = trio.current_time()  # what has come meanwhile was not read
        self._resume_reading()

    def _paused_inbox(self) -> deque[bytes | str] | None:
        return self._inbox if self.handler is None else None

    async def wait_reading(self) -> None:
        """Wait until the link is read again, or has stopped."""
        while self.reading_paused and not self.stopped:
            await self._change()

    def buffer_again(self, messages: list[bytes]) -> None:
        """Take back the messages last passed to the handler, and keep messages for `receive` or the next handler."""
        self.handler = None
        if messages:
            self._dispatch(messages)

    def process_events(self, events: list[Event]) -> None:
        """Process parsed events, in order."""
        messages: list[bytes] = []
        for event in events:
            if type(event) is bytes:
                messages.append(event)
                continue
            if messages:
                self._dispatch(messages)
                messages = []
            if self.end_kind is not None:
                return
            self._on_control(event)
        if messages:
            self._dispatch(messages)

    def _dispatch(self, messages: list[bytes]) -> None:
        if self.end_kind is not None or self.closing is not None:
            return  # the handler or `receive` has reported the end
        if self.handler is not None:
            self.handler.on_messages(messages)
            return
        if self._inbox is None:
            self._inbox = deque()
        self._inbox.extend(messages)
        self._add_to_inbox(sum(map(len, messages)) + MESSAGE_COST_BYTES * len(messages))

    def _add_to_inbox(self, cost: int) -> None:
        self._inbox_bytes += cost
        self.reading_paused = self.reading_paused or self._inbox_bytes > self._limits.max_inbox_bytes
        self._wake()

    def _on_control(self, event: Event) -> None:
        """Process an event that is not a binary message."""
        match event:
            case str():
                if self.closing is not None:
                    return
                if self.handler is not None:
                    self.handler.on_text(event)
                else:
                    self._inbox = deque() if self._inbox is None else self._inbox
                    self._inbox.append(event)
                    self._add_to_inbox(len(event) + MESSAGE_COST_BYTES)
            case Ping():
                if self.closing is None:  # nothing may follow a close frame
                    self._send_control(PONG, event.payload)
            case Pong():
                self.on_pong(event.payload)
            case Close():
                detail = f": {event.reason}" if event.reason else ""
                self._end(LinkBroken, f"{self.peer} closed the connection ({event.code}{detail})", event.code)
            case Fault():
                # The peer may still be sending a lot that is no longer read; linger so that it learns the reason.
                reason = f"{self.peer} sent {event.reason}"
                self._end(LinkBroken, reason, event.code, close=(event.code, event.reason), linger_s=LINGER_S)

    def on_pong(self, payload: bytes) -> None:
        """Process a pong; the answer to the last ping gives the round-trip time."""
        if self._pinged_at is not None and payload == self._pings.to_bytes(4, "big"):
            self.rtt_s, self._pinged_at = self.received_at - self._pinged_at, None
            self.taken_at = self.received_at  # the peer has also read everything sent before the ping

    def _send_control(self, opcode: int, payload: bytes) -> None:
        """Queue a control frame within the backlog limit, so that a flood of pings cannot grow the queue."""
        if self.backlog_bytes + MESSAGE_COST_BYTES > self._limits.max_backlog_bytes:
            self._stall(f"{self.backlog_bytes} bytes are queued for {self.peer}, which does not read them")
        else:
            self._put_control(opcode, payload)

    # -- the end ---------------------------------------------------------------------------------------------

    @property
    def gone(self) -> LinkError | None:
        """The exception that `send_nowait` would raise now; None while the link is open."""
        if self.closing is not None and self.end_kind is None:
            return LinkClosed(self.reason or "closed")
        return None if self.end_kind is None else self.end_kind(self.reason)

    @property
    def closed_here(self) -> bool:
        """Whether this side has closed: what the peer has sent no longer counts."""
        return self.closing is not None or self.end_kind is LinkClosed

    def abort(self, reason: str) -> None:
        """Break the link now from this side: nothing more is sent, and the transport is cut."""
        self._end(LinkClosed, reason)
        self._cut()

    def close_soon(self, code: int = 1000, reason: str = "") -> None:
        """Begin to close: send what is queued, then a close frame. Like `aclose`, but does not wait.

        Args:
            code: WebSocket close code (RFC 6455 section 7.4.1).
            reason: at most 123 bytes of UTF-8.
        """
        if self.closing is None and self.end_kind is None:
            self._close(code, cut_reason(reason))

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Send what is queued, close the WebSocket and then the transport. May be called repeatedly, from any task.

        Args:
            code: WebSocket close code (RFC 6455 section 7.4.1).
            reason: at most 123 bytes of UTF-8.

        Cancellation: shielded; it ends within twice `CLOSE_S`, by cutting the transport if necessary.
        """
        self.close_soon(code, reason)
        with trio.CancelScope(shield=True):
            with trio.move_on_after(2 * CLOSE_S):
                await self._wait_stopped()
            self._end(LinkClosed, reason or "closed")
            self._cut()
            await self._wait_stopped()

    async def wait_gone(self) -> None:
        """Wait until the link has ended or is closing, from either side."""
        await trio.lowlevel.checkpoint()
        while self.gone is None:
            await self._change()

    def notify_closed(self) -> None:
        """Notify the handler of each stage of the end that has been reached; called by a task of the subclass."""
        handler = self.handler
        if handler is not None and self._notified == 0 and self.gone is not None:
            self._notified = 1
            handler.on_closed()
        if handler is not None and self._notified == 1 and self.stopped:
            self._notified = 2
            self.handler = None  # breaks the reference cycle: else only the garbage collector would free both
            handler.on_transport_closed()

    def _release(self) -> None:
        """Release what the link holds once its transport is cut; for subclasses.

        Complete messages received before the peer closed stay available to `receive` and `set_handler`.
        """
        self.parser.release()
        self._drained = self.meter = None  # both refer back to the link
        if self.end_kind is LinkClosed:
            self._inbox, self._inbox_bytes = None, 0

    async def _wait_stopped(self) -> None:
        while not self.stopped:
            await self._change()

    def _close(self, code: int, reason: str) -> None:
        self.closing = (code, reason)
        self._forget_inbox()
        self._close_by = trio.current_time() + 2 * CLOSE_S
        self.schedule(self._close_by)
        self._wake()
        self._schedule_notify()
        self._put_control(CLOSE, close_payload(code, reason))

    def _forget_inbox(self) -> None:
        """Drop unread messages; nobody will receive them, and the peer's close frame may be behind them."""
        self._inbox, self._inbox_bytes = None, 0
        self.resume_reading()

    def _close_frame_out(self) -> None:
        """Note that everything queued has been sent, including the close frame."""
        if self.end_kind is None and self.closing is not None:
            self._close_by = min(self._close_by, trio.current_time() + CLOSE_S)
            self.schedule(self._close_by)

    def _check(self) -> None:
        if (self.end_kind is not None or self.closing is not None) and self.gone is not None:
            raise self.gone  # not by a name: its traceback and this frame would keep each other, and the link

    def _end(
        self,
        kind: type[LinkError],
        reason: str,
        code: int | None = None,
        *,
        close: tuple[int, str] | None = None,
        linger_s: float = 0.0,
    ) -> None:
        """End the link. Every end passes here; only the first call counts.

        Args:
            kind: the exception raised to callers from now on.
            reason: the reason, as text.
            code: the close code.
            close: code and reason of the close frame to send, if it is not the answer to the peer's close frame.
            linger_s: how long to continue reading, so that the peer receives the close frame rather than a reset.
        """
        if self.end_kind is not None:
            return
        answer = close or ((code, "") if code is not None and code != ABNORMAL else None)
        if self.closing is not None:  # whatever happens while we close, it was this side that closed
            kind, (code, close_reason), answer = LinkClosed, self.closing, None
            reason = close_reason or "closed"
        self.end_kind, self.reason, self.close_code = kind, reason, code
        if self.closing is None and answer is None:
            self._drop_unsent()
        self._lingers = linger_s > 0
        if answer is not None:
            self._close_by = trio.current_time() + max(CLOSE_S, linger_s)
            self.schedule(self._close_by)
            self._put_control(CLOSE, close_payload(*answer))
        self._wake()
        self._schedule_notify()
        self._finish()

    def lose(self, why: str = "") -> None:
        """End the link because the transport failed."""
        self._end(LinkBroken, why or f"connection to {self.peer} lost", ABNORMAL)
        self._cut()

    def _stall(self, why: str) -> None:
        """Drop what the peer does not read, and close the link with the farewell message from its limits.

        What is being sent must go out first; a peer that reads nothing is cut off after the time that `aclose` allows.
        """
        self.stalled = True
        reason = f"{ErrorCode.SLOW_CONSUMER}: {why}"
        self._drop_unsent()
        if self._limits.farewell is None:
            self._end(LinkBroken, reason)
            self._cut()
            return
        self._put(encode(self._limits.farewell))
        self.reason = reason
        self._close(POLICY_VIOLATION, cut_reason(reason))

    # -- liveness --------------------------------------------------------------------------------------------

    def extend_deadlines(self, late_s: float) -> None:
        """Postpone the deadlines: this process was suspended for `late_s`, so data from the peer waits unread."""
        self.received_at += late_s
        self.taken_at += late_s

    def check_liveness(self, now: float) -> float:
        """Send pings, and end the link if the peer is silent or stalled.

        Args:
            now: Trio time.

        Returns:
            Trio time of the next check; infinite if none is needed.
        """
        if now >= self._close_by:
            self.lose("closed" if self.closing is not None else "")
        if self.end_kind is not None or self.closing is not None:
            return self._close_by if not self.stopped else float("inf")
        sending = self._sending
        if sending:
            waiting = self._in_kernel()  # a full kernel buffer accepts the next piece only much later
            if waiting < self._waiting_bytes:
                self.taken_at = now
            self._waiting_bytes = waiting
        facts = LinkFacts(
            now=now,
            received_at=self.received_at,
            taken_at=self.taken_at,
            ping_due=self._ping_due,
            reading_paused=self.reading_paused,
            sending=sending,
            machine_answers=self._machine_answers,
        )
        match assess(facts, self._limits):
            case Dead(silent_s):
                self.lose(f"nothing received from {self.peer} for {silent_s:.0f} s")
                return float("inf")
            case Stalled():
                self._stall(f"{self.peer} accepted no data for {self._limits.send_timeout_s:g} s")
                return self._close_by
            case Alive(check_at, ping):
                if ping:
                    self._ping_due = now + self._limits.ping_interval_s
                    if self._pinged_at is None or self.reading_paused:  # one ping in flight is enough: TCP loses none
                        self._pings = (self._pings + 1) & 0xFFFF_FFFF
                        self._pinged_at = now
                        self._send_control(PING, self._pings.to_bytes(4, "big"))
                return check_at

    def _machine_answers(self) -> bool:
        return self.tolerate_stall and self._peer_acknowledges()

    # -- waiting for changes ---------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = trio.Event()
        await self._changed.wait()
