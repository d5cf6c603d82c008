"""A link over any Trio stream: one task reads, one writes, one checks liveness.

No other task touches the transport, and `send_nowait` only queues. A cancelled request can therefore never leave half
a frame on the wire, and a peer that stops reading delays only its own backlog.
"""

from collections import deque

import trio

from protocol.link.base import CLOSE_S, Link
from protocol.link.limits import MESSAGE_COST_BYTES, LinkLimits
from protocol.link.liveness import LATE_S
from protocol.link.tcp_info import peer_acknowledges, socket_of, unsent_bytes
from protocol.link.websocket_frames import BINARY, TEXT, make_frame

RECEIVE_BYTES = 64 * 1024
#: A longer message is sent in pieces of this size, each of which shows that the peer still accepts data.
SEND_PIECE_BYTES = 64 * 1024
#: A piece that took this long had to wait for the peer, so its success is a sign of life.
WAITED_S = 0.01

_TRANSPORT_ERRORS = (trio.BrokenResourceError, trio.ClosedResourceError)


class StreamLink(Link):
    """A link over a stream after the handshake; `early` are the bytes received behind it. `run` runs its tasks."""

    def __init__(
        self, stream: trio.abc.Stream, peer: str, limits: LinkLimits, *, is_client: bool, early: bytes = b""
    ) -> None:
        super().__init__(peer, limits, is_client=is_client)
        self.stream = stream
        self._is_client = is_client
        self._early = early
        #: (opcode, payload, bytes counted in the backlog)
        self._outbox: deque[tuple[int, bytes, int]] = deque()
        self._in_flight = 0  # bytes counted for the message being sent; they are still part of the backlog
        self._busy = False
        self._more = trio.Event()
        self._sooner = trio.Event()
        self._read_out = trio.Event()
        self._scope = trio.CancelScope()

    def send_text(self, text: str) -> None:
        """Queue one text message; otherwise as `send_nowait`."""
        payload = text.encode()
        self._check_room(len(payload))
        self._queue(TEXT, payload, len(payload))

    # -- Carrier ---------------------------------------------------------------------------------------------

    def _put(self, data: bytes) -> None:
        self._queue(BINARY, data, len(data))

    def _put_control(self, opcode: int, payload: bytes) -> None:
        self._queue(opcode, payload, len(payload) + MESSAGE_COST_BYTES)

    def _queue(self, opcode: int, payload: bytes, cost: int) -> None:
        self._outbox.append((opcode, payload, cost))
        self.backlog_bytes += cost
        self._more.set()

    def _drop_unsent(self) -> None:
        self._outbox.clear()
        self.backlog_bytes = self._in_flight

    def _finish(self) -> None:
        self._more.set()

    def _cut(self) -> None:
        self._scope.cancel()

    def _schedule_notify(self) -> None:
        self._sooner.set()
        if self.stopped:  # its tasks have ended, and nobody else would notify the handler
            self.notify_closed()

    def _resume_reading(self) -> None:
        self._wake()

    def schedule(self, due: float) -> None:
        """Check liveness at `due` (Trio time) or earlier."""
        self._sooner.set()

    @property
    def _sending(self) -> bool:
        return self._busy

    def _peer_acknowledges(self) -> bool:
        sock = socket_of(self.stream)
        return sock is not None and peer_acknowledges(sock)

    def _in_kernel(self) -> int:
        sock = socket_of(self.stream)
        return unsent_bytes(sock) or 0 if sock is not None else 0

    # -- the tasks -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the link's tasks until it ends."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._watch)
        finally:
            self.lose("the link's tasks ended")
            await trio.aclose_forcefully(self.stream)
            self.stopped = True
            self._outbox.clear()
            self.backlog_bytes = 0
            self._release()
            self._wake()
            self.notify_closed()

    @trio.lowlevel.enable_ki_protection
    async def _read(self) -> None:
        data: bytes | bytearray = self._early
        self._early = b""
        while True:
            if data:
                if self.meter is not None:
                    self.meter.begin()
                self.parser.feed(data)
                if self.parser.events:
                    self.process_events(self.parser.pop_events())
                if self.meter is not None:
                    self.meter.end()
                data = b""  # free the memory while nothing arrives
            while self.reading_paused:
                await self._change()
            try:
                data = await self.stream.receive_some(RECEIVE_BYTES)
            except _TRANSPORT_ERRORS:
                break
            if not data:
                break
            self.received_at = trio.current_time()
        self._read_out.set()
        if self.end_kind is None:
            self.lose()

    @trio.lowlevel.enable_ki_protection
    async def _write(self) -> None:
        while True:
            while not self._outbox:
                if self.end_kind is not None:
                    if self._lingers:
                        await self._read_out.wait()  # or until `check_liveness` cuts the transport
                    self._cut()
                    return
                self._close_frame_out()
                self._more = trio.Event()
                await self._more.wait()
            opcode, payload, cost = self._outbox.popleft()
            self._in_flight, self._busy, self.taken_at = cost, True, trio.current_time()
            try:
                await self._send(make_frame(opcode, payload, masked=self._is_client))
            except _TRANSPORT_ERRORS:
                # The reader ends the link once it has read everything, and then knows the reason.
                if self.closing is None and self.end_kind is None:
                    await trio.sleep(CLOSE_S)
                self.lose()
                return
            self._in_flight, self._busy = 0, False
            self._on_sent(cost)

    async def _send(self, data: bytes) -> None:
        """Send in pieces: while a long message goes out slowly, its progress may be the peer's only sign of life."""
        view = memoryview(data)
        while True:
            piece, view = view[:SEND_PIECE_BYTES], view[SEND_PIECE_BYTES:]
            began = trio.current_time()
            await self.stream.send_all(piece)
            self.taken_at = now = trio.current_time()
            # Bytes that were accepted only after a wait went to a live peer, not into the kernel's free buffer.
            if now - began > WAITED_S:
                self.received_at = now
            if not view:
                return

    @trio.lowlevel.enable_ki_protection
    async def _watch(self) -> None:
        while True:
            self._sooner = trio.Event()
            due = self.check_liveness(trio.current_time())
            self.notify_closed()
            with trio.move_on_at(due):
                await self._sooner.wait()
            if (late_s := trio.current_time() - due) > LATE_S:
                self.extend_deadlines(late_s)
