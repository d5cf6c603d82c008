"""Workers and clients of each kind of relay, and the streams between them; what is timed the generator does.

relayd's own are in `relayd_fleet`.
"""

import abc
from collections.abc import Sequence
from contextlib import ExitStack, closing

import attrs

from bench.relay import frames
from bench.relay.frames import SPEECH_BYTES, Wrapping, message, variants
from bench.relay.generator import PACED, SATURATED, Round, Stream, run_round
from bench.relay.servers import Server
from bench.relay.sockets import Connection, NatsLine, Tcp, WebSocket

WORKERS = 4


@attrs.frozen(kw_only=True)
class Load:
    """What one round carries.

    Args:
        each: frames of a stream.
        streams: spread evenly over the workers.
        listeners: readers of each stream; more than one only where there is one stream.
        pcm_bytes: of audio in a frame.
        interval_s: between two frames of a stream; 0 as fast as they are taken.
        window: frames of a stream on their way at most, where there is no interval.
        flood: the first stream has so many times the frames of the others, in the same time, and does not count.
        stalled: the reader of that first stream reads nothing.
    """

    each: int
    streams: int = 50
    listeners: int = 1
    pcm_bytes: int = SPEECH_BYTES
    interval_s: float = 0.0
    window: int = 64
    flood: int = 0
    stalled: bool = False


@attrs.define(eq=False)
class Route:
    """A stream's ends: its name is the request's id."""

    name: str
    sender: Connection
    readers: Sequence[Connection]


class Fleet(abc.ABC):
    """Connections to one relay. They last, so that a round pays for frames alone."""

    wrapping: Wrapping = frames.WEBSOCKET
    #: Number of a stream's first audio frame.
    first_seq = 0

    def __init__(self, server: Server, most_streams: int = 50, workers: int = WORKERS) -> None:
        self.server = server
        self.most_streams = most_streams
        self._open = ExitStack()
        self.workers: list[Connection] = []
        for number in range(workers):
            self.workers.append(self.keep(self.open_worker(number)))

    def keep(self, connection: Connection) -> Connection:
        """Look after a connection."""
        return self._open.enter_context(closing(connection))

    def close(self) -> None:
        """Hang up everywhere."""
        self._open.close()

    @abc.abstractmethod
    def open_worker(self, number: int) -> Connection:
        """A worker, ready."""

    @abc.abstractmethod
    def begin(self, load: Load) -> list[Route]:
        """Make the streams of a round, running."""

    @abc.abstractmethod
    def end(self, routes: list[Route], load: Load) -> None:
        """End them."""

    @abc.abstractmethod
    def look_after(self) -> None:
        """Between rounds of others: answer pings."""

    def round(self, load: Load) -> Round:
        """One round.

        Raises:
            Stuck: it did not come to its end, or frames were lost or mixed up.
        """
        before_s = self.server.cpu_s()
        routes = self.begin(load)
        streams = [self._stream(load, number, route) for number, route in enumerate(routes)]
        mode = PACED if load.interval_s else SATURATED
        # What a stream's first frame sets off is no part of what frames cost at the speed of speech.
        done = run_round(mode, streams, self.workers, [self.server.pid], lead_s=load.interval_s)
        self.end(routes, load)
        return attrs.evolve(done, whole_cpu_s=self.server.cpu_s() - before_s)

    def _stream(self, load: Load, number: int, route: Route) -> Stream:
        flooded = bool(load.flood) and number == 0
        count = self.frames_of(load, number)
        return Stream(
            route.sender,
            route.readers,
            variants(route.name, load.pcm_bytes, self.first_seq, count, self.wrapping),
            self.first_seq,
            count,
            load.interval_s / (load.flood if flooded else 1),
            load.interval_s * number / load.streams,
            window=0 if load.interval_s else load.window,
            quiet=flooded,
            stalled=flooded and load.stalled,
        )

    def frames_of(self, load: Load, number: int) -> int:
        """Frames of the stream of this number."""
        # One of the others' frames less in time: it must have been sent when they have all of theirs.
        return (load.each - 1) * load.flood if load.flood and number == 0 else load.each


