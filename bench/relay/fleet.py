"""Workers and clients of each kind of relay, and the streams between them; the generator does the timing.

Those of relayd are in `relayd_fleet`.
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
    """The load of one round.

    Args:
        each: frames per stream.
        streams: number of streams, spread evenly over the workers.
        listeners: readers of each stream; more than one only if there is one stream.
        pcm_bytes: bytes of audio in a frame.
        interval_s: time between two frames of a stream; 0 sends as fast as they are accepted.
        window: most frames of a stream in flight, if there is no interval.
        flood: the first stream sends this many times the frames of the others in the same time, and does not count.
        stalled: the reader of that first stream does not read.
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
    """The ends of a stream; its name is the request's id."""

    name: str
    sender: Connection
    readers: Sequence[Connection]


class Fleet(abc.ABC):
    """Connections to one relay. They are kept, so that a round pays only for frames."""

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
        """Register a connection, to be closed at the end."""
        return self._open.enter_context(closing(connection))

    def close(self) -> None:
        """Close all connections."""
        self._open.close()

    @abc.abstractmethod
    def open_worker(self, number: int) -> Connection:
        """Open a worker's connection and make it ready."""

    @abc.abstractmethod
    def begin(self, load: Load) -> list[Route]:
        """Set up the streams of a round."""

    @abc.abstractmethod
    def end(self, routes: list[Route], load: Load) -> None:
        """End the streams."""

    @abc.abstractmethod
    def look_after(self) -> None:
        """Answer pings while other fleets have their rounds."""

    def round(self, load: Load) -> Round:
        """Run one round.

        Raises:
            Stuck: it did not finish, or frames were lost or mixed up.
        """
        before_s = self.server.cpu_s()
        routes = self.begin(load)
        streams = [self._stream(load, number, route) for number, route in enumerate(routes)]
        mode = PACED if load.interval_s else SATURATED
        # What a stream's first frame causes is not part of the cost of frames at the speed of speech.
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
        """The number of frames of a stream."""
        # One frame of the others less in time: the flood must have been sent when they have received everything.
        return (load.each - 1) * load.flood if load.flood and number == 0 else load.each


class RoutedFleet(Fleet):
    """For relays in which a stream is only a name: readers subscribe once by name."""

    def __init__(self, server: Server, most_streams: int = 50, workers: int = WORKERS) -> None:
        self._readers: dict[str, list[Connection]] = {}
        super().__init__(server, most_streams, workers)

    @abc.abstractmethod
    def open_reader(self, name: str) -> Connection:
        """Open a connection that receives all frames of this stream."""

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
        """See `Fleet`; nothing to do."""

    def look_after(self) -> None:
        """See `Fleet`."""
        for connection in [*self.workers, *(reader for readers in self._readers.values() for reader in readers)]:
            connection.take()


class WebSocketFleet(RoutedFleet):
    """For the minimal relays in `bench.relay.peers`."""

    def open_worker(self, number: int) -> Connection:
        """See `Fleet`."""
        return WebSocket(self.server.port, "/in")

    def open_reader(self, name: str) -> Connection:
        """See `RoutedFleet`."""
        return WebSocket(self.server.port, f"/out/{name}")


class SocketIoFleet(RoutedFleet):
    """For python-socketio: a stream is a room."""

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
    """Open a connection of Socket.IO (protocol 5 over Engine.IO 4), with its namespace joined."""
    sock = WebSocket(server.port, "/socket.io/?EIO=4&transport=websocket")
    _ask_socketio(sock, "40", b"40")
    return sock


def _ask_socketio(sock: WebSocket, text: str, answer: bytes) -> None:
    received: list[bytes] = []
    sock.on_message = received.append
    sock.send(message(text.encode(), frames.TEXT))
    sock.until(lambda: any(answered.startswith(answer) for answered in received))
    sock.on_message = lambda _message: None


class NatsFleet(RoutedFleet):
    """For nats-server: a stream is a subject."""

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
    """For HAProxy: each stream has its own connection, because a TCP proxy cannot route the frames of a worker."""

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
        assert behind is not None, "a proxy needs a server behind it"
        while len(self._pairs) < load.streams:
            sender = self.keep(self.open_worker(len(self._pairs)))
            self._pairs.append((sender, self.keep(Tcp.of_socket(behind.accept()[0]))))
        return [Route(f"{n:032x}", sender, [reader]) for n, (sender, reader) in enumerate(self._pairs[: load.streams])]

    def end(self, routes: list[Route], load: Load) -> None:
        """See `Fleet`; nothing to do."""

    def look_after(self) -> None:
        """See `Fleet`; there are no pings."""
