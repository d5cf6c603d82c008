"""The load: workers that send and clients that receive, all in one process and one epoll loop."""

import abc
import secrets
import select
import time
from collections.abc import Callable
from contextlib import ExitStack, closing

import attrs

from bench import frames
from bench.rawsocket import RawSocket
from bench.servers import SPACE, Server
from protocol.codec import decode, encode
from protocol.messages import (
    FROM_RELAY,
    PATH,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    Accepted,
    Ack,
    Assign,
    AudioFormat,
    Completed,
    Hello,
    Message,
    Queued,
    Register,
    Registered,
    Started,
    Submit,
    Welcome,
)

#: A round that takes longer is not slow but stuck.
ROUND_S = 60.0
#: Frames handed to a socket before the others get their turn.
BURST = 4
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT


@attrs.define(eq=False)
class Stream:
    """One stream of a round: a worker's end and a client's."""

    request_id: str
    worker: RawSocket | None = None
    sent: int = 0
    received: int = 0
    source: frames.Frames = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.source = frames.Frames(self.request_id)


@attrs.frozen
class Round:
    """What one round took."""

    frames: int
    wall_s: float
    relay_cpu_s: float
    load_cpu_s: float
    #: From each frame's send to its being read, ascending.
    latencies_us: tuple[float, ...]

    @property
    def frames_a_second(self) -> float:
        """Throughput."""
        return self.frames / self.wall_s

    @property
    def cpu_us_a_frame(self) -> float:
        """CPU of the relay's process alone."""
        return 1e6 * self.relay_cpu_s / self.frames

    def latency_us(self, quantile: float) -> float:
        """The latency that this part of the frames keeps below."""
        return self.latencies_us[min(len(self.latencies_us) - 1, int(quantile * len(self.latencies_us)))]


