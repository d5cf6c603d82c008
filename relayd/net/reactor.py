"""The relay's data plane: every established socket in one epoll set, which one task serves.

A connection at rest has no task and no buffer: 5,000 of them are 5,000 small objects (docs/decisions/0015). The task
waits through Trio for the epoll set itself to become readable, and then serves what is ready without waiting: it
receives into one buffer that all share, parses, hands messages over, and sends what came of them. A send never waits
either: what the kernel does not take stays in the link's backlog until epoll says that there is room, so nothing that
is cancelled can cut a frame in half. Whatever is sent while the messages of one socket are handled is held back to
the end of them and leaves in one system call a link: the call costs 6 µs, a frame of 8 KiB more in it 0.5.
"""

import heapq
import select
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import chain

import structlog
import trio

from protocol.link.base import CLOSE_S, LATE_S, Link
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
#: Sockets served before the other tasks have their turn.
MAX_READY = 256
#: Buffers in one `sendmsg`; the kernel takes 1,024 (IOV_MAX).
MAX_PIECES = 512
#: Pieces that wait, two a message: what a peer that asks and never reads may have of tiny ones.
MAX_QUEUED_PIECES = 65_536
#: How late a ping may be, and a deadline be seen. A process that wakes from rest takes up to a millisecond, whatever it
#: does then.
SWEEP_S = 0.25

#: A fault of ours over one connection ends that one.
INTERNAL_LOG = "internal error in connection"
INTERNAL_MESSAGE = "the relay made a mistake; see its log"
_IN, _OUT, _HUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR
_NEVER = float("inf")


