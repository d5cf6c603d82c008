"""A link over one of the relay's sockets: it sends what the kernel accepts and leaves the rest to the reactor."""

import select
import socket
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import structlog
import trio

from protocol.link.base import CLOSE_S, Link
from protocol.link.limits import LinkLimits
from protocol.link.tcp_info import peer_acknowledges, unsent_bytes
from protocol.link.websocket_frames import BINARY_HEADS, CLOSE, CONTROL_HEADS, Event, frame_head

log = structlog.get_logger("relayd.reactor")


#: Bytes received at once from a worker, and the size of the shared buffer. Frames received together are sent together,
#: and the call to send costs far more than the data in it: with 1 MiB a saturated relay used a fifth more CPU for each
#: frame, with 64 KiB half as much again as with 1 MiB.
RECEIVE_BYTES = 2 * 1024 * 1024
#: Bytes received at once from a client, which sends little but for its uploads: many small messages cause many answers.
CLIENT_RECEIVE_BYTES = 64 * 1024


#: Messages handled per link in one turn. A client's `spaces` takes 0.3 ms if there are many, a worker's frame 2 µs.
CLIENT_MESSAGES, WORKER_MESSAGES = 64, 4096
#: Buffers in one `sendmsg`; the kernel accepts 1,024 (IOV_MAX).
MAX_PIECES = 512
#: Most pieces in the queue, two per message: bounds the memory for a peer that sends requests and never reads.
MAX_QUEUED_PIECES = 65_536
#: The log event and the message of an error in the relay's own code, which ends only the connection concerned.
INTERNAL_LOG = "internal error in connection"
INTERNAL_MESSAGE = "internal error; see the relay's log"


READABLE, WRITABLE, HANG_UP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR
NEVER = float("inf")


class LinkHost(Protocol):
    """The reactor, as its links see it."""

    #: Trio time at the beginning of the current turn.
    now: float
    #: Whether sent data is held back, to be flushed for all links in `touched` together.
    corked: bool
    touched: list["SocketLink"]

    def modify(self, fd: int, mask: int) -> None:
        """Change the events that epoll reports for a descriptor."""

    def remove(self, link: "SocketLink") -> None:
        """Remove a link that is about to close its socket."""

    def schedule(self, link: "SocketLink", due: float) -> None:
        """Schedule a check of a link's liveness at `due` (Trio time)."""

    def continue_deferred(self, link: "SocketLink") -> None:
        """Handle a link's deferred events, which waited while reading was paused."""

    def note_closed(self, link: "SocketLink") -> None:
        """Note that a link has ended; its handler is notified later, by a task."""

    def dispatch(self, link: "SocketLink", events: list[Event], plain: bool) -> None:
        """Pass parsed events to the link's handler; `plain`: all of them are binary messages."""