class Fleet(abc.ABC):
    """Workers and clients connected to one relay. Connections last, so that a round pays for frames alone."""

    def __init__(self, server: Server, workers: int, streams: int) -> None:
        self.server = server
        self._open = ExitStack()
        self._poll = self._open.enter_context(closing(select.epoll()))
        self._sockets: dict[int, RawSocket] = {}
        self._latencies: list[float] = []
        self._missing = 0
        self.workers = [self.add(self.open_worker(number)) for number in range(workers)]
        self.clients = [self.add(self.open_client(number)) for number in range(streams)]

    def add(self, sock: RawSocket) -> RawSocket:
        """Look after a connection."""
        self._open.enter_context(closing(sock))
        sock.unblock()
        self._sockets[sock.sock.fileno()] = sock
        self._poll.register(sock.sock, _READ)
        return sock

    def close(self) -> None:
        """Hang up everywhere."""
        self._open.close()

    @abc.abstractmethod
    def open_worker(self, number: int) -> RawSocket:
        """A worker, ready."""

    @abc.abstractmethod
    def open_client(self, number: int) -> RawSocket:
        """A client, ready."""

    @abc.abstractmethod
    def begin(self) -> list[Stream]:
        """Make a stream for every client, running."""

    @abc.abstractmethod
    def end(self, streams: list[Stream]) -> None:
        """End them."""

    def hear(self, stream: Stream, buffer: bytearray, at: int) -> None:
        """A client has an audio frame: count it, and see that none is missing or out of order."""
        seq, stamp_ns = frames.read(buffer, at)
        if seq != self.first_seq + stream.received:
            raise RuntimeError(f"frame {seq} of {stream.request_id} in place of {self.first_seq + stream.received}")
        stream.received += 1
        self._missing -= 1
        self._latencies.append((time.perf_counter_ns() - stamp_ns) / 1e3)

    #: Number of a stream's first audio frame.
    first_seq = 0

    # -- rounds

    def saturated(self, each: int) -> Round:
        """`each` frames on every stream, as fast as the relay takes them."""

        def send(streams: list[Stream]) -> None:
            todo = {worker: [s for s in streams if s.worker is worker] for worker in self.workers}
            for worker in todo:
                self._poll.modify(worker.sock, _READ | _WRITE)

            def feed(worker: RawSocket) -> None:
                mine = todo[worker]
                for _ in range(BURST):
                    if worker.unsent or not mine:
                        break
                    stream = mine.pop(0)
                    self._send(stream)
                    if stream.sent < each:
                        mine.append(stream)  # in turn
                if not mine and not worker.unsent:
                    self._poll.modify(worker.sock, _READ)

            while self._missing:
                self._turn(-1, feed)

        return self._round(each, send)

    def paced(self, each: int, interval_s: float) -> Round:
        """`each` frames on every stream, one an interval; the streams take turns evenly."""

        def send(streams: list[Stream]) -> None:
            gap_s, began = interval_s / len(streams), time.perf_counter()
            for number in range(each * len(streams)):
                due = began + number * gap_s
                while (left_s := due - time.perf_counter()) > 0:
                    self._turn(left_s)
                self._send(streams[number % len(streams)])
            while self._missing:
                self._turn(-1)

        return self._round(each, send)

    def _round(self, each: int, send: Callable[[list[Stream]], None]) -> Round:
        streams = self.begin()
        self._latencies, self._missing = [], each * len(streams)
        cpu_s, own_s, began = self.server.cpu_s(), time.process_time(), time.perf_counter()
        self._deadline = time.monotonic() + ROUND_S
        send(streams)
        wall_s = time.perf_counter() - began
        cpu_s, own_s = self.server.cpu_s() - cpu_s, time.process_time() - own_s
        latencies = tuple(sorted(self._latencies))
        self.end(streams)
        return Round(each * len(streams), wall_s, cpu_s, own_s, latencies)

    def _send(self, stream: Stream) -> None:
        worker = stream.worker
        assert worker is not None
        worker.send(stream.source.fill(self.first_seq + stream.sent, time.perf_counter_ns()))
        stream.sent += 1

    _deadline = 0.0

    def _turn(self, timeout_s: float, feed: Callable[[RawSocket], None] | None = None) -> None:
        """One look at all connections, waiting for at most `timeout_s` (-1: until something comes)."""
        if time.monotonic() > self._deadline:
            raise RuntimeError(f"{self.server.name}: {self._missing} frames did not come within {ROUND_S:g} s")
        for descriptor, event in self._poll.poll(ROUND_S if timeout_s < 0 else timeout_s):
            sock = self._sockets[descriptor]
            if event & ~_WRITE:
                sock.take()
            if event & _WRITE:
                sock.flush()
                if feed is not None:
                    feed(sock)
        if feed is None:
            for sock in self.workers:
                if sock.unsent:
                    sock.flush()

    def until(self, done: Callable[[], bool]) -> None:
        """Look after the connections until `done`."""
        self._deadline = time.monotonic() + ROUND_S
        while not done():
            self._turn(0.01)


class PlainFleet(Fleet):
    """At `bench.plain_relay`: a stream is a client's connection."""

    def open_worker(self, number: int) -> RawSocket:
        """See `Fleet`."""
        return RawSocket(self.server.port, "/in")

    def open_client(self, number: int) -> RawSocket:
        """See `Fleet`."""
        return RawSocket(self.server.port, f"/out/{number:032x}")

    def begin(self) -> list[Stream]:
        """See `Fleet`."""
        streams = []
        for number, client in enumerate(self.clients):
            stream = Stream(f"{number:032x}", self.workers[number % len(self.workers)])
            client.on_message = self._hearer(stream)
            streams.append(stream)
        return streams

    def _hearer(self, stream: Stream) -> Callable[[bytearray, int, int], None]:
        return lambda buffer, begin, _end: self.hear(stream, buffer, begin)

    def end(self, streams: list[Stream]) -> None:
        """See `Fleet`."""


