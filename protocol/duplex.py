"""The `Link`: its queues and the five tasks that serve them. `protocol.link` makes them.

One task always reads, one alone writes, three see to liveness. Nobody else touches the transport: `send_nowait` only
queues. So a cancelled request can never leave half a frame on the wire, and a peer that stops reading holds up
nothing but its own backlog.
"""

from collections import deque
from collections.abc import Callable
from typing import Self

import trio
from trio_websocket import ConnectionClosed

from protocol.codec import encode
from protocol.errors import ErrorCode, LinkBroken, LinkClosed, LinkError, TextReceived
from protocol.messages import KIB, MAX_MESSAGE_BYTES, Message
from protocol.websocket import Socket

PING_INTERVAL_S = 5.0
#: Three pings unanswered, and no other byte.
DEAD_AFTER_S = 15.0
#: For anything at all of what waits to be taken; a peer that takes little at a time is slow, and not gone.
SEND_TIMEOUT_S = 60.0
#: Looks at whether the peer takes something, in that time: what it last took may be known so much too late.
LOOKS = 8
#: Between two looks at whether the machine of a silent peer is still there.
PATIENCE_S = 1.0
#: For what is queued to go out, and again for the peer to answer our close frame.
CLOSE_S = 2.0
#: Messages read and not yet taken by `receive`. Eight of the largest; with more the peer is made to wait.
MAX_INBOX_BYTES = 8 * MAX_MESSAGE_BYTES
#: Messages queued and not yet taken by the transport: a quarter of the largest result.
MAX_BACKLOG_BYTES = 16 * MAX_MESSAGE_BYTES
#: RFC 6455 section 7.4.1: a peer that does not read.
POLICY_VIOLATION = 1008
#: What one message costs beside its bytes, so that a queue of tiny ones is bounded too.
MESSAGE_COST_BYTES = 64