class SocketLink(Link):
    """A link of the reactor; see `Link`. It has no task of its own.

    Its backlog counts all bytes to be sent, including the frame heads.
    """

    __slots__ = (
        "_has_own_reader",
        "_held",
        "_out",
        "_reactor",
        "_send_failed",
        "deferred",
        "due",
        "fd",
        "mask",
        "max_messages_per_turn",
        "receive_bytes",
        "sock",
    )

    def __init__(self, reactor: LinkHost, sock: socket.socket, peer: str, limits: LinkLimits) -> None:
        super().__init__(peer, limits, is_client=False)
        self.fd = sock.fileno()
        self._reactor = reactor
        self.sock = sock
        #: Two pieces per frame, head and payload; the first piece may be the rest of one.
        self._out: list[bytes | memoryview] = []
        #: Whether queued data must not be sent at once: a flush is in progress or will follow, or sending has ended.
        self._held = False
        self.mask = READABLE
        self.due = NEVER
        #: Whether sending has failed; data that the peer sent before may still be unread.
        self._send_failed = False
        self._has_own_reader = False
        #: Parsed events that are handled in a later turn.
        self.deferred: list[Event] = []
        #: Limits of one turn, so that a peer that sends much does not delay the others.
        self.receive_bytes = CLIENT_RECEIVE_BYTES
        self.max_messages_per_turn = CLIENT_MESSAGES

    def use_bulk_mode(self) -> None:
        """Use the limits of a worker, and leave reading to `Reactor.serve_worker_link`."""
        self.receive_bytes, self.max_messages_per_turn = RECEIVE_BYTES, WORKER_MESSAGES
        self._has_own_reader = True
        self.set_events(self.mask & ~READABLE)

    def leave_bulk_mode(self) -> None:
        """Let the reactor read the link again, for the last messages and the close frame."""
        self._has_own_reader = False
        if not (self.reading_paused or self.deferred):
            self.set_events(self.mask | READABLE)

    # -- sending ---------------------------------------------------------------------------------------------

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """See `Link`; the frames are sent together."""
        if self.end_kind is not None or self.closing is not None:
            self._check()
        if len(frames) == 1:
            data = frames[0]
            head = BINARY_HEADS[len(data)]
            size, sent = len(head) + len(data), 0
            if not (self._held or self._reactor.corked):  # nothing is queued before it, and nothing will join it
                try:
                    sent = self.sock.sendmsg((head, data))
                except BlockingIOError:
                    pass
                except OSError:
                    self._on_send_failed()
                    return
                self.taken_at = self._reactor.now
                if sent == size:
                    return
            self._out += (head, data)
            if sent:
                self._drop_sent(sent)
            self.backlog_bytes += size - sent
        else:
            heads = [BINARY_HEADS[size] for size in map(len, frames)]
            self._out.extend(chain.from_iterable(zip(heads, frames, strict=True)))
            self.backlog_bytes += sum(map(len, heads)) + sum(map(len, frames))
        if self.backlog_bytes > self._limits.max_backlog_bytes:
            self._stall(f"{self.peer} does not read: {self.backlog_bytes} bytes are waiting to be sent")
            self._check()
        self._send_or_defer()

    def _put(self, data: bytes) -> None:
        self._queue(BINARY_HEADS[len(data)], data)

    def _put_control(self, opcode: int, payload: bytes) -> None:
        if self._held or self._reactor.corked or opcode == CLOSE:  # `flush` does what must follow a close frame
            self.send_frame(opcode, payload)
            return
        frame = CONTROL_HEADS[opcode, len(payload)] + payload
        try:
            sent = self.sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._on_send_failed()
            return
        self.taken_at = self._reactor.now
        if sent < len(frame):
            self._queue(memoryview(frame)[sent:], b"")

    def send_frame(self, opcode: int, payload: bytes) -> None:
        """Queue a frame of any kind, whatever the state of the link."""
        self._queue(frame_head(opcode, len(payload)), payload)

    def _queue(self, head: bytes | memoryview, payload: bytes) -> None:
        self._out += (head, payload)
        self.backlog_bytes += len(head) + len(payload)
        if len(self._out) > MAX_QUEUED_PIECES and self.end_kind is None and self.closing is None:
            self._stall(f"{self.peer} does not read: {len(self._out) // 2} messages are waiting to be sent")
            return
        self._send_or_defer()

    def _send_or_defer(self) -> None:
        """Send now, unless a flush is in progress or will follow."""
        if not self._held:
            self._held = True
            reactor = self._reactor
            if reactor.corked:
                reactor.touched.append(self)
            else:
                self.flush()
        elif self._send_failed:
            self._out.clear()
            self.backlog_bytes = 0

    def flush(self) -> None:
        """Send what the kernel accepts; if data is left, epoll reports when more can be sent."""
        out = self._out
        while out:
            pieces = out if len(out) <= MAX_PIECES else out[:MAX_PIECES]
            try:
                sent = self.sock.sendmsg(pieces)
            except BlockingIOError:
                if not self.mask & WRITABLE:  # the stall timeout begins now, and not with the last send
                    self.taken_at, self._waiting_bytes = self._reactor.now, 0
                    self.set_events(self.mask | WRITABLE)
                return
            except OSError:
                self._on_send_failed()
                return
            self.taken_at = self._reactor.now
            if sent == self.backlog_bytes:
                out.clear()
            else:
                self._drop_sent(sent)
            if self._changed is None and self.backlog_bytes <= self._low_water:
                self.backlog_bytes -= sent  # nothing waits for the backlog to fall
            else:
                self._on_sent(sent)
        self._held = self.stopped or self._send_failed
        if self.mask & WRITABLE:
            self.set_events(self.mask & ~WRITABLE)
        if self.end_kind is not None:
            self._finish_sending()
        elif self.closing is not None:
            self._close_frame_out()

    def _on_send_failed(self) -> None:
        """Stop sending to a peer that has disconnected; its last messages may still be unread, so reading goes on."""
        self._send_failed = self._held = True
        self._out.clear()
        self.backlog_bytes = 0
        self.set_events(self.mask & ~WRITABLE)
        if self.end_kind is not None:
            self._cut()
            return
        self._close_by = min(self._close_by, trio.current_time() + CLOSE_S)
        self.schedule(self._close_by)

    def _on_sent(self, size: int) -> None:
        try:
            super()._on_sent(size)
        except Exception:  # raised by a callback that waits for the backlog to drain, not by the caller
            log.exception(INTERNAL_LOG, peer=self.peer)
            self.abort(INTERNAL_MESSAGE)

    def _drop_sent(self, sent: int) -> None:
        complete = 0
        for piece in self._out:
            if len(piece) > sent:
                break
            sent -= len(piece)
            complete += 1
        del self._out[:complete]
        if sent:
            self._out[0] = memoryview(self._out[0])[sent:]

    def _drop_unsent(self) -> None:
        out = self._out
        begun = len(out) & 1 or (2 if out and isinstance(out[0], memoryview) else 0)
        del out[begun:]
        self.backlog_bytes = sum(map(len, out))

    # -- the reactor -----------------------------------------------------------------------------------------

    def send_handshake(self, data: bytes) -> None:
        """Send the handshake response; must be called before any frame is sent."""
        self._queue(data, b"")

    def feed_early(self, data: bytes) -> None:
        """Process bytes that were received behind the handshake; the handler must be set."""
        parser = self.parser
        parser.feed(data)
        if parser.events:
            plain = parser.all_binary
            self._reactor.dispatch(self, parser.pop_events(), plain)

    def set_events(self, mask: int) -> None:
        """Set the events that epoll reports; never `READABLE` while the link has a reader of its own."""
        if self._has_own_reader:
            mask &= ~READABLE
        if not self.stopped and mask != self.mask:
            self.mask = mask
            self._reactor.modify(self.fd, mask)

    def _add_to_inbox(self, cost: int) -> None:
        super()._add_to_inbox(cost)
        if self.reading_paused:
            self.set_events(self.mask & ~READABLE)

    def _resume_reading(self) -> None:
        if self.deferred:
            self._reactor.continue_deferred(self)
        else:
            self.set_events(self.mask | READABLE)
        self._wake()

    def _finish(self) -> None:
        if not self._out:
            self._finish_sending()

    def _finish_sending(self) -> None:
        """End a link that has sent everything. If the peer may have sent more, only sending ends, and reading goes on
        (RFC 6455 section 7.1.1): to close with unread bytes would reset the connection, and the peer could lose our
        close frame."""
        if not (self._lingers or self.parser.over):
            self._cut()
        elif not self.stopped:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._cut()

    def _cut(self) -> None:
        if not self.stopped:
            self.stopped = self._held = True
            self.deferred = []
            self._out.clear()
            self.backlog_bytes = 0
            self._release()
            self._reactor.remove(self)
            if self._has_own_reader:
                trio.lowlevel.notify_closing(self.fd)
            self.sock.close()
            self._wake()
            self._schedule_notify()

    def _schedule_notify(self) -> None:
        self._reactor.note_closed(self)

    def schedule(self, due: float) -> None:
        """Schedule a check of the link's liveness at `due` (Trio time)."""
        if due < self.due:
            self.due = due
            self._reactor.schedule(self, due)

    @property
    def _sending(self) -> bool:
        return bool(self._out)

    def _peer_acknowledges(self) -> bool:
        return peer_acknowledges(self.sock)

    def _in_kernel(self) -> int:
        return unsent_bytes(self.sock) or 0
