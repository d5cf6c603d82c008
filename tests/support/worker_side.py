"""The relay's side of a worker's link, scripted by a test, and slots without a process."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import attrs
import trio

from gpuworker.engines.base import AudioChunk, Capabilities, Chunk, FormatChunk
from gpuworker.identity import Identity
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job, Run, Slot
from gpuworker.worker import Worker
from protocol.wire.codec import decode
from protocol.wire.frames import Frame
from protocol.wire.messages import (
    FROM_WORKER,
    Ack,
    Assign,
    Register,
    Registered,
)
from protocol.wire.structs import (
    AudioFormat,
    Running,
)
from protocol.wire.validators import Message
from tests.support.scripted_relay import ADDRESS, Connection, FakeRelay, Script

M = TypeVar("M", bound=Message)
FORMAT = AudioFormat(sample_rate=24_000)
ID = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32


def assign(request_id: str = ID, attempt: int = 1, from_seq: int = 0, **more: Any) -> Assign:
    fields = {"space": "tts", "principal": "ann", "params": {"text": "hi"}, "run_timeout_s": 120.0, **more}
    return Assign(request_id=request_id, attempt=attempt, from_seq=from_seq, **fields)


@attrs.define
class Desk:
    """One connection of a worker, as seen by the relay."""

    connection: Connection

    async def hear(self) -> Message:
        return decode(await self.connection.link.receive(), FROM_WORKER)

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
        """Check that nothing arrives for `seconds`."""
        with trio.move_on_after(seconds):
            message = await self.hear()
            raise AssertionError(f"did not expect {message}")


def script(work: Callable[[Desk], Awaitable[None]]) -> Script:
    """Make a script that fails the test if it takes too long."""

    async def serve(connection: Connection) -> None:
        with trio.fail_after(600):
            await work(Desk(connection))

    return serve


Play = Callable[[Job, Callable[[Chunk], None]], Awaitable[RunResult]]


async def speak(job: Job, emit: Callable[[Chunk], None]) -> RunResult:
    """Emit a format and three chunks, a second apart; ends successfully."""
    emit(FormatChunk(FORMAT))
    for number in range(3):
        await trio.sleep(1)
        emit(AudioChunk(bytes([number, 0]) * 2400))
    return RunResult(outcome="completed")


class ScriptedSlot(Slot):
    """Runs a coroutine instead of an engine; it stops `stop_s` after a cancel."""

    def __init__(self, play: Play = speak, *, stop_s: float = 0.1, load_s: float = 0.0, **capabilities: Any) -> None:
        super().__init__(0)
        self._play = play
        self._stop_s = stop_s
        self._load_s = load_s
        self._announced = Capabilities(**{"format": FORMAT, "params": {}, **capabilities})
        self.jobs: list[Job] = []
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
        """Behave like a process that has crashed, and is back after `back_s`."""
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
        self._nursery.start_soon(self._perform, job, run)

    async def _perform(self, job: Job, run: Run) -> None:
        with trio.CancelScope() as self._scope:
            run.finish(await self._play(job, run.emit))

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
    """Run a worker against these scripts, one per connection, in memory; stopped at the end of the block."""
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
    """Run a worker against scripts until it ends by itself or the last script has returned."""
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