class Link:
    """A connection that carries messages both ways; made by `serve_link` and `open_link`.

    Attributes:
        peer: who is at the other end, for people and logs: `127.0.0.1:1234`, `unix`.
        rtt_s: seconds that the last ping took, None before the first pong.
        reason: why the link is gone, in words; empty while it lives.
        close_code: the WebSocket close code, ours or the peer's; None while it lives or where there was none.
        stalled: whether it ended, or is about to, because the peer took nothing.
        patient: whether a peer that is silent, but whose machine answers, is given `send_timeout_s` to take what is
            on its way to it, and not `dead_after_s`: a program that reads nothing answers no pings either.
    """

    def __init__(
        self,
        socket: Socket,
        peer: str,
        *,
        ping_interval_s: float,
        dead_after_s: float,
        send_timeout_s: float,
        max_backlog_bytes: int,
        farewell: Message | None = None,
    ) -> None:
        self.peer = peer
        self.rtt_s: float | None = None
        self.reason = ""
        self.close_code: int | None = None
        self.stalled = False
        self.patient = False
        self._farewell = farewell
        self._socket = socket
        self._ping_interval_s = ping_interval_s
        self._dead_after_s = dead_after_s
        self._send_timeout_s = send_timeout_s
        self._max_backlog_bytes = max_backlog_bytes
        self._gone: type[LinkError] | None = None
        self._closing: tuple[int, str] | None = None
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self._inbox: deque[bytes | str] = deque()
        self._inbox_bytes = 0
        self._inbox_changed = trio.Event()
        self._outbox: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._outbox_changed = trio.Event()
        self._drained: list[tuple[int, Callable[[], None]]] = []
        self._taken = trio.Event()
        self._sending = False
        self._reader_waits = False

    # -- sending ---------------------------------------------------------------------------------------------

    @property
    def backlog_bytes(self) -> int:
        """Queued and not yet taken by the transport."""
        return self._backlog_bytes

    def send_nowait(self, data: bytes) -> None:
        """Queue one binary message; never waits.

        Raises:
            LinkClosed: this side closed the link.
            LinkBroken: the link is gone, or broke just now because the peer does not take what is queued; LinkClosed
                where the link has a farewell for such a peer.
            ValueError: the message is longer than any peer takes.
        """
        self._check()
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
        if self._backlog_bytes + len(data) > self._max_backlog_bytes:
            self._stall(f"{self._backlog_bytes} bytes wait for {self.peer} to take them")
            self._check()
        self._outbox.append(data)
        self._backlog_bytes += len(data)
        self._outbox_changed.set()

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

        The callback runs in the writer task: it may call `send_nowait`, and must neither wait nor raise.

        Returns:
            a function that takes the callback off again.
        """
        entry = (low_water, callback)
        self._drained.append(entry)

        def remove() -> None:
            if entry in self._drained:
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
        while self._backlog_bytes > below_bytes:
            await self._taken.wait()
            self._check()

    # -- receiving -------------------------------------------------------------------------------------------

    @property
    def last_heard(self) -> float:
        """Trio time of the peer's last sign of life: any bytes, a pong too."""
        return self._socket.transport.heard_at

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
            if self._closing is not None or self._gone is LinkClosed:
                raise LinkClosed(self.reason or "closed")
            if self._inbox:
                message = self._inbox.popleft()
                self._inbox_bytes -= len(message) + MESSAGE_COST_BYTES
                self._inbox_changed.set()
                if isinstance(message, str):
                    raise TextReceived("text message; every message is binary (msgpack)")
                return message
            self._check()
            await self._inbox_change()

    def __aiter__(self) -> Self:
        """Messages until the link is gone; `reason` then tells why. Raises ProtocolError as `receive`."""
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self.receive()
        except LinkError:
            raise StopAsyncIteration from None

    async def _inbox_change(self) -> None:
        if self._inbox_changed.is_set():
            self._inbox_changed = trio.Event()
        await self._inbox_changed.wait()

    # -- the end ---------------------------------------------------------------------------------------------

    @property
    def gone(self) -> LinkError | None:
        """What `send_nowait` would raise now; None while the link lives."""
        if self._closing is not None and self._gone is None:
            return LinkClosed(self.reason or "closed")
        return None if self._gone is None else self._gone(self.reason)

    def abort(self, reason: str) -> None:
        """Break the link now, from this side: nothing more is sent, the transport is cut."""
        self._end(LinkClosed, reason)

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Send what is queued, close the WebSocket and then the transport. May be called again, and from anywhere.

        Args:
            code: WebSocket close code (RFC 6455 section 7.4.1).
            reason: at most 123 bytes of UTF-8.

        Cancellation: shielded; it ends within twice `CLOSE_S`, by cutting the transport where nothing else helps.
        """
        if self._closing is None and self._gone is None:
            self._closing = (code, reason.encode()[:123].decode("utf-8", "ignore"))
            self._outbox_changed.set()
            self._inbox_changed.set()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(2 * CLOSE_S):
                await self._stopped.wait()
            self._end(LinkClosed, reason or "closed")
            await self._stopped.wait()

    def _check(self) -> None:
        fault = self.gone
        if fault is not None:
            raise fault

    def _end(self, kind: type[LinkError], reason: str, code: int | None = None) -> None:
        """The one place where a link's life ends; the first call counts."""
        if self._gone is not None:
            return
        if self._closing is not None:  # whatever happens while we close, we closed
            kind, (code, said) = LinkClosed, self._closing
            reason = said or "closed"
        self._gone, self.reason, self.close_code = kind, reason, code
        self._outbox.clear()
        self._inbox_changed.set()
        self._taken.set()
        self._scope.cancel()

    def _stall(self, why: str) -> None:
        """The peer does not take what waits for it: that is dropped, and the link closed with its farewell.

        What is on its way must get through first; a peer that reads nothing is cut off after `aclose`'s time.
        """
        self.stalled = True
        reason = f"{ErrorCode.SLOW_CONSUMER}: {why}"
        if self._farewell is None:
            self._end(LinkBroken, reason)
            return
        self._backlog_bytes -= sum(map(len, self._outbox))
        self._outbox.clear()
        self.send(self._farewell)
        self.reason, self._closing = reason, (POLICY_VIOLATION, reason[:123])
        self._inbox_changed.set()
        self._taken.set()

    # -- the tasks -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The link's own tasks, until its end; only `serve_link` calls it."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._ping)
                    nursery.start_soon(self._watch)
                    nursery.start_soon(self._watch_taking)
        finally:
            self._end(LinkBroken, "the link's tasks ended")
            await trio.aclose_forcefully(self._socket.transport)
            self._stopped.set()

    @trio.lowlevel.enable_ki_protection
    async def _read(self) -> None:
        while True:
            while self._inbox_bytes > MAX_INBOX_BYTES:
                self._reader_waits = True
                await self._inbox_change()
            self._reader_waits = False
            try:
                message = await self._socket.get_message()
            except ConnectionClosed:
                break
            self._inbox.append(message)
            self._inbox_bytes += len(message) + MESSAGE_COST_BYTES
            self._inbox_changed.set()
        if self._closing is not None:  # the writer sees to the rest
            return
        if self._socket.lingered is not None:
            await self._socket.lingered.wait()
            self._end(LinkBroken, f"{self.peer} sent a message of more than {MAX_MESSAGE_BYTES // KIB} KiB", 1009)
            return
        closed = self._socket.closed
        if closed is None or closed.code == 1006:
            self._end(LinkBroken, f"connection to {self.peer} lost", 1006)
        else:
            said = f": {closed.reason}" if closed.reason else ""
            self._end(LinkBroken, f"{self.peer} closed the connection ({closed.code}{said})", closed.code)

    @trio.lowlevel.enable_ki_protection
    async def _write(self) -> None:
        while True:
            while not self._outbox:
                if self._closing is not None:
                    with trio.move_on_after(CLOSE_S):
                        await self._socket.aclose(*self._closing)
                    self._end(LinkClosed, "closed")
                    return
                self._outbox_changed = trio.Event()
                await self._outbox_changed.wait()
            data = self._outbox.popleft()
            self._socket.transport.taken_at = trio.current_time()
            self._sending = True
            try:
                await self._socket.send_message(data)
            except ConnectionClosed:
                # The reader ends the link when it has read to the end, and then knows the reason.
                if self._closing is None:
                    await trio.sleep(CLOSE_S)
                self._end(LinkBroken, f"connection to {self.peer} lost", 1006)
                return
            self._sending = False
            self._sent(len(data))

    def _sent(self, size: int) -> None:
        before = self._backlog_bytes
        self._backlog_bytes -= size
        self._taken.set()
        self._taken = trio.Event()
        for low_water, callback in tuple(self._drained) if self._closing is None else ():
            if self._backlog_bytes <= low_water < before:
                callback()

    @trio.lowlevel.enable_ki_protection
    async def _ping(self) -> None:
        """One ping in flight is enough: TCP loses none, and any other byte is a sign of life as well."""
        while True:
            await trio.sleep(self._ping_interval_s)
            began = trio.current_time()
            try:
                await self._socket.ping()
            except ConnectionClosed:
                return
            self._socket.transport.taken_at = now = trio.current_time()  # what lay before the ping was read, too
            self.rtt_s = now - began

    @trio.lowlevel.enable_ki_protection
    async def _watch(self) -> None:
        while True:
            silent_s = trio.current_time() - self.last_heard
            if self._reader_waits:  # we do not listen, so silence means nothing
                silent_s = 0.0
            elif silent_s >= self._dead_after_s:
                if not (self.patient and self._sending and self._socket.transport.answered):
                    self._end(LinkBroken, f"nothing heard from {self.peer} for {silent_s:.0f} s")
                    return
                silent_s = self._dead_after_s - PATIENCE_S
            await trio.sleep(self._dead_after_s - silent_s)

    @trio.lowlevel.enable_ki_protection
    async def _watch_taking(self) -> None:
        transport = self._socket.transport
        while self._closing is None:
            transport.look()
            left_s = self._send_timeout_s
            if self._sending:
                left_s -= trio.current_time() - transport.taken_at
            if left_s <= 0:
                self._stall(f"{self.peer} took no data for {self._send_timeout_s:g} s")
                await trio.sleep(2 * CLOSE_S)
                # Half a frame may be out: the transport is good for nothing more, and `_end` has it cut.
                self._end(LinkBroken, self.reason)
                return
            await trio.sleep(min(left_s, self._send_timeout_s / LOOKS))