class SocketLink(Link):
    """A link of the plane. See `Link`; nothing of it is a task.

    Its backlog counts bytes as they go out, what stands before the messages included.
    """

    __slots__ = (
        "_deferred",
        "_due",
        "_has_own_reader",
        "_held",
        "_mask",
        "_out",
        "_reactor",
        "_send_failed",
        "_sock",
        "_stopped",
        "fd",
        "max_messages_per_turn",
        "receive_bytes",
    )

    def __init__(self, reactor: "Reactor", sock: socket.socket, peer: str, limits: LinkLimits) -> None:
        super().__init__(peer, limits, is_client=False)
        self.fd = sock.fileno()
        self._reactor = reactor
        self._sock = sock
        #: Two for each frame, head and payload; the first may be the rest of one.
        self._out: list[bytes | memoryview] = []
        #: What is queued is not to be sent by who queues it: a flush is under way or will come, or none ever will.
        self._held = False
        self._mask = _IN
        self._due = _NEVER
        self._stopped = False
        #: The kernel takes nothing more; what the peer sent before may still wait to be read.
        self._send_failed = False
        self._has_own_reader = False
        #: What was parsed, and is handed over in a later turn.
        self._deferred: list[Event] = []
        #: Of what is received and of what is handed over in one turn: who asks for much at once waits for others.
        self.receive_bytes = CLIENT_RECEIVE_BYTES
        self.max_messages_per_turn = CLIENT_MESSAGES

    def use_bulk_mode(self) -> None:
        """It is a worker: what it sends is passed on in large pieces, and `Reactor.serve_worker_link` reads it."""
        self.receive_bytes, self.max_messages_per_turn = RECEIVE_BYTES, WORKER_MESSAGES
        self._has_own_reader = True
        self._wait_for(self._mask & ~_IN)

    def leave_bulk_mode(self) -> None:
        """It is not attended any more: its last words and its close frame are read as anybody's."""
        self._has_own_reader = False
        if not (self._reader_waits or self._deferred):
            self._wait_for(self._mask | _IN)

    # -- sending ---------------------------------------------------------------------------------------------

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """See `Link`: they leave together."""
        if self._gone is not None or self._closing is not None:
            self._check()
        if len(frames) == 1:
            data = frames[0]
            head = BINARY_HEADS[len(data)]
            size, sent = len(head) + len(data), 0
            if not (self._held or self._reactor.corked):  # nothing goes before it, and nothing will come with it
                try:
                    sent = self._sock.sendmsg((head, data))
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
            sent = self._sock.send(frame)
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
        if len(self._out) > MAX_QUEUED_PIECES and self._gone is None and self._closing is None:
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
                taken = self._sock.sendmsg(pieces)
            except BlockingIOError:
                if not self._mask & _OUT:  # since now, and not since it last took something
                    self.taken_at, self._waiting_bytes = self._reactor.now, 0
                    self._wait_for(self._mask | _OUT)
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
        self._held = self._stopped or self._send_failed
        if self._mask & _OUT:
            self._wait_for(self._mask & ~_OUT)
        if self._gone is not None:
            self._finish_sending()
        elif self._closing is not None:
            self._close_frame_out()

    def _on_send_failed(self) -> None:
        """The peer is gone; its last words, and its close frame, may wait in the kernel: the reader finds the end."""
        self._send_failed = self._held = True
        self._out.clear()
        self.backlog_bytes = 0
        self._wait_for(self._mask & ~_OUT)
        if self._gone is not None:
            self._cut()
            return
        self._close_by = min(self._close_by, trio.current_time() + CLOSE_S)
        self._schedule(self._close_by)

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

    # -- its place in the plane ------------------------------------------------------------------------------

    def send_handshake(self, data: bytes) -> None:
        """Send the answer to the handshake, before any frame."""
        self._queue(data, b"")

    def feed_early(self, data: bytes) -> None:
        """Hand over what came behind the handshake, to who takes messages by now."""
        parser = self._parser
        parser.feed(data)
        if parser.events:
            plain = parser.all_binary
            self._reactor._hand_over(self, parser.pop_events(), plain)

    def _wait_for(self, mask: int) -> None:
        if self._has_own_reader:
            mask &= ~_IN
        if not self._stopped and mask != self._mask:
            self._mask = mask
            self._reactor.modify(self.fd, mask)

    def _add_to_inbox(self, cost: int) -> None:
        super()._add_to_inbox(cost)
        if self._reader_waits:
            self._wait_for(self._mask & ~_IN)

    def _resume_reading(self) -> None:
        self._wait_for(self._mask | _IN)

    def _finish(self) -> None:
        if not self._out:
            self._finish_sending()

    def _finish_sending(self) -> None:
        """All that was to be said is out. Where the peer may have said more, it is read on (RFC 6455 section 7.1.1):
        closing over unread bytes resets the connection, and our close frame could be lost."""
        if not (self._lingers or self._parser.over):
            self._cut()
        elif not self._stopped:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._cut()

    def _cut(self) -> None:
        if not self._stopped:
            self._stopped = self._held = True
            self._deferred = []
            self._out.clear()
            self.backlog_bytes = 0
            self._release()
            self._reactor.remove(self)
            if self._has_own_reader:
                trio.lowlevel.notify_closing(self.fd)
            self._sock.close()
            self._wake()
            self._schedule_notify()

    def _schedule_notify(self) -> None:
        self._reactor.note_closed(self)

    def _schedule(self, due: float) -> None:
        if due < self._due:
            self._due = due
            self._reactor.schedule(self, due)

    @property
    def stopped(self) -> bool:
        """See `Link`."""
        return self._stopped

    @property
    def _sending(self) -> bool:
        return bool(self._out)

    def _peer_acknowledges(self) -> bool:
        return peer_acknowledges(self._sock)

    def _in_kernel(self) -> int:
        return unsent_bytes(self._sock) or 0


