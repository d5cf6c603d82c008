"""A hostile tenant and a hostile worker, with tokens of their own: nothing that they do may reach anybody else.

That the requests of others end as promised is judged where those are followed; here is judged what the two are told.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import attrs
import trio

from protocol.link.websocket_frames import BINARY, CLOSE, CONTINUATION, PING, TEXT, frame_head, make_frame
from protocol.wire.errors import LinkError, ProtocolError
from protocol.wire.frames import Audio, Completed, Failed, Frame, Progress, Started
from protocol.wire.messages import Ack, Attach, Cancel, Input, Register, Registered, Rejected, Status
from tests.chaos.proxy import Target
from tests.chaos.report import Ledger
from tests.chaos.workload import LAIR, LOOSE, REPRODUCIBLE
from tests.fuzz.fuzzed_relay import UPGRADE
from tests.fuzz.targets import FROM_CLIENTS, FROM_WORKERS, HELLO, pack, spoil
from tests.support.fake_worker import FORMAT, SCHEMA
from tests.support.relay import Peer, a_submit, an_id, peer

#: Time between two acts of one of them, seconds.
GAP_S = (0.1, 1.5)
#: The longest act.
ACT_S = 8.0
#: Time in which it listens for an answer that it must not get.
LISTEN_S = 1.0
SUBMITS, QUESTIONS, FRAMES, REGISTRATIONS, STRANGERS = 150, 100, 1_500, 60, 40
#: Messages that are cut, at once, and the bytes of each that are sent.
CUT_MESSAGES, CUT_BYTES, WHOLE_BYTES = 24, 900_000, 1_000_000
_ATTEMPTS = (0, 1, 2, 3, 17, 999_999, 1_000_000)
_SEQS = (-1, 0, 1, 5, 1_000, 2**31 - 1)
#: How a connection ends here.
_GONE = (OSError, LinkError, ProtocolError, trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError)
_BAD_FRAMES = (
    make_frame(TEXT, b"text", masked=True),
    make_frame(BINARY, b"not masked", masked=False),
    make_frame(CONTINUATION, b"of nothing", masked=True),
    make_frame(PING, bytes(126), masked=True),
    make_frame(CLOSE, b"\x00\x01", masked=True),
    make_frame(BINARY, b"\xc1", masked=True),
    make_frame(BINARY, b"\x81" * 40, masked=True),
    make_frame(BINARY, b"\xdf\xff\xff\xff\xff", masked=True),
    b"\x82\xff\x7f" + b"\xff" * 7,
    b"\xf2\x80\0\0\0\0",
)
_BAD_HTTP = (
    b"GET / HTTP/1.1\r\n",
    b"GET / HTTP/2.0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01",
    b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
    b"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 5000\r\n\r\n{",
    b"PUT /v1/requests/%s?space=tts HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 3\r\n\r\nxxx",
    b"GET /v1/requests/%s/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nLast-Event-ID: 9.9\r\n\r\n",
    b"GET /v1/requests/%s/audio HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nRange: bytes=-0,1-x\r\n\r\n",
    b"DELETE /v1/requests/%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n",
)


@attrs.define(eq=False)
class Hostile:
    """One of the two; the requests of others are those of the ledger."""

    name: str
    role: str
    token: str
    url: str
    target: Target
    ledger: Ledger
    seed: int
    _random: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(f"{self.seed} {self.name}")

    async def serve(self, calm: trio.Event) -> None:
        """Do one act after another until `calm` is set."""
        acts = _ACTS[self.role]
        while not calm.is_set():
            await trio.sleep(self._random.uniform(*GAP_S))
            act = self._random.choice(acts)
            with trio.move_on_after(ACT_S):
                try:
                    await act(self)
                except* _GONE:
                    pass
            self.ledger.counts[f"{self.name}: {act.__name__.strip('_').replace('_', ' ')}"] += 1

    def _foreign(self) -> str:
        """The id of somebody else's request."""
        return self._random.choice(list(self.ledger.cases) or [an_id()])

    @asynccontextmanager
    async def _peer(self) -> AsyncIterator[Peer]:
        async with peer(self.url, self.role, self.token) as connection:
            yield connection

    async def _listen(self, connection: Peer) -> None:
        """Read for a while; nothing may be told about the requests of others, but that they are not its own."""
        with trio.move_on_after(LISTEN_S):
            while True:
                message = await connection.next()
                of = getattr(message, "request_id", None)
                if of in self.ledger.cases and not isinstance(message, Rejected | Ack | Cancel):
                    self.ledger.complain(f"{self.name} was told {message.TYPE} of a request of others: {of}")

    async def _connect(self) -> trio.SocketStream:
        if isinstance(self.target, str):
            return await trio.open_unix_socket(self.target)
        return await trio.open_tcp_stream(*self.target)

    async def _say(self, *data: bytes, wait_s: float = 0.2) -> None:
        """Send bytes on a new connection, and cut it."""
        stream = await self._connect()
        try:
            for each in data:
                await stream.send_all(each)
            await trio.sleep(wait_s)
        finally:
            await trio.aclose_forcefully(stream)

    def _login(self) -> bytes:
        return UPGRADE + make_frame(BINARY, pack(HELLO | {"role": self.role, "token": self.token}), masked=True)

    # -- both

    async def _bad_frames(self) -> None:
        await self._say(self._login(), self._random.choice(_BAD_FRAMES))

    async def _bad_messages(self) -> None:
        messages = FROM_WORKERS if self.role == "worker" else FROM_CLIENTS
        register = dict(FROM_WORKERS[0]) | {"spaces": [LAIR], "instance": an_id()}
        said = [self._login()]
        if self.role == "worker":
            said.append(make_frame(BINARY, pack(register), masked=True))
        for _ in range(20):
            message = spoil(self._random, dict(self._random.choice(messages)))
            if "request_id" in message and self._random.random() < 0.5:
                message["request_id"] = self._foreign()
            said.append(make_frame(BINARY, pack(message), masked=True))
        await self._say(*said)

    async def _bytes_of_no_message(self) -> None:
        garbage = [make_frame(BINARY, self._random.randbytes(self._random.randrange(200)), masked=True)]
        await self._say(self._login(), *garbage)

    async def _cut_large_messages(self) -> None:
        head = frame_head(BINARY, WHOLE_BYTES, b"\0\0\0\0")
        async with trio.open_nursery() as nursery:
            for _ in range(CUT_MESSAGES):
                wait_s = self._random.uniform(0.0, 3.0)
                nursery.start_soon(self._cut, head, wait_s)

    async def _cut(self, head: bytes, wait_s: float) -> None:
        with suppress(*_GONE):
            await self._say(self._login(), head + bytes(CUT_BYTES), wait_s=wait_s)

    async def _silence(self) -> None:
        streams = [await self._connect() for _ in range(STRANGERS)]
        await trio.sleep(self._random.random())
        for stream in streams:
            await trio.aclose_forcefully(stream)

    # -- the tenant

    async def _flood_of_submits(self) -> None:
        detach = self._random.random() < 0.5
        async with self._peer() as connection:
            for _ in range(SUBMITS):
                space = self._random.choice((REPRODUCIBLE, LOOSE, LAIR))
                params = {"text": "me first", "duration_s": 0.1, "speed": 50}
                connection.send(a_submit(space=space, params=params, priority=9, detach=detach))
            await self._listen(connection)

    async def _flood_of_uploads(self) -> None:
        async with self._peer() as connection:
            for _ in range(SUBMITS // 5):
                info = {"voice": {"media_type": "audio/wav", "size": 500_000, "sha256": "0" * 64}}
                submit = dict(FROM_CLIENTS[0]) | {"request_id": an_id(), "inputs": info, "params": {"text": "x"}}
                connection.link.send_nowait(pack(submit))
                connection.send(Input(request_id=submit["request_id"], name="voice", offset=0, data=bytes(100_000)))
            await self._listen(connection)

    async def _strange_attaches(self) -> None:
        async with self._peer() as connection:
            own = a_submit(space=REPRODUCIBLE, params={"text": "mine", "duration_s": 0.5}, detach=True)
            connection.send(own)
            for _ in range(QUESTIONS):
                of = self._random.choice((own.request_id, self._foreign(), self._foreign(), an_id()))
                attempt, seq = self._random.choice(_ATTEMPTS), self._random.choice(_SEQS)
                connection.send(Attach(request_id=of, attempt=attempt, after_seq=seq))
            await self._listen(connection)

    async def _flood_of_questions(self) -> None:
        async with self._peer() as connection:
            for _ in range(QUESTIONS):
                connection.send(Status(request_id=self._foreign()))
                connection.send(Cancel(request_id=self._foreign(), reason="mine now"))
            await self._listen(connection)

    async def _bad_http(self) -> None:
        said = self._random.choice(_BAD_HTTP)
        ids = (self._foreign().encode(), self.token.encode())
        await self._say(said % ids[2 - said.count(b"%s") :] if b"%s" in said else said, wait_s=0.5)

    # -- the worker

    def _register(self, *spaces: str) -> Register:
        return Register(
            worker=self.name,
            instance=an_id(),
            spaces=list(spaces),
            slots=self._random.randrange(1, 64),
            engine="hostile",
            params=SCHEMA | {"additionalProperties": True},
            format=FORMAT,
        )

    async def _foreign_frames(self) -> None:
        """Answer for requests that it was not given, with every seq and attempt."""
        async with self._peer() as worker:
            worker.send(self._register(LAIR))
            if isinstance(await worker.next(Registered, Rejected), Rejected):
                return
            for _ in range(QUESTIONS):
                of = {"request_id": self._foreign(), "attempt": self._random.choice(_ATTEMPTS[1:])}
                of["seq"] = self._random.choice(_SEQS[1:])
                worker.send(self._random.choice(_frames(of)))
            await self._listen(worker)

    async def _wrong_frames(self) -> None:
        """Take requests, and send frames in a wrong order, and floods of progress."""
        async with self._peer() as worker:
            worker.send(self._register(LAIR))
            assigned = []
            with trio.move_on_after(LISTEN_S):
                while True:
                    message = await worker.next()
                    if message.TYPE == "assign":
                        assigned.append(message)
            for assign in assigned:
                of = {"request_id": assign.request_id, "attempt": assign.attempt, "seq": 0}
                worker.send(Started(**of, format=FORMAT))
                for seq in range(1, FRAMES // len(assigned)):
                    worker.send(Progress(**(of | {"seq": seq}), state="generating", fraction=0.5))
                for _ in range(5):
                    of["seq"] = self._random.choice(_SEQS[1:])
                    worker.send(self._random.choice(_frames(of)))
            await trio.sleep(self._random.random())

    async def _registers_again_and_again(self) -> None:
        async with self._peer() as worker:
            for _ in range(REGISTRATIONS):
                worker.send(self._register(LAIR))
            await self._listen(worker)

    async def _registers_elsewhere(self) -> None:
        """Serve a space of others, which its token does not allow."""
        async with self._peer() as worker:
            worker.send(self._register(REPRODUCIBLE, LAIR))
            if isinstance(await worker.next(Registered, Rejected), Registered):
                self.ledger.complain(f"{self.name} may serve {REPRODUCIBLE!r}")


def _frames(of: dict[str, object]) -> list[Frame]:
    """A frame of each kind that can do harm."""
    return [
        Audio(**of, pcm=b"\1\2" * 400),  # type: ignore[arg-type]
        Completed(**of, result={}),  # type: ignore[arg-type]
        Failed(**of, code="engine_failed", message="it is broken", retryable=False),  # type: ignore[arg-type]
        Progress(**of, state="generating", fraction=1.0),  # type: ignore[arg-type]
    ]


_BOTH: tuple[Callable[[Hostile], Awaitable[None]], ...] = (
    Hostile._bad_frames,
    Hostile._bad_messages,
    Hostile._bytes_of_no_message,
    Hostile._cut_large_messages,
    Hostile._silence,
)
_ACTS = {
    "client": (
        *_BOTH,
        Hostile._flood_of_submits,
        Hostile._flood_of_submits,
        Hostile._flood_of_uploads,
        Hostile._strange_attaches,
        Hostile._flood_of_questions,
        Hostile._bad_http,
        Hostile._bad_http,
    ),
    "worker": (
        *_BOTH,
        Hostile._foreign_frames,
        Hostile._foreign_frames,
        Hostile._wrong_frames,
        Hostile._wrong_frames,
        Hostile._registers_again_and_again,
        Hostile._registers_elsewhere,
    ),
}
