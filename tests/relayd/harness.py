"""A real daemon in the test's own event loop, and workers and clients for it."""

import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from protocol.address import parse_address
from protocol.codec import decode
from protocol.link import Link, log_in, open_link
from protocol.messages import (
    FROM_RELAY,
    PROTOCOL_VERSION,
    Assign,
    Audio,
    AudioFormat,
    Completed,
    Frame,
    Hello,
    Message,
    Register,
    Started,
    Welcome,
)
from relayd.app import serve
from relayd.config import Config, load_config

FORMAT = AudioFormat(sample_rate=24_000)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 1}, "rate": {"type": "integer"}},
    "required": ["text"],
    "additionalProperties": False,
}


def a_config(state_dir: Path, **overrides: Any) -> Config:
    """Settings for a test's daemon: no TCP port unless asked for, one space `tts`."""
    plain: dict[str, Any] = {"state_dir": state_dir, "listen": "", "spaces": {"tts": {}}}
    return load_config(Path(_empty_file(state_dir)), environ={}, overrides=plain | overrides)


def _empty_file(state_dir: Path) -> Path:
    state_dir.mkdir(parents=True, exist_ok=True)
    path = state_dir / "relayd.toml"
    path.touch()
    return path


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[list[str]]:
    """The daemon, until the end of the block; gives its URLs. It is cut off there as by a crash, without a drain."""
    urls: list[str] = []
    ready = trio.Event()

    def on_ready(given: Any) -> None:
        urls.extend(given)
        ready.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(config, on_ready=on_ready))
        with trio.fail_after(10):
            await ready.wait()
        yield urls
        nursery.cancel_scope.cancel()


def an_id() -> str:
    """A fresh request or instance id."""
    return secrets.token_hex(16)


@attrs.define(eq=False)
class Peer:
    """A raw connection: messages out, messages in."""

    link: Link
    welcome: Welcome

    def send(self, message: Message) -> None:
        self.link.send(message)

    async def next(self, *kinds: type[Message]) -> Any:
        """The next message of one of these kinds (any, if none); others are passed over."""
        with trio.fail_after(10):
            while True:
                message = decode(await self.link.receive(), FROM_RELAY)
                if not kinds or isinstance(message, kinds):
                    return message


@asynccontextmanager
async def peer(url: str, role: str, token: str | None = None, **more: Any) -> AsyncIterator[Peer]:
    """A logged-in connection."""
    async with open_link(parse_address(url), **more) as link:
        yield Peer(link, await log_in(link, Hello(version=PROTOCOL_VERSION, role=role, token=token)))


@attrs.define(eq=False)
class FakeWorker:
    """A worker whose every move the test makes."""

    peer: Peer
    instance: str
    name: str

    async def assigned(self) -> Assign:
        assign: Assign = await self.peer.next(Assign)
        return assign

    def send(self, message: Message) -> None:
        self.peer.send(message)

    def speak(self, assign: Assign, pcm: list[bytes], *, first: int = 0, end: bool = True) -> None:
        """`started`, an audio frame for each of `pcm`, and `completed`; frames below `first` are left out."""
        frames: list[Frame] = [Started(**seat(assign, 0), format=FORMAT)]
        frames += [Audio(**seat(assign, 1 + i), pcm=data) for i, data in enumerate(pcm)]
        if end:
            frames.append(Completed(**seat(assign, 1 + len(pcm)), result={"chunks": len(pcm)}))
        for frame in frames[first:]:
            self.send(frame)


def seat(assign: Assign | Message, seq: int) -> dict[str, Any]:
    """Which frame of which attempt."""
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
    **register: Any,
) -> AsyncIterator[FakeWorker]:
    """A registered worker, its `registered` taken; see `FakeWorker.peer` for a refusal."""
    async with peer(url, "worker", token) as raw:
        worker = FakeWorker(raw, instance or an_id(), name)
        raw.send(
            Register(
                worker=name,
                instance=worker.instance,
                spaces=list(spaces),
                **({"engine": "fake", "params": SCHEMA, "format": FORMAT} | register),
            )
        )
        yield worker


def samples(count: int, seed: int = 1) -> bytes:
    """`count` samples that look like no others."""
    data = b""
    block = seed
    while len(data) < 2 * count:
        data += hashlib.sha256(f"{seed}:{block}".encode()).digest()
        block += 1
    return data[: 2 * count]


