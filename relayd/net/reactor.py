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
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
import trio

from protocol.link.limits import LinkLimits
from protocol.link.liveness import LATE_S
from protocol.link.websocket_frames import Event
from relayd.net.socket_link import (
    HANG_UP,
    INTERNAL_LOG,
    INTERNAL_MESSAGE,
    NEVER,
    READABLE,
    RECEIVE_BYTES,
    WRITABLE,
    SocketLink,
)

log = structlog.get_logger("relayd.plane")

#: Sockets served before the other tasks have their turn.
MAX_READY = 256
#: How late a ping may be, and a deadline be seen. A process that wakes from rest takes up to a millisecond, whatever it
#: does then.
SWEEP_S = 0.25


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
            self._epoll.register(link.fd, READABLE)
        except OSError:
            sock.close()
            raise
        self._links[link.fd] = link
        link.schedule(link.check_liveness(self.now))
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
                    if event & WRITABLE:
                        link.flush()
                    if event & ~WRITABLE and not link.stopped:
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
        """Read a trusted link until its end; a task of the connection's. Cancelled, it leaves that to the reactor.

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
            while not link.stopped:
                await wait_readable(fd)
                while link.deferred:
                    await trio.lowlevel.checkpoint()
                self.now = now()
                try:
                    if not link.stopped:
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
        if link.reading_paused or link.deferred:
            if event & HANG_UP and not link.deferred:
                link.lose()
            return
        parser = link.parser
        large, kept = parser.large_frame, len(parser.partial_frame)
        try:
            if large is not None:
                count = link.sock.recv_into(memoryview(large)[parser.large_at :])
            elif kept:
                self._scratch[:kept] = parser.partial_frame
                count = link.sock.recv_into(self._view[kept : kept + link.receive_bytes])
            else:
                count = link.sock.recv_into(self._scratch, link.receive_bytes)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            link.lose()
            return
        link.received_at = self.now
        if large is None:
            if not kept:
                if pass_on is None:
                    data = parser.parse_single_pong(self._scratch, self._view, count)
                    if data is not None:  # a connection at rest says nothing else
                        link.on_pong(data)
                        return
                else:
                    data = parser.parse_single(self._scratch, self._view, count)
                    if data is not None:
                        if link.end_kind is not None or link.closing is not None or not pass_on(data):
                            self.dispatch(link, [data], plain=True)
                        return
            parser.parse(self._scratch, self._view, kept + count)
        elif not parser.fill_large(count):
            return
        if parser.events:
            events, plain = parser.events, parser.all_binary
            parser.events, parser.all_binary = [], True
            self.dispatch(link, events, plain)

    def _go_on(self, link: SocketLink) -> None:
        """Hand over what was left for a later turn."""
        events, link.deferred = link.deferred, []
        if not link.stopped:
            if not link.reading_paused:
                link.set_events(link.mask | READABLE)
            self.dispatch(link, events, plain=False)

    def dispatch(self, link: SocketLink, events: list[Event], plain: bool) -> None:
        """Hand over what was parsed, or as much of it as is a turn's; what is sent meanwhile leaves together."""
        if len(events) > link.max_messages_per_turn and link.handler is not None:
            link.deferred, events = events[link.max_messages_per_turn :], events[: link.max_messages_per_turn]
            link.set_events(link.mask & ~READABLE)
            self._carrying.append(link)
            self._some_carried.set()
        handler = link.handler
        self.corked = True
        try:
            if plain and handler is not None and link.end_kind is None and link.closing is None:
                handler.on_messages(events)  # type: ignore[arg-type]  # plain: bytes alone
            else:
                link.process_events(events)
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
                if link is None or due != link.due:
                    continue  # it is gone, or was looked at earlier
                link.due = NEVER
                try:
                    link.schedule(link.check_liveness(now))
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
    """A reactor, served until the end of the block; what is still connected then is cut."""
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
