"""The `Link`: messages both ways over one WebSocket, whatever carries its bytes.

Here is all that a link decides: what may be sent, what was heard, who is silent or takes nothing, how it ends. How
bytes get to the transport and back is its subclasses' part: `protocol.link.stream_link` over any Trio stream, with
tasks; `relayd.net` over the relay's sockets, without any. No function here waits but those that say `async`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Self

import trio

from protocol.link.carrier import Carrier
from protocol.link.limits import LinkHandler, LinkLimits
from protocol.link.liveness import Alive, Dead, LinkFacts, Stalled, assess
from protocol.link.websocket_frames import (
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
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.validators import Message

#: For what is queued to go out, and again for the peer to answer our close frame.
CLOSE_S = 2.0
#: For a peer that broke a rule to read why: closing over unread bytes resets the connection, and the reason is lost.
LINGER_S = 2.0
#: Messages read and not yet taken by `receive`. Eight of the largest; with more the peer is made to wait.
MAX_INBOX_BYTES = 8 * MAX_MESSAGE_BYTES
#: What one message costs beside its bytes, so that a queue of tiny ones is bounded too.
MESSAGE_COST_BYTES = 64
#: Section 7.1.5 of RFC 6455: the connection went without a close frame.
ABNORMAL = 1006


class Link(Carrier):
    """A connection that carries messages both ways; made by `serve_link`, `open_link` and the relay's reactor.

    Attributes:
        peer: who is at the other end, for people and logs: `127.0.0.1:1234`, `unix`.
        rtt_s: seconds that the last ping took, None before the first pong.
        reason: why the link is gone, in words; empty while it lives.
        close_code: the WebSocket close code, ours or the peer's; None while it lives or where there was none.
        backlog_bytes: queued and not yet taken by the transport; only the link itself sets it.
        stopped: whether the transport is closed and nothing more will happen.
        stalled: whether it ended, or is about to, because the peer took nothing.
        patient: whether a peer that is silent, but whose machine answers, is given `send_timeout_s` to take what is
            on its way to it, and not `dead_after_s`: a program that reads nothing answers no pings either.
        heard_at: Trio time of the peer's last sign of life: any bytes, a pong too.
        taken_at: Trio time at which some of what is sent last got further.
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
        self._notified = 0  # of the end
        self._inbox: deque[bytes | str] | None = None
        self._inbox_bytes = 0
        self.reading_paused = False
        self.backlog_bytes = 0
        self._waiting_bytes = 0
        self._drained: list[tuple[int, Callable[[], None]]] | None = None
        self._low_water: float = float("inf")  # no callback waits for less
        self._changed: trio.Event | None = None
        self._ping_due = now + limits.ping_interval_s
        self._pinged_at: float | None = None
        self._pings = 0

    # -- sending ---------------------------------------------------------------------------------------------

    def send_nowait(self, data: bytes) -> None:
        """Queue one binary message; never waits.

        Raises:
            LinkClosed: this side closed the link.
            LinkBroken: the link is gone, or broke just now because the peer does not take what is queued; LinkClosed
                where the link has a farewell for such a peer.
            ValueError: the message is longer than any peer takes.
        """
        self._check()
        if len(data) > self._limits.max_message_bytes:
            raise ValueError(f"a message of {len(data)} bytes; the limit is {self._limits.max_message_bytes}")
        if self.backlog_bytes + len(data) > self._limits.max_backlog_bytes:
            self._stall(f"{self.backlog_bytes} bytes wait for {self.peer} to take them")
            self._check()
        self._put(data)

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """As `send_nowait` for each in turn; a carrier may send them at once."""
        for data in frames:
            self.send_nowait(data)

    def send(self, message: Message) -> None:
        """Encode and queue a message; never waits.

        Raises:
            EncodeError: the wire cannot carry it; nothing was queued.
            LinkClosed: as `send_nowait`.
            LinkBroken: as `send_nowait`.
        """
        self.send_nowait(encode(message))

    def on_drained(self, callback: Callable[[], None], low_water: int) -> Callable[[], None]:
        """Call `callback` each time the backlog falls from above `low_water` bytes to it or below.

        The callback runs where the transport is written to: it may call `send_nowait`, and must neither wait nor raise.

        Returns:
            a function that takes the callback off again.
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
            LinkBroken: the link is gone.
        """
        await trio.lowlevel.checkpoint()
        self._check()
        while self.backlog_bytes > below_bytes:
            await self._change()
            self._check()

    def _on_sent(self, size: int) -> None:
        """The transport took so much of the backlog."""
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
        """Take no longer ones from now on; at most what the link's limits allow."""
        self.parser.max_message_bytes = min(max_bytes, self._limits.max_message_bytes)

    async def receive(self) -> bytes:
        """The next binary message. What came before the peer closed is still given out.

        Up to `MAX_INBOX_BYTES` are read ahead. With more unread, the link stops reading, pongs too, so a peer may
        then take this end for dead: leave nothing unread for longer than `dead_after_s`.

        Raises:
            LinkClosed: this side closed the link.
            LinkBroken: the link is gone and everything received is taken.
            ProtocolError: the peer sent a text message; close with 1003.

        Cancellation: nothing is lost; the next call gives the message.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if self.closing is not None or self.end_kind is LinkClosed:
                raise LinkClosed(self.reason or "closed")
            if self._inbox:
                message = self._inbox.popleft()
                self._inbox_bytes -= len(message) + MESSAGE_COST_BYTES
                if self.reading_paused and self._inbox_bytes <= MAX_INBOX_BYTES:
                    self.reading_paused = False
                    self._resume_reading()
                if isinstance(message, str):
                    raise TextReceived("text message; every message is binary (msgpack)")
                return message
            self._check()
            await self._change()

    def __aiter__(self) -> Self:
        """Messages until the link is gone; `reason` then tells why. Raises ProtocolError as `receive`."""
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self.receive()
        except LinkError:
            raise StopAsyncIteration from None

    def set_handler(self, handler: LinkHandler) -> None:
        """From now on messages are not kept for `receive`, but given to `taker` as they come, those kept so far first.

        It hears of the end even where the link is gone already.
        """
        self.handler = handler
        kept, self._inbox, self._inbox_bytes = self._inbox or (), None, 0
        for is_text, group in groupby(kept, lambda message: isinstance(message, str)):
            if self.closing is not None or self.end_kind is LinkClosed:
                break  # the taker itself, or this side before, has closed
            if is_text:
                for text in group:
                    handler.on_text(str(text))
            else:
                handler.on_messages([message for message in group if isinstance(message, bytes)])
        if self.reading_paused:
            self.reading_paused = False
            self._resume_reading()
        if self.gone is not None:
            self._schedule_notify()

    def buffer_again(self, messages: list[bytes]) -> None:
        """Take back from the taker what it was handed last; from now on messages are kept for who takes them next."""
        self.handler = None
        if messages:
            self._dispatch(messages)

    def process_events(self, events: list[Event]) -> None:
        """What was parsed, in order."""
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
            return  # whoever took them has seen the end
        if self.handler is not None:
            self.handler.on_messages(messages)
            return
        if self._inbox is None:
            self._inbox = deque()
        self._inbox.extend(messages)
        self._add_to_inbox(sum(map(len, messages)) + MESSAGE_COST_BYTES * len(messages))

    def _add_to_inbox(self, cost: int) -> None:
        self._inbox_bytes += cost
        self.reading_paused = self._inbox_bytes > MAX_INBOX_BYTES
        self._wake()

    def _on_control(self, event: Event) -> None:
        """Whatever is no binary message."""
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
                if self.closing is None:  # nothing follows a close frame
                    self._send_control(PONG, event.payload)
            case Pong():
                self.on_pong(event.payload)
            case Close():
                said = f": {event.reason}" if event.reason else ""
                self._end(LinkBroken, f"{self.peer} closed the connection ({event.code}{said})", event.code)
            case Fault():
                # It may have much on its way that nobody reads now, and shall learn why all the same.
                said = f"{self.peer} sent {event.words}"
                self._end(LinkBroken, said, event.code, close=(event.code, event.words), linger_s=LINGER_S)

    def on_pong(self, payload: bytes) -> None:
        """A pong came; the answer to the last ping gives the round trip."""
        if self._pinged_at is not None and payload == self._pings.to_bytes(4, "big"):
            self.rtt_s, self._pinged_at = self.received_at - self._pinged_at, None
            self.taken_at = self.received_at  # what lay before the ping was read, too

    def _send_control(self, opcode: int, payload: bytes) -> None:
        """Queue a control frame, within the bound of all that is queued: a flood of pings is answered only so far."""
        if self.backlog_bytes + MESSAGE_COST_BYTES > self._limits.max_backlog_bytes:
            self._stall(f"{self.backlog_bytes} bytes wait for {self.peer} to take them")
        else:
            self._put_control(opcode, payload)

    # -- the end ---------------------------------------------------------------------------------------------

    @property
    def gone(self) -> LinkError | None:
        """What `send_nowait` would raise now; None while the link lives."""
        if self.closing is not None and self.end_kind is None:
            return LinkClosed(self.reason or "closed")
        return None if self.end_kind is None else self.end_kind(self.reason)

    def abort(self, reason: str) -> None:
        """Break the link now, from this side: nothing more is sent, the transport is cut."""
        self._end(LinkClosed, reason)
        self._cut()

    def close_soon(self, code: int = 1000, reason: str = "") -> None:
        """Begin to close: what is queued goes out, then a close frame; the rest as `aclose`, without waiting for it.

        Args:
            code: WebSocket close code (RFC 6455 section 7.4.1).
            reason: at most 123 bytes of UTF-8.
        """
        if self.closing is None and self.end_kind is None:
            self._close(code, cut_reason(reason))

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Send what is queued, close the WebSocket and then the transport. May be called again, and from anywhere.

        Args:
            code: WebSocket close code (RFC 6455 section 7.4.1).
            reason: at most 123 bytes of UTF-8.

        Cancellation: shielded; it ends within twice `CLOSE_S`, by cutting the transport where nothing else helps.
        """
        self.close_soon(code, reason)
        with trio.CancelScope(shield=True):
            with trio.move_on_after(2 * CLOSE_S):
                await self._wait_stopped()
            self._end(LinkClosed, reason or "closed")
            self._cut()
            await self._wait_stopped()

    async def wait_gone(self) -> None:
        """Wait until the link is gone or closing, from whichever side."""
        await trio.lowlevel.checkpoint()
        while self.gone is None:
            await self._change()

    def notify_closed(self) -> None:
        """Tell the taker of the end, as far as it has come; for the carrier's task."""
        handler = self.handler
        if handler is not None and self._notified == 0 and self.gone is not None:
            self._notified = 1
            handler.on_closed()
        if handler is not None and self._notified == 1 and self.stopped:
            self._notified = 2
            self.handler = None  # it refers to the link in turn: neither would be freed before a garbage collection
            handler.on_transport_closed()

    def _release(self) -> None:
        """Drop what the link holds, once its transport is cut; for the carrier.

        What was received in whole before the peer closed stays for `receive` and `hand_to`.
        """
        self.parser.release()
        self._drained = None  # whoever waits for the backlog to fall refers to the link in turn
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
        """Nobody takes what was read any more; the peer's answer may be behind it."""
        self._inbox, self._inbox_bytes = None, 0
        if self.reading_paused:
            self.reading_paused = False
            self._resume_reading()

    def _close_frame_out(self) -> None:
        """All that was queued has gone out, the close frame too."""
        if self.end_kind is None and self.closing is not None:
            self._close_by = min(self._close_by, trio.current_time() + CLOSE_S)
            self.schedule(self._close_by)

    def _check(self) -> None:
        if self.end_kind is not None or self.closing is not None:
            fault = self.gone
            assert fault is not None
            raise fault

    def _end(
        self,
        kind: type[LinkError],
        reason: str,
        code: int | None = None,
        *,
        close: tuple[int, str] | None = None,
        linger_s: float = 0.0,
    ) -> None:
        """The one place where a link's life ends; the first call counts.

        Args:
            kind: what is raised to who still uses it.
            reason: in words.
            code: the close code.
            close: of the close frame that the peer is to get, where it is not the answer to its own.
            linger_s: how long to read on, so that the peer finds the close frame and no reset.
        """
        if self.end_kind is not None:
            return
        answer = close or ((code, "") if code is not None and code != ABNORMAL else None)
        if self.closing is not None:  # whatever happens while we close, we closed
            kind, (code, said), answer = LinkClosed, self.closing, None
            reason = said or "closed"
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
        """The transport went."""
        self._end(LinkBroken, why or f"connection to {self.peer} lost", ABNORMAL)
        self._cut()

    def _stall(self, why: str) -> None:
        """The peer does not take what waits for it: that is dropped, and the link closed with its farewell.

        What is on its way must get through first; a peer that reads nothing is cut off after `aclose`'s time.
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
        """This process stood still for so long (it was stopped, or swapped): whatever the peer sent waits unread."""
        self.received_at += late_s
        self.taken_at += late_s

    def check_liveness(self, now: float) -> float:
        """See to pings, to silence, and to a peer that takes nothing; when to look again.

        Args:
            now: Trio time.

        Returns:
            Trio time; infinite once there is nothing left to look at.
        """
        if now >= self._close_by:
            self.lose("closed" if self.closing is not None else "")
        if self.end_kind is not None or self.closing is not None:
            return self._close_by if not self.stopped else float("inf")
        sending = self._sending
        if sending:
            waiting = self._in_kernel()  # a kernel that is full takes the next piece only much later
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
                self.lose(f"nothing heard from {self.peer} for {silent_s:.0f} s")
                return float("inf")
            case Stalled():
                self._stall(f"{self.peer} took no data for {self._limits.send_timeout_s:g} s")
                return self._close_by
            case Alive(check_at, ping):
                if ping:
                    self._ping_due = now + self._limits.ping_interval_s
                    if self._pinged_at is None:  # one in flight is enough: TCP loses none
                        self._pings = (self._pings + 1) & 0xFFFF_FFFF
                        self._pinged_at = now
                        self._send_control(PING, self._pings.to_bytes(4, "big"))
                return check_at

    def _machine_answers(self) -> bool:
        return self.tolerate_stall and self._peer_acknowledges()

    # -- who waits -------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = trio.Event()
        await self._changed.wait()
