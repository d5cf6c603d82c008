"""A relay that does what a test's script says, in memory or on a socket; and a worker with scripted slots."""

import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio
import trio.testing

from gpuworker.engines.base import AudioChunk, Capabilities, Chunk, FormatChunk
from gpuworker.identity import Identity
from gpuworker.slots.feed import Feed
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job, Run, Slot
from gpuworker.worker import Worker
from protocol.client.address import Address
from protocol.link.base import Link
from protocol.link.dial import serve_link
from protocol.link.limits import LinkLimits
from protocol.wire.codec import decode
from protocol.wire.errors import LinkBroken
from protocol.wire.frames import (
    Audio,
    Completed,
    Failed,
    Frame,
    Started,
)
from protocol.wire.messages import (
    FROM_ANYONE,
    FROM_OPERATOR,
    FROM_WORKER,
    MAX_UNACKED_BYTES,
    SUBPROTOCOL,
    Accepted,
    Ack,
    Assign,
    Error,
    Hello,
    Queued,
    Register,
    Registered,
    Report,
    Spaces,
    SpacesReply,
    Submit,
    Welcome,
)
from protocol.wire.structs import (
    AudioFormat,
    Running,
)
from protocol.wire.validators import Message, Value
from relayd.net.http_head import is_complete, read_head, split_head
from relayd.net.websocket_handshake import HandshakeRejected, build_response, parse_head

M = TypeVar("M", bound=Message)

FORMAT = AudioFormat(sample_rate=24_000)
ADDRESS = Address(kind="tcp", host="relay.test", port=1)
URL = "ws://relay.test:1"
ID = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32


@attrs.define
class Connection:
    """A client's connection after its hello was received and answered."""

    link: Link
    stream: trio.abc.Stream
    hello: Hello
    #: Every message received by `expect`.
    heard: list[Message] = attrs.field(factory=list)

    async def expect(self, kind: type[M]) -> M:
        """Return the next message, which must be of this kind."""
        message = decode(await self.link.receive(), FROM_OPERATOR)
        self.heard.append(message)
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.link.send(message)

    async def accept(self) -> Submit:
        """Receive a submit and accept it."""
        submit = await self.expect(Submit)
        self.send(Accepted(request_id=submit.request_id))
        return submit

    async def cut(self) -> None:
        """Once everything is sent, cut the connection without a close frame, as a network failure does."""
        await self.link.drained()
        await trio.testing.wait_all_tasks_blocked()
        await trio.aclose_forcefully(self.stream)

    async def hold(self) -> None:
        """Receive messages until the client disconnects."""
        async for data in self.link:
            self.heard.append(decode(data, FROM_OPERATOR))


@asynccontextmanager
async def accept_link(stream: trio.abc.Stream, **rules: Any) -> AsyncIterator[Link]:
    """The relay's end of a link over a stream, after it answered the client's handshake."""
    data = await read_head(stream)
    if not is_complete(data):
        await stream.send_all(HandshakeRejected(400, "this is not HTTP").to_bytes())
        await stream.aclose()
        raise LinkBroken("no handshake came")
    head, early = split_head(data)
    await stream.send_all(build_response(parse_head(head), SUBPROTOCOL))
    async with serve_link(stream, peer="client", limits=LinkLimits(**rules), early=early) as link:
        yield link


Script = Callable[[Connection], Awaitable[None]]


async def serve(stream: trio.abc.Stream, script: Script) -> None:
    """Serve one connection."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            link = await stack.enter_async_context(accept_link(stream))
            hello = decode(await link.receive(), FROM_ANYONE)
        except LinkBroken:
            return
        assert isinstance(hello, Hello)
        if hello.token == "wrong" or script is refuse:
            link.send(Error(code="unauthenticated", message="this token is not known"))
            return
        limits: dict[str, Value] = {"max_unacked_bytes": MAX_UNACKED_BYTES}
        link.send(Welcome(connection_id="c1", principal="tester", server="fake", limits=limits))
        connection = Connection(link, stream, hello)
        await script(connection)


async def refuse(_connection: Connection) -> None:
    """A script that refuses the login."""


class FakeRelay:
    """Answers each connection with the next script; the last script answers all further ones."""

    def __init__(self, nursery: trio.Nursery, *scripts: Script) -> None:
        self._nursery = nursery
        self._scripts = list(scripts)
        self.connections = 0

    def next_script(self) -> Script:
        self.connections += 1
        return self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]

    async def connect(self, _address: Address) -> trio.abc.Stream:
        """Make a new connection; returns the client's end."""
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(serve, theirs, self.next_script())
        return ours


