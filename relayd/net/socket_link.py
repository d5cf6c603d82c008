"""A link over one of the relay's sockets: it sends what the kernel takes and leaves the rest to the reactor."""

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

log = structlog.get_logger("relayd.plane")


#: What is received at once, from whichever socket. What comes together is passed on together, and a call to send costs
#: far more than what is in it: with 1 MiB a saturated relay took a fifth more CPU for a frame, with 64 KiB half as much
#: again as with that.
RECEIVE_BYTES = 2 * 1024 * 1024
#: Of a client, which sends little but for its uploads: many small messages at once are many answers at once.
CLIENT_RECEIVE_BYTES = 64 * 1024


#: Messages handed over before others have their turn. A client's `spaces` takes 0.3 ms where there are many, and a
#: worker's frame 2 µs.
CLIENT_MESSAGES, WORKER_MESSAGES = 64, 4096
#: Buffers in one `sendmsg`; the kernel takes 1,024 (IOV_MAX).
MAX_PIECES = 512
#: Pieces that wait, two a message: what a peer that asks and never reads may have of tiny ones.
MAX_QUEUED_PIECES = 65_536
#: A fault of ours over one connection ends that one.
INTERNAL_LOG = "internal error in connection"
INTERNAL_MESSAGE = "internal error; see the relay's log"


READABLE, WRITABLE, HANG_UP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR
NEVER = float("inf")


class LinkHost(Protocol):
    """What a link needs of the reactor that serves it."""

    #: Trio time at the beginning of what is being done.
    now: float
    #: Whether what is sent is held back, to be flushed together with other links in `touched`.
    corked: bool
    touched: list["SocketLink"]

    def modify(self, fd: int, mask: int) -> None:
        """Have epoll report other events."""

    def remove(self, link: "SocketLink") -> None:
        """A link is about to close its socket."""

    def schedule(self, link: "SocketLink", due: float) -> None:
        """Have a link looked at by `due` (Trio time)."""

    def note_closed(self, link: "SocketLink") -> None:
        """A link has ended; its handler is notified later, by a task."""

    def dispatch(self, link: "SocketLink", events: list[Event], plain: bool) -> None:
        """Hand parsed events over; `plain`: all of them are binary messages."""


class SocketLink(Link):
    """A link of the reactor. See `Link`; nothing of it is a task.

    Its backlog counts bytes as they go out, what stands before the messages included.
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
        #: Two for each frame, head and payload; the first may be the rest of one.
        self._out: list[bytes | memoryview] = []
        #: What is queued is not to be sent by who queues it: a flush is under way or will come, or none ever will.
        self._held = False
        self.mask = READABLE
        self.due = NEVER
        #: The kernel takes nothing more; what the peer sent before may still wait to be read.
        self._send_failed = False
        self._has_own_reader = False
        #: What was parsed, and is handed over in a later turn.
        self.deferred: list[Event] = []
        #: Of what is received and of what is handed over in one turn: who asks for much at once waits for others.
        self.receive_bytes = CLIENT_RECEIVE_BYTES
        self.max_messages_per_turn = CLIENT_MESSAGES

    def use_bulk_mode(self) -> None:
        """It is a worker: what it sends is passed on in large pieces, and `Reactor.serve_worker_link` reads it."""
        self.receive_bytes, self.max_messages_per_turn = RECEIVE_BYTES, WORKER_MESSAGES
        self._has_own_reader = True
        self.set_events(self.mask & ~READABLE)

    def leave_bulk_mode(self) -> None:
        """It is not attended any more: its last words and its close frame are read as anybody's."""
        self._has_own_reader = False
        if not (self.reading_paused or self.deferred):
            self.set_events(self.mask | READABLE)

    # -- sending ---------------------------------------------------------------------------------------------

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """See `Link`: they leave together."""
        if self.end_kind is not None or self.closing is not None:
            self._check()
        if len(frames) == 1:
            data = frames[0]
            head = BINARY_HEADS[len(data)]
            size, sent = len(head) + len(data), 0
            if not (self._held or self._reactor.corked):  # nothing goes before it, and nothing will come with it
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
            self._stall(f"{self.backlog_bytes} bytes wait for {self.peer} to take them")
            self._check()
        self._send_or_defer()

    def _put(self, data: bytes) -> None:
        self._queue(BINARY_HEADS[len(data)], data)

    def _put_control(self, opcode: int, payload: bytes) -> None:
        if self._held or self._reactor.corked or opcode == CLOSE:  # what follows a close frame is `flush`'s to do
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
            self._stall(f"{len(self._out) // 2} messages wait for {self.peer} to take them")
            return
        self._send_or_defer()

    def _send_or_defer(self) -> None:
        """Send, unless somebody is about to."""
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
        """Send what the kernel takes, and have epoll tell when it takes more."""
        out = self._out
        while out:
            pieces = out if len(out) <= MAX_PIECES else out[:MAX_PIECES]
            try:
                taken = self.sock.sendmsg(pieces)
            except BlockingIOError:
                if not self.mask & WRITABLE:  # since now, and not since it last took something
                    self.taken_at, self._waiting_bytes = self._reactor.now, 0
                    self.set_events(self.mask | WRITABLE)
                return
            except OSError:
                self._on_send_failed()
                return
            self.taken_at = self._reactor.now
            if taken == self.backlog_bytes:
                out.clear()
            else:
                self._drop_sent(taken)
            if self._changed is None and self.backlog_bytes <= self._low_water:
                self.backlog_bytes -= taken  # nobody waits for it to fall so far
            else:
                self._on_sent(taken)
        self._held = self.stopped or self._send_failed
        if self.mask & WRITABLE:
            self.set_events(self.mask & ~WRITABLE)
        if self.end_kind is not None:
            self._finish_sending()
        elif self.closing is not None:
            self._close_frame_out()

    def _on_send_failed(self) -> None:
        """The peer is gone; its last words, and its close frame, may wait in the kernel: the reader finds the end."""
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
        except Exception:  # of who waits for it to drain, and not of who sends just now
            log.exception(INTERNAL_LOG, peer=self.peer)
            self.abort(INTERNAL_MESSAGE)

    def _drop_sent(self, taken: int) -> None:
        whole = 0
        for piece in self._out:
            if len(piece) > taken:
                break
            taken -= len(piece)
            whole += 1
        del self._out[:whole]
        if taken:
            self._out[0] = memoryview(self._out[0])[taken:]

    def _drop_unsent(self) -> None:
        out = self._out
        begun = len(out) & 1 or (2 if out and isinstance(out[0], memoryview) else 0)
        del out[begun:]
        self.backlog_bytes = sum(map(len, out))

    # -- its place in the reactor ------------------------------------------------------------------------------

    def send_handshake(self, data: bytes) -> None:
        """Send the answer to the handshake, before any frame."""
        self._queue(data, b"")

    def feed_early(self, data: bytes) -> None:
        """Hand over what came behind the handshake, to who takes messages by now."""
        parser = self.parser
        parser.feed(data)
        if parser.events:
            plain = parser.all_binary
            self._reactor.dispatch(self, parser.pop_events(), plain)

    def set_events(self, mask: int) -> None:
        """Have epoll report these events; a link with a reader of its own is not read by the reactor."""
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
        self.set_events(self.mask | READABLE)

    def _finish(self) -> None:
        if not self._out:
            self._finish_sending()

    def _finish_sending(self) -> None:
        """All that was to be said is out. Where the peer may have said more, it is read on (RFC 6455 section 7.1.1):
        closing over unread bytes resets the connection, and our close frame could be lost."""
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
        """Have liveness checked by `due` (Trio time)."""
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