class RelaydFleet(Fleet):
    """At the real daemon: every stream of a round is a request, submitted, accepted, assigned and completed."""

    first_seq = 1  # behind `started`

    def __init__(self, server: Server, workers: int, streams: int) -> None:
        self._slots = -(-streams // workers) if workers else 0
        self._streams: dict[str, Stream] = {}
        self._started = self._ended = 0
        super().__init__(server, workers, streams)

    def open_worker(self, number: int) -> RawSocket:
        """See `Fleet`."""
        sock = log_in(self.server, "worker")
        register = Register(
            worker=f"bench-{number}",
            instance=secrets.token_hex(16),
            spaces=[SPACE],
            slots=self._slots,
            engine="bench",
            params={"type": "object", "properties": {"text": {"type": "string"}}},
            format=AudioFormat(sample_rate=48_000),
        )
        ask(sock, register, Registered)
        sock.on_message = lambda buffer, begin, end: self._hear_worker(sock, _parse(buffer, begin, end))
        return sock

    def open_client(self, number: int) -> RawSocket:
        """See `Fleet`."""
        return log_in(self.server, "client")

    def begin(self) -> list[Stream]:
        """See `Fleet`."""
        self._streams = {}
        self._started = self._ended = 0
        for client in self.clients:
            stream = Stream(secrets.token_hex(16))
            self._streams[stream.request_id] = stream
            client.on_message = self._hearer(stream)
            submit = Submit(request_id=stream.request_id, space=SPACE, params={"text": "Hello."})
            client.send(frames.message(encode(submit)))
        self.until(lambda: self._started == len(self._streams))
        return list(self._streams.values())

    def _hearer(self, stream: Stream) -> Callable[[bytearray, int, int], None]:
        def hear(buffer: bytearray, begin: int, end: int) -> None:
            if end - begin == frames.FRAME_BYTES:
                self.hear(stream, buffer, begin)
                return
            message = _parse(buffer, begin, end)
            if isinstance(message, Started):
                self._started += 1
            elif isinstance(message, Completed):
                self._ended += 1
            elif not isinstance(message, Accepted | Queued):
                raise RuntimeError(f"the relay sent {message}")

        return hear

    def _hear_worker(self, sock: RawSocket, message: Message) -> None:
        if isinstance(message, Assign):
            stream = self._streams[message.request_id]
            stream.worker = sock
            begun = Started(
                request_id=stream.request_id, attempt=message.attempt, seq=0, format=AudioFormat(sample_rate=48_000)
            )
            sock.send(frames.message(encode(begun)))
        elif not isinstance(message, Ack):
            raise RuntimeError(f"the relay sent {message}")

    def end(self, streams: list[Stream]) -> None:
        """See `Fleet`."""
        for stream in streams:
            assert stream.worker is not None
            last = Completed(request_id=stream.request_id, attempt=1, seq=1 + stream.sent)
            stream.worker.send(frames.message(encode(last)))
        self.until(lambda: self._ended == len(streams))


def log_in(server: Server, role: str) -> RawSocket:
    """A connection to the daemon, logged in."""
    sock = RawSocket(server.port, PATH, SUBPROTOCOL)
    ask(sock, Hello(version=PROTOCOL_VERSION, role=role, token=server.tokens[role], agent="bench"), Welcome)
    return sock


def ask(sock: RawSocket, question: Message, answer: type[Message]) -> None:
    """Send a message and wait, blocking, for its answer.

    Raises:
        RuntimeError: another answer came, or none.
    """
    heard: list[Message] = []
    sock.on_message = lambda buffer, begin, end: heard.append(_parse(buffer, begin, end))
    sock.sock.sendall(frames.message(encode(question)))
    sock.take_until(lambda: bool(heard))
    if not isinstance(heard[0], answer):
        raise RuntimeError(f"the relay answered {question.TYPE} with {heard[0]}")


def _parse(buffer: bytearray, begin: int, end: int) -> Message:
    return decode(bytes(buffer[begin:end]), FROM_RELAY)
