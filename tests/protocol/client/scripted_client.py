"""A client connected to a scripted relay, and the audio that its scripts send."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from protocol import (
    RelayClient,
    open_relay,
)
from protocol.link.backoff import Backoff
from tests.support.scripted_relay import URL, FakeRelay, Script

A, B, C = b"\1\0" * 100, b"\2\0" * 100, b"\3\0" * 100


@asynccontextmanager
async def relay_with(*scripts: Script, **options: Any) -> AsyncIterator[RelayClient]:
    """A client of a relay that follows these scripts, a connection each."""
    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, *scripts)
        async with open_relay(URL, connect_to=fake.connect, backoff=Backoff(draw=lambda: 1.0), **options) as relay:
            yield relay


async def all_audio(relay: RelayClient, **options: Any) -> bytes:
    async with relay.submit("tts", {"text": "hi"}, **options) as stream:
        return b"".join([pcm async for pcm in stream.audio()])