class RoutedFleet(Fleet):
    """Where a stream is no more than a name: readers say once which is theirs."""

    def __init__(self, server: Server, most_streams: int = 50, workers: int = WORKERS) -> None:
        self._readers: dict[str, list[Connection]] = {}
        super().__init__(server, most_streams, workers)

    @abc.abstractmethod
    def open_reader(self, name: str) -> Connection:
        """A connection that gets all frames of this stream."""

    def begin(self, load: Load) -> list[Route]:
        """See `Fleet`."""
        routes = []
        for number in range(load.streams):
            name = f"{load.listeners:016x}{number:016x}"
            readers = self._readers.setdefault(name, [])
            while len(readers) < load.listeners:
                readers.append(self.keep(self.open_reader(name)))
            routes.append(Route(name, self.workers[number % len(self.workers)], readers))
        return routes

    def end(self, routes: list[Route], load: Load) -> None:
        """See `Fleet`: there is nothing to do."""

    def look_after(self) -> None:
        """See `Fleet`."""
        for connection in [*self.workers, *(reader for readers in self._readers.values() for reader in readers)]:
            connection.take()


class WebSocketFleet(RoutedFleet):
    """At the relays of a few lines of `bench.relay.peers`."""

    def open_worker(self, number: int) -> Connection:
        """See `Fleet`."""
        return WebSocket(self.server.port, "/in")

    def open_reader(self, name: str) -> Connection:
        """See `RoutedFleet`."""
        return WebSocket(self.server.port, f"/out/{name}")


class SocketIoFleet(RoutedFleet):
    """At python-socketio: a stream is a room."""

    wrapping = frames.SOCKETIO

    def open_worker(self, number: int) -> Connection:
        """See `Fleet`."""
        return open_socketio(self.server)

    def open_reader(self, name: str) -> Connection:
        """See `RoutedFleet`."""
        sock = open_socketio(self.server)
        _ask_socketio(sock, f'420["join","{name}"]', b"430")
        return sock


def open_socketio(server: Server) -> WebSocket:
    """A connection of Socket.IO (protocol 5 over Engine.IO 4), its namespace joined."""
    sock = WebSocket(server.port, "/socket.io/?EIO=4&transport=websocket")
    _ask_socketio(sock, "40", b"40")
    return sock


def _ask_socketio(sock: WebSocket, words: str, answer: bytes) -> None:
    heard: list[bytes] = []
    sock.on_message = heard.append
    sock.send(message(words.encode(), frames.TEXT))
    sock.until(lambda: any(told.startswith(answer) for told in heard))
    sock.on_message = lambda _message: None


class NatsFleet(RoutedFleet):
    """At nats-server: a stream is a subject."""

    wrapping = frames.NATS

    def open_worker(self, number: int) -> Connection:
        """See `Fleet`."""
        return NatsLine(self.server.port)

    def open_reader(self, name: str) -> Connection:
        """See `RoutedFleet`."""
        sock = NatsLine(self.server.port)
        sock.ask(f"SUB {name} 1\r\n".encode())
        return sock


class TcpFleet(Fleet):
    """Through HAProxy: each stream has a connection of its own, as there is nobody to part the frames of a worker."""

    wrapping = frames.TCP

    def __init__(self, server: Server, most_streams: int = 50) -> None:
        self._pairs: list[tuple[Connection, Connection]] = []
        super().__init__(server, most_streams, workers=0)

    def open_worker(self, number: int) -> Connection:
        """See `Fleet`."""
        return Tcp(self.server.port)

    def begin(self, load: Load) -> list[Route]:
        """See `Fleet`."""
        behind = self.server.behind
        assert behind is not None, "a proxy stands before somebody"
        while len(self._pairs) < load.streams:
            sender = self.keep(self.open_worker(len(self._pairs)))
            self._pairs.append((sender, self.keep(Tcp.of_socket(behind.accept()[0]))))
        return [Route(f"{n:032x}", sender, [reader]) for n, (sender, reader) in enumerate(self._pairs[: load.streams])]

    def end(self, routes: list[Route], load: Load) -> None:
        """See `Fleet`: there is nothing to do."""

    def look_after(self) -> None:
        """See `Fleet`: nobody sends pings."""
