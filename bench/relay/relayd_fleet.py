"""Workers and clients of the real daemon: implements `fleet` with the messages of the protocol."""

import secrets
import select
import time
from collections.abc import Callable

import attrs

from bench.relay.fleet import WORKERS, Fleet, Load, Route
from bench.relay.frames import message
from bench.relay.servers import SPACE, Server
from bench.relay.sockets import Connection, WebSocket
from protocol.wire.codec import decode, encode
from protocol.wire.frames import (
    Completed,
    Started,
)
from protocol.wire.messages import (
    FROM_RELAY,
    PATH,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    Accepted,
    Ack,
    Assign,
    Attach,
    Hello,
    Queued,
    Register,
    Registered,
    Submit,
    Welcome,
)
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Message

#: Time for requests to begin or end.
TURN_S = 60.0
#: Receive buffer of a reader that is going to stall: otherwise the kernel would hold a whole round. With much less, a
#: reader that does read is already slow, because a loopback segment has 64 KiB.
SMALL_BUFFER = 128 * 1024


@attrs.define(eq=False)
class Request:
    """One request of a round, and its progress."""

    request_id: str
    readers: list[Connection]
    worker: Connection | None = None
    started: int = 0
    ended: int = 0


class RelaydFleet(Fleet):
    """For the real daemon: every stream is a request that is submitted, stored, accepted, assigned and completed.

    Args:
        stalls: the first client gets a small receive buffer, so that the relay notices when it does not read.
    """

    first_seq = 1  # after `started`

    def __init__(self, server: Server, most_streams: int = 50, workers: int = WORKERS, *, stalls: bool = False) -> None:
        self._slots = -(-most_streams // workers) if workers else 0
        self._stalls = stalls
        self._requests: dict[str, Request] = {}
        self._clients: list[Connection] = []
        self._poll = select.epoll()
        self._by_descriptor: dict[int, Connection] = {}
        super().__init__(server, most_streams, workers)
        self._open.callback(self._poll.close)

    def keep(self, connection: Connection) -> Connection:
        """See `Fleet`."""
        self._poll.register(connection.sock, select.EPOLLIN)
        self._by_descriptor[connection.sock.fileno()] = connection
        return super().keep(connection)

    def open_worker(self, number: int) -> Connection:
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
        sock.on_message = lambda data: self._on_worker_message(sock, decode(data, FROM_RELAY))
        return sock

    def _client(self, number: int) -> Connection:
        while len(self._clients) <= number:
            buffer = SMALL_BUFFER if self._stalls and not self._clients else None
            self._clients.append(self.keep(log_in(self.server, "client", buffer)))
        return self._clients[number]

    def begin(self, load: Load) -> list[Route]:
        """See `Fleet`."""
        self._requests = {}
        for number in range(load.streams):
            clients = [self._client(number * load.listeners + at) for at in range(load.listeners)]
            request = Request(secrets.token_hex(16), clients)
            self._requests[request.request_id] = request
            for client in clients:
                client.on_message = self._reader_of(request)
            submit = Submit(request_id=request.request_id, space=SPACE, params={"text": "Hello."})
            clients[0].send(message(encode(submit)))
        self.until(lambda: all(request.started for request in self._requests.values()))
        for request in self._requests.values():
            for client in request.readers[1:]:
                client.send(message(encode(Attach(request_id=request.request_id))))
        self.until(lambda: all(each.started == len(each.readers) for each in self._requests.values()))
        return [Route(each.request_id, _there(each.worker), each.readers) for each in self._requests.values()]

    def end(self, routes: list[Route], load: Load) -> None:
        """See `Fleet`."""
        for number, route in enumerate(routes):
            seq = self.first_seq + self.frames_of(load, number)
            route.sender.send(message(encode(Completed(request_id=route.name, attempt=1, seq=seq))))
        self.until(lambda: all(each.ended == len(each.readers) for each in self._requests.values()))

    def look_after(self) -> None:
        """See `Fleet`."""
        while events := self._poll.poll(0):
            for descriptor, _ in events:
                self._by_descriptor[descriptor].take()

    def until(self, done: Callable[[], bool]) -> None:
        """Read from all connections, blocking, until `done`."""
        deadline = time.monotonic() + TURN_S
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the requests of a round did not begin or end within {TURN_S:g} s")
            for descriptor, _ in self._poll.poll(TURN_S):
                self._by_descriptor[descriptor].take()

    def _reader_of(self, request: Request) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            incoming = decode(data, FROM_RELAY)
            if isinstance(incoming, Started):
                request.started += 1
            elif isinstance(incoming, Completed):
                request.ended += 1
            elif not isinstance(incoming, Accepted | Queued):
                raise RuntimeError(f"the relay sent {incoming}")

        return read

    def _on_worker_message(self, sock: Connection, incoming: Message) -> None:
        if isinstance(incoming, Assign):
            request = self._requests[incoming.request_id]
            request.worker = sock
            begun = Started(
                request_id=request.request_id, attempt=incoming.attempt, seq=0, format=AudioFormat(sample_rate=48_000)
            )
            sock.send(message(encode(begun)))
        elif not isinstance(incoming, Ack):
            raise RuntimeError(f"the relay sent {incoming}")


def _there(worker: Connection | None) -> Connection:
    assert worker is not None, "a request that has begun has a worker"
    return worker


def log_in(server: Server, role: str, receive_buffer: int | None = None) -> WebSocket:
    """Open a connection to the daemon, and log in."""
    sock = WebSocket(server.port, PATH, SUBPROTOCOL, receive_buffer)
    hello = Hello(version=PROTOCOL_VERSION, role=role, token=server.tokens[role], agent="bench", video=True)
    ask(sock, hello, Welcome)
    return sock


def ask(sock: WebSocket, question: Message, answer: type[Message]) -> None:
    """Send a message and wait, blocking, for its answer.

    Raises:
        RuntimeError: another answer came, or none.
    """
    received: list[Message] = []
    sock.on_message = lambda data: received.append(decode(data, FROM_RELAY))
    sock.send(message(encode(question)))
    sock.until(lambda: bool(received))
    if not isinstance(received[0], answer):
        raise RuntimeError(f"the relay answered {question.TYPE} with {received[0]}")
