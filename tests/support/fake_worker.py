"""A worker of a real daemon, whose every message the test sends."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs

from protocol.wire.frames import (
    Audio,
    Completed,
    Frame,
    Output,
    Started,
)
from protocol.wire.messages import (
    Assign,
    Register,
)
from protocol.wire.structs import (
    AudioFormat,
)
from protocol.wire.validators import Message
from tests.support.cable import Cable
from tests.support.relay import Peer, an_id, peer
from tests.support.tap import Tap

FORMAT = AudioFormat(sample_rate=24_000)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 1}, "rate": {"type": "integer"}},
    "required": ["text"],
    "additionalProperties": False,
}
#: Of a language space.
MESSAGES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "messages": {"type": "array"},
        "temperature": {"type": "number", "maximum": 1.5},
        "top_p": {"type": "number"},
        "max_tokens": {"type": "integer"},
        "stop": {"type": "array", "items": {"type": "string"}},
        "seed": {"type": "integer"},
        "top_k": {"type": "integer"},
    },
    "required": ["messages"],
    "additionalProperties": False,
}
ENDING: dict[str, Any] = {"finish_reason": "stop", "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


@attrs.define(eq=False)
class FakeWorker:
    """A worker that sends only what the test sends."""

    peer: Peer
    registration: Register

    @property
    def instance(self) -> str:
        return self.registration.instance

    @property
    def name(self) -> str:
        return self.registration.worker

    async def assigned(self) -> Assign:
        assign: Assign = await self.peer.next(Assign)
        return assign

    def send(self, message: Message) -> None:
        self.peer.send(message)

    def speak(self, assign: Assign, pcm: list[bytes], *, first: int = 0, end: bool = True) -> None:
        """Send `started`, an audio frame for each of `pcm`, and `completed`; skip frames below `first`."""
        frames: list[Frame] = [Started(**identity(assign, 0), format=FORMAT)]
        frames += [Audio(**identity(assign, 1 + i), pcm=data) for i, data in enumerate(pcm)]
        if end:
            frames.append(Completed(**identity(assign, 1 + len(pcm)), result={"chunks": len(pcm)}))
        for frame in frames[first:]:
            self.send(frame)

    def write(
        self, assign: Assign, texts: list[str], *, first: int = 0, ending: Any = ENDING, end: bool = True
    ) -> None:
        """Send `started`, an output for each of `texts` and for the ending, and `completed`; not below `first`."""
        outputs = [*texts, *([ending] if end and ending is not None else [])]
        frames: list[Frame] = [Started(**identity(assign, 0), format=None)]
        frames += [Output(**identity(assign, 1 + i), data=data) for i, data in enumerate(outputs)]
        if end:
            frames.append(Completed(**identity(assign, 1 + len(outputs)), result={}))
        for frame in frames[first:]:
            self.send(frame)


def identity(assign: Assign | Message, seq: int) -> dict[str, Any]:
    """The fields that identify a frame of an attempt."""
    assert isinstance(assign, Assign)
    return {"request_id": assign.request_id, "attempt": assign.attempt, "seq": seq}


@asynccontextmanager
async def fake_worker(
    url: str,
    *,
    name: str = "box",
    instance: str | None = None,
    spaces: tuple[str, ...] = ("tts",),
    token: str | None = None,
    cable: Cable | Tap | None = None,
    **register: Any,
) -> AsyncIterator[FakeWorker]:
    """A worker that has sent `register`; its answer is read from `FakeWorker.peer`."""
    async with peer(url, "worker", token, connect_to=cable.connect if cable else None) as raw:
        told: dict[str, Any] = {"engine": "fake", "params": SCHEMA, "format": FORMAT}
        registration = Register(worker=name, instance=instance or an_id(), spaces=list(spaces), **(told | register))
        raw.send(registration)
        yield FakeWorker(raw, registration)


def samples(count: int, seed: int = 1) -> bytes:
    """`count` samples, different for each seed."""
    data = b""
    block = seed
    while len(data) < 2 * count:
        data += hashlib.sha256(f"{seed}:{block}".encode()).digest()
        block += 1
    return data[: 2 * count]