def frames(request_id: str, *pcm: bytes, attempt: int = 1, seq: int = 0, ends: bool = True) -> list[Frame]:
    """Make started, audio..., completed, numbered from `seq` on."""
    every: list[Frame] = [Started(request_id=request_id, attempt=attempt, seq=0, format=FORMAT)]
    every += [Audio(request_id=request_id, attempt=attempt, seq=number, pcm=data) for number, data in enumerate(pcm, 1)]
    if ends:
        result = {"samples": sum(map(len, pcm)) // 2}
        every.append(Completed(request_id=request_id, attempt=attempt, seq=len(pcm) + 1, result=result))
    return every[seq:]


async def speak(connection: Connection) -> None:
    """A script that serves any number of submits, each with a place in the queue and three chunks."""
    async for data in connection.link:
        message = decode(data, FROM_OPERATOR)
        connection.heard.append(message)
        if isinstance(message, Spaces):
            connection.send(SpacesReply(spaces=[]))
        elif isinstance(message, Submit):
            connection.send(Accepted(request_id=message.request_id))
            connection.send(Queued(request_id=message.request_id, position=1, of=1, eta_s=2.0))
            connection.send(*frames(message.request_id, b"\1\0" * 2400, b"\2\0" * 2400, b"\3\0" * 2400))


def failed(request_id: str, seq: int = 0, **more: object) -> Failed:
    return Failed.from_map(
        {"request_id": request_id, "attempt": 1, "seq": seq, "code": "engine_failed", "message": "it broke", **more}
    )


class RelayThread:
    """A fake relay on a unix socket, in its own thread, for tests of code without Trio; yields its URL.

    An error in a script is raised at the end of the block.
    """

    def __init__(self, directory: Path, *scripts: Script) -> None:
        self._path = directory / "relay.sock"
        self._scripts = scripts
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake relay")
        self._fault: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()

    def __enter__(self) -> str:
        self._path.unlink(missing_ok=True)
        self._thread.start()
        self._ready.wait()
        if self._fault is not None:
            raise self._fault
        return f"unix:{self._path}"

    def __exit__(self, kind: object, *_more: object) -> None:
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()
        if self._fault is not None and kind is None:
            raise self._fault

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as fault:  # noqa: BLE001  raised again at the end of the block
            self._fault = fault
        finally:
            self._ready.set()

    async def _main(self) -> None:
        with self._scope, trio.socket.socket(trio.socket.AF_UNIX) as listening:
            await listening.bind(str(self._path))
            listening.listen()
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            async with trio.open_nursery() as nursery:
                fake = FakeRelay(nursery, *self._scripts)
                while True:
                    connection, _peer = await listening.accept()
                    nursery.start_soon(serve, trio.SocketStream(connection), fake.next_script())


# -- a worker of the relay -------------------------------------------------------------------------------------------


def assign(request_id: str = ID, attempt: int = 1, from_seq: int = 0, **more: Any) -> Assign:
    fields = {"space": "tts", "principal": "ann", "params": {"text": "hi"}, "run_timeout_s": 120.0, **more}
    return Assign(request_id=request_id, attempt=attempt, from_seq=from_seq, **fields)


@attrs.define
class Desk:
    """The relay's end of a worker's connection."""

    connection: Connection
    reports: list[Report] = attrs.field(factory=list)

    async def hear(self) -> Message:
        while isinstance(message := decode(await self.connection.link.receive(), FROM_WORKER), Report):
            self.reports.append(message)
        return message

    async def expect(self, kind: type[M]) -> M:
        message = await self.hear()
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    async def register(self, *resume: Running, abandon: tuple[str, ...] = ()) -> Register:
        """Receive a registration and accept it."""
        register = await self.expect(Register)
        self.send(Registered(worker_id="w1", resume=resume, abandon=list(abandon)))
        return register

    async def frames(self) -> list[Frame]:
        """Receive frames up to the last one of an attempt, and acknowledge it."""
        frames: list[Frame] = []
        while not frames or not frames[-1].ENDS:
            message = await self.hear()
            assert isinstance(message, Frame), message
            frames.append(message)
        last = frames[-1]
        self.send(Ack(request_id=last.request_id, attempt=last.attempt, seq=last.seq))
        return frames

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.connection.link.send(message)

    async def silent(self, seconds: float) -> None:
        """Check that nothing arrives for this long."""
        with trio.move_on_after(seconds):
            message = await self.hear()
            raise AssertionError(f"did not expect {message}")


def script(work: Callable[[Desk], Awaitable[None]]) -> Script:
    """Make a script that fails the test if it takes too long."""

    async def serve(connection: Connection) -> None:
        with trio.fail_after(600):
            await work(Desk(connection))

    return serve


def seqs(frames: list[Frame]) -> list[int]:
    return [frame.seq for frame in frames]


Emit = Callable[[Chunk], None]
Play = Callable[[Job, Emit], Awaitable[RunResult]]


async def play_speech(job: Job, emit: Emit) -> RunResult:
    """Emit a format and three chunks, a second apart; ends successfully."""
    emit(FormatChunk(FORMAT))
    for number in range(3):
        await trio.sleep(1)
        emit(AudioChunk(bytes([number, 0]) * 2400))
    return RunResult(outcome="completed")


class ScriptedSlot(Slot):
    """Runs a coroutine instead of an engine; it stops `stop_s` after a cancel."""

    def __init__(
        self, play: Play = play_speech, *, stop_s: float = 0.1, load_s: float = 0.0, **capabilities: Any
    ) -> None:
        super().__init__(0)
        self._play = play
        self._stop_s = stop_s
        self._load_s = load_s
        self._announced = Capabilities(**{"format": FORMAT, "params": {}, **capabilities})
        self.jobs: list[Job] = []
        #: What came of each live input; `takes`: its engine reads at once.
        self.fed: dict[str, list[tuple[bytes, bool]]] = {}
        self.takes = True
        self._feeds: Mapping[str, Feed] = {}
        self.cancels = 0
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep(self._load_s)
            self.capabilities = self._announced
            self._set_ready(True)
            await trio.sleep_forever()

    def die(self, back_s: float = 3.0) -> None:
        """Fail as a process that crashes, and be ready again after `back_s`."""
        assert self._nursery is not None
        self._scope.cancel()
        self._set_ready(False)
        if self._run is not None:
            self._run.finish(RunResult(outcome="failed", code="engine_failed", message="crashed", retryable=True))
        self._nursery.start_soon(self._come_back, back_s)

    async def _come_back(self, back_s: float) -> None:
        await trio.sleep(back_s)
        self._set_ready(True)

    async def _start(self, job: Job, run: Run) -> None:
        assert self._nursery is not None
        self.jobs.append(job)
        self._feeds = job.feeds
        self._nursery.start_soon(self._perform, job, run)

    async def _perform(self, job: Job, run: Run) -> None:
        with trio.CancelScope() as self._scope:
            run.finish(await self._play(job, run.emit))

    def _feed(self, name: str, data: bytes, last: bool) -> None:
        self.fed.setdefault(name, []).append((data, last))
        if self.takes:
            self._feeds[name].note_taken(self._feeds[name].taken + len(data))

    async def _stop_when_asked(self, run: Run) -> None:
        await run.cancel_asked.wait()
        self.cancels += 1
        await trio.sleep(self._stop_s)
        self._scope.cancel()
        run.finish(RunResult(outcome="cancelled"))

    def _force(self, run: Run) -> None:
        self._scope.cancel()


@asynccontextmanager
async def worker_with(*scripts: Script, slots: tuple[Slot, ...] = (), **more: Any) -> AsyncIterator[Worker]:
    """A worker whose connections, in memory, follow these scripts in turn; it is stopped at the end of the block."""
    async with trio.open_nursery() as nursery:
        relay = FakeRelay(nursery, *scripts)
        worker = Worker(
            Identity(name="box", spaces=("tts",), engine="scripted", token=more.pop("token", "t")),
            ADDRESS,
            slots or (ScriptedSlot(),),
            connect_to=relay.connect,
            **more,
        )
        yield worker
        nursery.cancel_scope.cancel()


async def run_with(*scripts: Script, slots: tuple[Slot, ...] = (), **more: Any) -> None:
    """Run a worker against scripts until it ends by itself or the last script, which must return, has ended."""
    done = trio.Event()

    async def last(connection: Connection) -> None:
        await scripts[-1](connection)
        done.set()

    async with worker_with(*scripts[:-1], last, slots=slots, **more) as worker, trio.open_nursery() as nursery:

        async def run() -> None:
            await worker.run()
            nursery.cancel_scope.cancel()

        nursery.start_soon(run)
        await done.wait()
        nursery.cancel_scope.cancel()
