"""Calls for tests: a relay with a space of them, its worker, and what is played."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from gpuworker.engines.mock import Tune, tune_key
from protocol import RelayClient, open_relay
from protocol.client.stream import Stream
from protocol.wire.frames import Output
from tests.support.processes import PATIENCE_S, Place, Proc, a_place, a_relay, a_worker

CONFIG = "[spaces.calls]\nrun_timeout_s = 3600\n"
BLUE, RED = (0, 0, 255), (255, 0, 0)
WORKER = ("--engine", "webrtc", "--space", "calls", "-o", "host=127.0.0.1", "-o", "ports=20300-20399")
L16 = "audio/L16;rate=24000;channels=1"
TUNE = Tune(24_000).pcm(tune_key("hello", 0), 0, 48_000)


@asynccontextmanager
async def a_place_for_calls(folder: Path, more: str = "") -> AsyncIterator[tuple[Place, Proc, Proc, RelayClient]]:
    place = a_place(folder, CONFIG + more)
    async with a_relay(place) as relay, a_worker(place, relay, *WORKER) as worker:
        url = (await relay.event("listening"))["urls"][0]
        token, _ = await place.run("relayd", "token", "create", "--role", "client", "--name", "caller")
        async with open_relay(url, token=token.decode().strip()) as client:
            yield place, relay, worker, client


async def until(stream: Stream, key: str, value: Any = None) -> Any:
    """What the stream tells next under this name."""
    with trio.fail_after(PATIENCE_S):
        async for frame in stream:
            if isinstance(frame, Output) and key in frame.data and value in (None, frame.data[key]):
                return frame.data[key]
    raise AssertionError(f"it ended without {key}")