class Reactor:
    """All of the relay's plain sockets; made by `open_reactor`.

    Attributes:
        now: Trio time at the beginning of what is being done.
        corked: whether what is sent is held back, for `touched` to be flushed together.
        touched: links with something held back.
    """

    def __init__(self) -> None:
        self._time = trio.lowlevel.current_clock().current_time  # `trio.current_time` takes three times as long
        self.now = self._time()
        self.corked = False
        self.touched: list[SocketLink] = []
        self._links: dict[int, SocketLink] = {}
        self._epoll = select.epoll()
        self._scratch = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._scratch)
        #: Times at which to look, and the descriptors of the links: one that is gone is not kept until its time comes.
        self._dues: list[tuple[float, int]] = []
        self._ended: dict[SocketLink, None] = {}
        #: Links of which messages wait to be handed over.
        self._carrying: list[SocketLink] = []
        self._some_carried = trio.Event()
        self._some_ended = trio.Event()
        self._some = trio.Event()

    def register(
        self,
        stream: trio.SocketStream,
        peer: str,
        limits: LinkLimits,
        answer: bytes = b"",
        *,
        max_message_bytes: int | None = None,
    ) -> SocketLink:
        """A link over a socket whose handshake is done; the stream is empty-handed from now on.

        What came behind the handshake is for `SocketLink.feed_early`, once a handler is there for it.

        Args:
            stream: whose socket it is.
            peer: who it is, for people.
            rules: what the peer is held to.
            answer: to its handshake, where it still has to be sent.
            max_message_bytes: as `Link.set_max_message_bytes`.
        """
        its = stream.socket
        trio.lowlevel.notify_closing(its.fileno())  # Trio forgets the descriptor, which lives on here
        sock = socket.socket(its.family, socket.SOCK_STREAM, 0, its.detach())
        sock.setblocking(False)
        self.now = trio.current_time()
        link = SocketLink(self, sock, peer, limits)
        try:
            self._epoll.register(link.fd, _IN)
        except OSError:
            sock.close()
            raise
        self._links[link.fd] = link
        link._schedule(link.check_liveness(self.now))
        self._some.set()
        if max_message_bytes is not None:
            link.set_max_message_bytes(max_message_bytes)
        if answer:
            link.send_handshake(answer)
        return link

    @property
    def links(self) -> list[SocketLink]:
        """All that are connected."""
        return list(self._links.values())

    def modify(self, fd: int, mask: int) -> None:
        """Have epoll tell of other events."""
        self._epoll.modify(fd, mask)

    def remove(self, link: SocketLink) -> None:
        """A link is about to close its socket."""
        del self._links[link.fd]
        self._epoll.unregister(link.fd)

    def note_closed(self, link: SocketLink) -> None:
        """A link is on its way out: whoever takes its messages is told, by a task, and not in the middle of a send."""
        self._ended[link] = None
        self._some_ended.set()

    def schedule(self, link: SocketLink, due: float) -> None:
        """Have a link looked at."""
        heapq.heappush(self._dues, (due, link.fd))

    # -- the tasks -------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Serve what is ready, until cancelled."""
        poll, links, fd_of_all = self._epoll.poll, self._links, self._epoll.fileno()
        while True:
            await trio.lowlevel.wait_readable(fd_of_all)
            ready = poll(0, MAX_READY)
            self.now = self._time()
            for fd, event in ready:
                link = links.get(fd)
                if link is None:
                    continue  # it ended a moment ago
                try:
                    if event & _OUT:
                        link.flush()
                    if event & ~_OUT and not link._stopped:
                        self._receive(link, event)
                except Exception:
                    log.exception(INTERNAL_LOG, peer=link.peer)
                    link.abort(INTERNAL_MESSAGE)
            link = None  # it may be gone by now, and must not be kept for as long as nothing comes

    async def serve_deferred(self) -> None:
        """Hand over what was too much for one turn, a turn's worth of each link at a time, until cancelled."""
        while True:
            if not self._carrying:
                self._some_carried = trio.Event()
                await self._some_carried.wait()
            await trio.lowlevel.checkpoint()
            self._carry_on_once()

    def _carry_on_once(self) -> None:
        self.now = self._time()
        carrying, self._carrying = self._carrying, []
        for link in carrying:
            try:
                self._go_on(link)
            except Exception:
                log.exception(INTERNAL_LOG, peer=link.peer)
                link.abort(INTERNAL_MESSAGE)

    async def serve_worker_link(
        self, link: SocketLink, pass_on: Callable[[bytes], bool], on_fault: Callable[[], None]
    ) -> None:
        """Read a trusted link until its end; a task of the connection's. Cancelled, it leaves that to the plane.

        A worker sends all day, and has a task anyway: waiting for its socket alone saves a system call, and a look at
        all the others, for each frame that comes by itself.

        Args:
            link: a worker's.
            pass_on: is offered each message that comes by itself, as audio at the speed of speech does; what it sends
                leaves at once. Where it returns False, the message goes to the link's taker.
            on_fault: called where that broke: to tell the peer, and close.
        """
        now, wait_readable, fd = self._time, trio.lowlevel.wait_readable, link.fd
        try:
            while not link._stopped:
                await wait_readable(fd)
                while link._deferred:
                    await trio.lowlevel.checkpoint()
                self.now = now()
                try:
                    if not link._stopped:
                        self._receive(link, 0, pass_on)
                except Exception:
                    log.exception(INTERNAL_LOG, peer=link.peer)
                    on_fault()
        except trio.ClosedResourceError:
            return
        finally:
            link.leave_bulk_mode()

    def _receive(self, link: SocketLink, event: int, pass_on: Callable[[bytes], bool] | None = None) -> None:
        """Receive once, and hand over what is whole."""
        if link._reader_waits or link._deferred:
            if event & _HUP and not link._deferred:
                link._lost()
            return
        parser = link._parser
        large, kept = parser.large_frame, len(parser.partial_frame)
        try:
            if large is not None:
                count = link._sock.recv_into(memoryview(large)[parser.large_at :])
            elif kept:
                self._scratch[:kept] = parser.partial_frame
                count = link._sock.recv_into(self._view[kept : kept + link.receive_bytes])
            else:
                count = link._sock.recv_into(self._scratch, link.receive_bytes)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            link._lost()
            return
        link.received_at = self.now
        if large is None:
            if not kept:
                if pass_on is None:
                    data = parser.parse_single_pong(self._scratch, self._view, count)
                    if data is not None:  # a connection at rest says nothing else
                        link._on_pong(data)
                        return
                else:
                    data = parser.parse_single(self._scratch, self._view, count)
                    if data is not None:
                        if link._gone is not None or link._closing is not None or not pass_on(data):
                            self._hand_over(link, [data], plain=True)
                        return
            parser.parse(self._scratch, self._view, kept + count)
        elif not parser.fill_large(count):
            return
        if parser.events:
            events, plain = parser.events, parser.all_binary
            parser.events, parser.all_binary = [], True
            self._hand_over(link, events, plain)

    def _go_on(self, link: SocketLink) -> None:
        """Hand over what was left for a later turn."""
        events, link._deferred = link._deferred, []
        if not link._stopped:
            if not link._reader_waits:
                link._wait_for(link._mask | _IN)
            self._hand_over(link, events, plain=False)

    def _hand_over(self, link: SocketLink, events: list[Event], plain: bool) -> None:
        """Hand over what was parsed, or as much of it as is a turn's; what is sent meanwhile leaves together."""
        if len(events) > link.max_messages_per_turn and link._handler is not None:
            link._deferred, events = events[link.max_messages_per_turn :], events[: link.max_messages_per_turn]
            link._wait_for(link._mask & ~_IN)
            self._carrying.append(link)
            self._some_carried.set()
        handler = link._handler
        self.corked = True
        try:
            if plain and handler is not None and link._gone is None and link._closing is None:
                handler.on_messages(events)  # type: ignore[arg-type]  # plain: bytes alone
            else:
                link._process_events(events)
        finally:
            self.corked = False
            for each in self.touched:
                try:
                    each.flush()
                except Exception:
                    log.exception(INTERNAL_LOG, peer=each.peer)
                    each.abort(INTERNAL_MESSAGE)
            self.touched.clear()

    async def serve_timers(self) -> None:
        """Look after pings and deadlines, until cancelled."""
        dues = self._dues
        while True:
            if not dues:
                self._some = trio.Event()
                await self._some.wait()
            began = trio.current_time()
            await trio.sleep(SWEEP_S)
            self.now = now = trio.current_time()
            if (late_s := now - began - SWEEP_S) > LATE_S:
                self._forgive(late_s)
            while dues and dues[0][0] <= now:
                due, fd = heapq.heappop(dues)
                link = self._links.get(fd)
                if link is None or due != link._due:
                    continue  # it is gone, or was looked at earlier
                link._due = _NEVER
                try:
                    link._schedule(link.check_liveness(now))
                except Exception:
                    log.exception(INTERNAL_LOG, peer=link.peer)
                    link.abort(INTERNAL_MESSAGE)
            link = None  # as in `serve`

    def _forgive(self, late_s: float) -> None:
        for link in self._links.values():
            link.extend_deadlines(late_s)

    async def serve_closed(self) -> None:
        """Tell of links' ends, until cancelled."""
        while True:
            await self._some_ended.wait()
            self._some_ended = trio.Event()
            self.notify_closed()

    def notify_closed(self) -> None:
        """Tell whoever takes the messages of links that have ended."""
        while self._ended:
            ended, self._ended = self._ended, {}
            for link in ended:
                try:
                    link.notify_closed()
                except Exception:
                    log.exception(INTERNAL_LOG, peer=link.peer)

    def close(self) -> None:
        """Cut all that is left."""
        for link in self.links:
            link.abort("the relay has stopped")
        self.notify_closed()
        self._epoll.close()


@asynccontextmanager
async def open_reactor() -> AsyncIterator[Reactor]:
    """A plane, served until the end of the block; what is still connected then is cut."""
    reactor = Reactor()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reactor.serve)
            nursery.start_soon(reactor.serve_deferred)
            nursery.start_soon(reactor.serve_timers)
            nursery.start_soon(reactor.serve_closed)
            yield reactor
            nursery.cancel_scope.cancel()
    finally:
        reactor.close()
