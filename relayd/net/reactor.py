"""The relay's reactor: every established plain socket in one epoll set, which one task serves.

An idle connection has no task and no buffer: 5,000 of them are 5,000 small objects (docs/decisions/0015). The task
waits through Trio for the epoll set itself to become readable, and then serves the ready sockets without waiting: it
receives into one shared buffer, parses, passes messages to their handlers, and sends the results. A send never waits
either: bytes that the kernel does not accept stay in the link's backlog until epoll reports that there is room, so a
cancellation cannot cut a frame in half. Data that is sent while the messages of one socket are handled is held back
until all are handled and is then sent with one system call per link: the call costs 6 µs, another frame of 8 KiB in it
only 0.5 µs.
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

log = structlog.get_logger("relayd.reactor")

#: Sockets served in one turn, before other tasks run.
MAX_READY = 256
#: The interval between checks, and so the largest delay of a ping or a deadline. It is not shorter because each wake-up
#: of an idle process costs up to a millisecond.
SWEEP_S = 0.25


class Reactor:
    """Serves all of the relay's plain sockets; opened by `open_reactor`.

    Attributes:
        now: Trio time at the beginning of the current turn.
        corked: whether sent data is held back, to be flushed for all links in `touched` together.
        touched: links with data that is held back.
    """

    def __init__(self) -> None:
        self._time = trio.lowlevel.current_clock().current_time  # three times as fast as `trio.current_time`
        self.now = self._time()
        self.corked = False
        self.touched: list[SocketLink] = []
        self._links: dict[int, SocketLink] = {}
        self._epoll = select.epoll()
        self._scratch = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._scratch)
        #: (time of the next check, descriptor of the link); a descriptor, so that a closed link is not kept until then.
        self._dues: list[tuple[float, int]] = []
        self._ended: dict[SocketLink, None] = {}
        #: Links with messages that are handled in a later turn.
        self._deferred_links: list[SocketLink] = []
        self._some_deferred = trio.Event()
        self._some_ended = trio.Event()
        self._some_registered = trio.Event()

    def register(
        self,
        stream: trio.SocketStream,
        peer: str,
        limits: LinkLimits,
        answer: bytes = b"",
        *,
        max_message_bytes: int | None = None,
    ) -> SocketLink:
        """Make a link over a socket whose handshake is done; the socket is detached from the stream.

        Bytes that were received behind the handshake go to `SocketLink.feed_early`, once a handler is set.

        Args:
            stream: the stream whose socket is taken over.
            peer: the peer's address, for logs and messages.
            limits: limits and timeouts of the link.
            answer: the handshake response, if it still has to be sent.
            max_message_bytes: as for `Link.set_max_message_bytes`.

        Raises:
            OSError: the socket cannot be added to the epoll set.
        """
        trio_socket = stream.socket
        trio.lowlevel.notify_closing(trio_socket.fileno())  # Trio forgets the descriptor, which stays open here
        sock = socket.socket(trio_socket.family, socket.SOCK_STREAM, 0, trio_socket.detach())
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
        self._some_registered.set()
        if max_message_bytes is not None:
            link.set_max_message_bytes(max_message_bytes)
        if answer:
            link.send_handshake(answer)
        return link

    @property
    def links(self) -> list[SocketLink]:
        """All connected links."""
        return list(self._links.values())

    def modify(self, fd: int, mask: int) -> None:
        """Change the events that epoll reports for a descriptor."""
        self._epoll.modify(fd, mask)

    def remove(self, link: SocketLink) -> None:
        """Remove a link that is about to close its socket."""
        del self._links[link.fd]
        self._epoll.unregister(link.fd)

    def note_closed(self, link: SocketLink) -> None:
        """Note that a link has ended; `serve_closed` notifies its handler later, and not in the middle of a send."""
        self._ended[link] = None
        self._some_ended.set()

    def schedule(self, link: SocketLink, due: float) -> None:
        """Schedule a check of a link's liveness at `due` (Trio time)."""
        heapq.heappush(self._dues, (due, link.fd))

    # -- the tasks -------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Serve the sockets that are ready, until cancelled."""
        poll, links, epoll_fd = self._epoll.poll, self._links, self._epoll.fileno()
        while True:
            await trio.lowlevel.wait_readable(epoll_fd)
            ready = poll(0, MAX_READY)
            self.now = self._time()
            for fd, event in ready:
                link = links.get(fd)
                if link is None:
                    continue  # it was closed in this turn
                try:
                    if event & WRITABLE:
                        link.flush()
                    if event & ~WRITABLE and not link.stopped:
                        self._receive(link, event)
                except Exception:
                    log.exception(INTERNAL_LOG, peer=link.peer)
                    link.abort(INTERNAL_MESSAGE)
            link = None  # it may have ended, and must not be kept alive while nothing is received

    def continue_deferred(self, link: SocketLink) -> None:
        """Handle a link's deferred events, which waited while reading was paused."""
        self._deferred_links.append(link)
        self._some_deferred.set()

    async def serve_deferred(self) -> None:
        """Handle messages that exceeded the limit of a turn, one turn per link at a time, until cancelled."""
        while True:
            if not self._deferred_links:
                self._some_deferred = trio.Event()
                await self._some_deferred.wait()
            await trio.lowlevel.checkpoint()
            self._serve_deferred_once()

    def _serve_deferred_once(self) -> None:
        self.now = self._time()
        deferred_links, self._deferred_links = self._deferred_links, []
        for link in deferred_links:
            try:
                self._dispatch_deferred(link)
            except Exception:
                log.exception(INTERNAL_LOG, peer=link.peer)
                link.abort(INTERNAL_MESSAGE)

    async def serve_worker_link(
        self, link: SocketLink, pass_on: Callable[[bytes], bool], on_fault: Callable[[], None]
    ) -> None:
        """Read the link of a worker until its end, in a task of the connection.

        A worker sends often and its connection has a task anyway: waiting for this socket alone saves a system call
        for each frame that arrives by itself.

        Args:
            link: a worker's link, in bulk mode.
            pass_on: called with each message that arrives by itself, as audio does at the speed of speech; what it
                sends is sent at once. If it returns False, the message goes to the link's handler.
            on_fault: called after an unexpected exception; sends an error to the peer and closes the link.

        Cancellation:
            the reactor reads the link from then on.
        """
        now, wait_readable, fd = self._time, trio.lowlevel.wait_readable, link.fd
        try:
            while not link.stopped:
                await wait_readable(fd)
                if link.reading_paused:
                    await link.wait_reading()
                    continue
                if link.deferred:
                    await trio.lowlevel.checkpoint()
                    continue
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
        """Receive once, and dispatch the complete messages."""
        if link.reading_paused or link.deferred:
            if event & HANG_UP and (link.reading_paused or not link.deferred):
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
                    if data is not None:  # an idle connection sends nothing else
                        link.on_pong(data)
                        return
                else:
                    data = parser.parse_single(self._scratch, self._view, count)
                    if data is not None:
                        if link.end_kind is not None or link.closing is not None or not pass_on(data):
                            self.dispatch(link, [data], plain=True)
                        return
            if link.meter is not None:
                link.meter.begin()
            parser.parse(self._scratch, self._view, kept + count)
            if not parser.events and link.meter is not None:
                link.meter.end()
        elif not parser.fill_large(count):
            return
        if parser.events:
            events, plain = parser.events, parser.all_binary
            parser.events, parser.all_binary = [], True
            self.dispatch(link, events, plain)

    def _dispatch_deferred(self, link: SocketLink) -> None:
        """Dispatch the events that were left for a later turn."""
        if link.reading_paused:
            return  # `continue_deferred` is called when it is resumed
        events, link.deferred = link.deferred, []
        if not link.stopped:
            link.set_events(link.mask | READABLE)
            if link.meter is not None:
                link.meter.begin()
            self.dispatch(link, events, plain=False)

    def dispatch(self, link: SocketLink, events: list[Event], plain: bool) -> None:
        """Pass parsed events to the link's handler, up to the limit of a turn; sent data is flushed at the end.

        The turn of the link's meter ends before the flush: what a worker sends goes to the links of others.
        """
        if len(events) > link.max_messages_per_turn and link.handler is not None:
            link.deferred, events = events[link.max_messages_per_turn :], events[: link.max_messages_per_turn]
            link.set_events(link.mask & ~READABLE)
            self.continue_deferred(link)
        handler = link.handler
        self.corked = True
        try:
            if plain and handler is not None and link.end_kind is None and link.closing is None:
                handler.on_messages(events)  # type: ignore[arg-type]  # plain: only bytes
            else:
                link.process_events(events)
        finally:
            if link.meter is not None:  # another one since a login
                link.meter.end()
            self.corked = False
            for each in self.touched:
                try:
                    each.flush()
                except Exception:
                    log.exception(INTERNAL_LOG, peer=each.peer)
                    each.abort(INTERNAL_MESSAGE)
            self.touched.clear()

    async def serve_timers(self) -> None:
        """Send pings and check deadlines, until cancelled."""
        dues = self._dues
        while True:
            if not dues:
                self._some_registered = trio.Event()
                await self._some_registered.wait()
            began = trio.current_time()
            await trio.sleep(SWEEP_S)
            self.now = now = trio.current_time()
            if (late_s := now - began - SWEEP_S) > LATE_S:
                self._extend_deadlines(late_s)
            while dues and dues[0][0] <= now:
                due, fd = heapq.heappop(dues)
                link = self._links.get(fd)
                if link is None or due != link.due:
                    continue  # it has ended, or was checked earlier
                link.due = NEVER
                try:
                    link.schedule(link.check_liveness(now))
                except Exception:
                    log.exception(INTERNAL_LOG, peer=link.peer)
                    link.abort(INTERNAL_MESSAGE)
            link = None  # as in `serve`

    def _extend_deadlines(self, late_s: float) -> None:
        for link in self._links.values():
            link.extend_deadlines(late_s)

    async def serve_closed(self) -> None:
        """Notify the handlers of links that have ended, until cancelled."""
        while True:
            await self._some_ended.wait()
            self._some_ended = trio.Event()
            self.notify_closed()

    def notify_closed(self) -> None:
        """Notify the handlers of links that have ended."""
        while self._ended:
            ended, self._ended = self._ended, {}
            for link in ended:
                try:
                    link.notify_closed()
                except Exception:
                    log.exception(INTERNAL_LOG, peer=link.peer)

    def close(self) -> None:
        """Abort all links that are left."""
        for link in self.links:
            link.abort("the relay has stopped")
        self.notify_closed()
        self._epoll.close()


@asynccontextmanager
async def open_reactor() -> AsyncIterator[Reactor]:
    """Open a reactor and serve it until the end of the block; links that are still connected then are aborted."""
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
