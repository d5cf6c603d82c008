"""A daemon that holds conversations: with a worker that answers as a test says, and one that speaks."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from gpuworker.hearing import hearing
from gpuworker.hearing.utterances import Began, Ended, Utterance, Utterances, loudness
from protocol.wire.codec import decode
from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Output, Started
from protocol.wire.messages import FROM_RELAY, Assign, Cancel, Input, InputAck, Rejected
from protocol.wire.structs import AudioFormat
from relayd.auth.tokens import Principal
from relayd.store.base import StorageFull
from relayd.store.records import PutTurn, TurnRecord
from relayd.talk.events import Event, ReplyEnded, TextDelta, TurnFailed
from relayd.talk.reply import Reply
from relayd.talk.talks import Talk, Talks
from tests.support.fake_worker import FORMAT, FakeWorker, fake_worker, identity
from tests.support.relay import Daemon, a_config, running, until

ANN = Principal(name="ann", role="client")
BOB = Principal(name="bob", role="client")
MESSAGES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "messages": {"type": "array", "items": {"type": "object"}},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    },
    "required": ["messages"],
    "additionalProperties": False,
}
#: What a character of speech takes.
SAMPLES = 10
#: A delta, an event to wait for, or an error code to fail with.
Step = str | trio.Event | tuple[str]


def echo(messages: list[dict[str, str]]) -> Sequence[Step]:
    """Say what was said."""
    return ["You said: ", messages[-1]["content"], "."]


@attrs.define(eq=False)
class FakeEngine(ABC):
    """Runs each request that its worker is given in a task of its own, until it is cancelled."""

    worker: FakeWorker
    nursery: trio.Nursery
    assigns: list[Assign] = attrs.field(factory=list)
    cancelled: list[str] = attrs.field(factory=list)
    #: Set to disconnect it.
    gone: trio.Event = attrs.field(factory=trio.Event)
    _scopes: dict[str, trio.CancelScope] = attrs.field(factory=dict)
    _fed: dict[str, trio.MemorySendChannel[Input]] = attrs.field(factory=dict)

    async def serve(self) -> None:
        """Take what the relay sends."""
        while True:
            message = await self.worker.peer.link.receive()
            self._on_message(message)

    def _on_message(self, data: bytes) -> None:
        match decode(data, FROM_RELAY):
            case Assign() as assign:
                self.assigns.append(assign)
                send, receive = trio.open_memory_channel[Input](1000)
                self._fed[assign.request_id], self._scopes[assign.request_id] = send, trio.CancelScope()
                self.nursery.start_soon(self._run, assign, receive)
            case Input() as piece:
                self._fed[piece.request_id].send_nowait(piece)
            case Cancel(request_id=request_id):
                self.cancelled.append(request_id)
                if (scope := self._scopes.get(request_id)) is not None:  # it may end before it is assigned
                    scope.cancel()

    async def _run(self, assign: Assign, fed: trio.MemoryReceiveChannel[Input]) -> None:
        scope = self._scopes[assign.request_id]
        out = Sending(self.worker, assign)
        with scope:
            await self.run(out, fed)
        if scope.cancelled_caught:
            out.send(Cancelled)

    @abstractmethod
    async def run(self, out: "Sending", fed: trio.MemoryReceiveChannel[Input]) -> None:
        """Make the frames of one request."""


@attrs.define(eq=False)
class Sending:
    """Sends the frames of one attempt."""

    worker: FakeWorker
    assign: Assign
    seq: int = 0

    def send(self, kind: type[Any], **fields: Any) -> None:
        """Send the next frame."""
        self.worker.send(kind(**identity(self.assign, self.seq), **fields))
        self.seq += 1


@attrs.define(eq=False)
class Writer(FakeEngine):
    """A language model that says what `answer` returns for a prompt."""

    answer: Callable[[list[dict[str, str]]], Sequence[Step]] = echo

    @property
    def prompts(self) -> list[list[dict[str, Any]]]:
        """The messages of each request, in order."""
        return [assign.params["messages"] for assign in self.assigns]

    async def run(self, out: Sending, fed: trio.MemoryReceiveChannel[Input]) -> None:
        """See `FakeEngine.run`."""
        out.send(Started, format=None)
        for step in self.answer(out.assign.params["messages"]):
            if isinstance(step, trio.Event):
                await step.wait()
            elif isinstance(step, tuple):
                out.send(Failed, code=step[0], message="as the test says", retryable=True)
                return
            else:
                out.send(Output, data=step)
                await trio.lowlevel.checkpoint()
        out.send(Output, data={"finish_reason": "stop", "usage": {"prompt_tokens": 3, "completion_tokens": 5}})
        out.send(Completed, result={})


@attrs.define(eq=False)
class Speaker(FakeEngine):
    """Speaks what it is fed, ten samples a character, and marks each piece; or the words of its param `text`.

    It makes visemes if it is asked to.
    """

    format: AudioFormat = FORMAT
    #: Fails with this code after the first piece.
    fails_with: str | None = None
    #: Waits for this before it ends.
    lingers: trio.Event | None = None

    async def run(self, out: Sending, fed: trio.MemoryReceiveChannel[Input]) -> None:
        """See `FakeEngine.run`."""
        out.send(Started, format=self.format)
        if "text" in out.assign.params:
            await self._speak_words(out)
            return
        data, chars, samples = b"", 0, 0
        async for piece in fed:
            data += piece.data
            offset = piece.offset + len(piece.data)
            ack = InputAck(request_id=piece.request_id, attempt=out.assign.attempt, name=piece.name, offset=offset)
            self.worker.send(ack)
            text = data.decode()
            if len(text) > chars:
                pcm = speech_of(text)[2 * samples :]
                if out.assign.params.get("visemes"):
                    out.send(Output, data={"visemes": [{"t": samples / self.format.sample_rate, "opening": 0.5}]})
                samples, chars = len(text) * SAMPLES, len(text)
                out.send(Audio, pcm=pcm)
                out.send(Output, mark={"text_end": chars, "sample": samples})
            if self.fails_with is not None:
                out.send(Failed, code=self.fails_with, message="as the test says")
                return
            if piece.last:
                break
        if self.lingers is not None:
            await self.lingers.wait()
        out.send(Completed, result={})

    async def _speak_words(self, out: Sending) -> None:
        for word in out.assign.params["text"].split():
            out.send(Audio, pcm=speech_of(word))
        if self.fails_with is not None:
            out.send(Failed, code=self.fails_with, message="as the test says")
            return
        if self.lingers is not None:
            await self.lingers.wait()
        out.send(Completed, result={})


@attrs.define(eq=False)
class Listener(FakeEngine):
    """Hears utterances in what is loud, and understands what the test says, one text after the other."""

    texts: list[str] = attrs.field(factory=list)
    #: Waits for this before it understands anything.
    ponders: trio.Event | None = None
    #: Fails with this code instead of understanding.
    fails_with: str | None = None
    #: Told first.
    nonsense: list[Any] = attrs.field(factory=list)

    async def run(self, out: Sending, fed: trio.MemoryReceiveChannel[Input]) -> None:
        """See `FakeEngine.run`."""
        params = out.assign.params
        rate = int(out.assign.inputs["audio"].media_type.split("rate=")[1].split(";")[0])
        cutter = Utterances(
            rate,
            loudness,
            threshold=params.get("threshold", 0.5),
            silence_ms=params.get("silence_ms", 500),
            prefix_ms=params.get("prefix_ms", 300),
        )
        out.send(Started, format=None)
        for told in self.nonsense:
            out.send(Output, data=told)
        whole = b""
        async for piece in fed:
            whole += piece.data
            offset = piece.offset + len(piece.data)
            ack = InputAck(request_id=piece.request_id, attempt=out.assign.attempt, name=piece.name, offset=offset)
            self.worker.send(ack)
            events = [*cutter.add(piece.data), *(cutter.finish() if piece.last else ())]
            if params.get("turn_detection") == "none":
                events = [Utterance(whole, rate, 0)] if piece.last else []
            for event in events:
                if not await self._tell(out, event):
                    return
            if piece.last:
                break
        out.send(Output, data={"finish_reason": "stop", "usage": {"type": "duration", "seconds": 1.0}})
        out.send(Completed, result={})

    async def _tell(self, out: Sending, event: Began | Ended | Utterance) -> bool:
        if isinstance(event, Began):
            out.send(Output, data={"speech_started": {"sample": event.sample}})
        elif isinstance(event, Ended):
            out.send(Output, data={"speech_stopped": {"sample": event.sample}})
        else:
            if self.ponders is not None:
                await self.ponders.wait()
            if self.fails_with is not None:
                out.send(Failed, code=self.fails_with, message="as the test says")
                return False
            if text := self.texts.pop(0):
                out.send(Output, data=text)
            out.send(Output, data={"utterance": {"start": event.start, "end": event.end, "sample_rate": 24_000}})
        return True


def speech_of(text: str) -> bytes:
    """The samples in which `Speaker` says a text."""
    return b"".join(SAMPLES * (ord(char) % 0x7000).to_bytes(2, "little") for char in text)


@attrs.define(eq=False)
class Stage:
    """A daemon with conversations, and its workers."""

    daemon: Daemon
    nursery: trio.Nursery

    @property
    def talks(self) -> Talks:
        """The conversations."""
        talks = self.daemon.http_context.talks
        assert isinstance(talks, Talks)
        return talks

    async def open(self, session: str = "session-1", principal: Principal = ANN, **options: Any) -> Talk:
        """Open a conversation."""
        talk = await self.talks.open(principal, session, **options)
        assert isinstance(talk, Talk), talk
        return talk

    async def writer(self, answer: Callable[[list[dict[str, str]]], Sequence[Step]] = echo, **more: Any) -> Writer:
        """Connect a worker of the space `llm`."""
        told: dict[str, Any] = {"params": MESSAGES, "format": None, "slots": 4} | more
        writer: Writer = await self.nursery.start(self._serve, "llm", partial(Writer, answer=answer), told)
        return writer

    async def speaker(self, made: AudioFormat = FORMAT, **more: Any) -> Speaker:
        """Connect a worker of the space `tts`."""
        told: dict[str, Any] = {"params": {}, "format": made, "inputs": {"text": {"live": True}}, "slots": 4} | more
        speaker: Speaker = await self.nursery.start(self._serve, "tts", partial(Speaker, format=made), told)
        return speaker

    async def listener(self, *texts: str, **more: Any) -> Listener:
        """Connect a worker of the space `stt`."""
        hears = hearing.capabilities(decodes=False)
        told: dict[str, Any] = {"params": hears.params, "format": None, "inputs": hears.inputs, "slots": 4} | more
        listener: Listener = await self.nursery.start(self._serve, "stt", partial(Listener, texts=list(texts)), told)
        return listener

    async def engine(self, space: str, engine: Callable[..., FakeEngine], told: dict[str, Any]) -> Any:
        """Connect a worker of a space, with an engine of its own."""
        return await self.nursery.start(self._serve, space, engine, told)

    async def _serve(
        self, space: str, engine: Any, told: dict[str, Any], task_status: trio.TaskStatus[FakeEngine]
    ) -> None:
        async with (
            fake_worker(self.daemon.url, name=space, spaces=(space,), **told) as worker,
            trio.open_nursery() as nursery,
        ):
            made: FakeEngine = engine(worker, nursery)
            nursery.start_soon(made.serve)
            await until(lambda: self.daemon.relay.workers.serving(space))
            task_status.started(made)
            await made.gone.wait()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def stage(state_dir: Path, *, talk: dict[str, Any] | None = None, **overrides: Any) -> AsyncIterator[Stage]:
    """Run a daemon with conversations; at the end it stops as in a crash."""
    settings: dict[str, Any] = {"reply": "llm", "speech": "tts"} | (talk or {})
    spaces: dict[str, Any] = {"llm": {"max_workers": 2}, "tts": {"max_workers": 2}} | overrides.pop("spaces", {})
    config = a_config(state_dir, **({"store": "sqlite", "spaces": spaces, "talk": settings} | overrides))
    async with running(config) as daemon, trio.open_nursery() as nursery:
        yield Stage(daemon, nursery)
        nursery.cancel_scope.cancel()


def said(reply: Reply | Rejected) -> Reply:
    """Return a reply that was not refused."""
    assert isinstance(reply, Reply), reply
    return reply


async def events_of(reply: Reply | Rejected) -> list[Event]:
    """All that a listener gets."""
    with trio.fail_after(10):
        return [event async for event in said(reply).events()]


async def ended(reply: Reply | Rejected) -> TurnRecord:
    """The turn, once it has ended."""
    with trio.fail_after(10):
        end = await said(reply).wait_ended()
    assert isinstance(end, ReplyEnded), end
    return end.turn


async def failed(reply: Reply | Rejected) -> TurnFailed:
    """Why there is no reply."""
    with trio.fail_after(10):
        end = await said(reply).wait_ended()
    assert isinstance(end, TurnFailed), end
    return end


def text_of(events: Sequence[Event]) -> str:
    """The text among events."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def fill(on: Stage, monkeypatch: pytest.MonkeyPatch, role: str, state: str) -> None:
    """Let the store have no space for turns of this kind."""
    store = on.daemon.relay.store
    commit = store.commit

    async def full(*changes: Any) -> None:
        for change in changes:
            if isinstance(change, PutTurn) and (change.record.role, str(change.record.state)) == (role, state):
                raise StorageFull("no space left")
        await commit(*changes)

    monkeypatch.setattr(store, "commit", full)
