"""A call through a real relay: aiortc's own client hears what is played on it, and sees it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from gpuworker.engines.mock import Tune, tune_key
from protocol import Live, RelayClient, open_relay
from protocol.client.inputs import InputSource
from protocol.client.stream import Stream
from protocol.wire.frames import Output
from tests.support.caller import Caller, an_ivf
from tests.support.processes import PATIENCE_S, Place, Proc, a_place, a_relay, a_worker

BLUE, RED = (0, 0, 255), (255, 0, 0)
WORKER = ("--engine", "webrtc", "--space", "calls", "-o", "host=127.0.0.1", "-o", "ports=50300-50399")
L16 = "audio/L16;rate=24000;channels=1"
TUNE = Tune(24_000).pcm(tune_key("hello", 0), 0, 48_000)


@asynccontextmanager
async def a_place_for_calls(folder: Path) -> AsyncIterator[tuple[Place, Proc, Proc, RelayClient]]:
    place = a_place(folder, "[spaces.calls]\nrun_timeout_s = 3600\n")
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


@pytest.mark.trio
async def test_a_caller_hears_and_sees_what_is_played_on_its_call(tmp_path: Path) -> None:
    async with a_place_for_calls(tmp_path) as (_, _, _, client):
        with Caller() as caller:
            offer = await trio.to_thread.run_sync(caller.offer)
            inputs: dict[str, InputSource] = {"commands": Live(), "idle": (an_ivf(BLUE, 10), "video/x-ivf")}
            async with client.submit("calls", {"offer": offer}, inputs=inputs) as call:
                await trio.to_thread.run_sync(caller.accept, await until(call, "answer"))
                await until(call, "state", "connected")
                await trio.to_thread.run_sync(caller.wait, lambda: len(caller.seen) > 12)
                assert caller.seen[-1].colour[1] > 150, "the idle loop is blue"
                inputs = {"audio": (TUNE, L16), "video": (an_ivf(RED, 50), "video/x-ivf")}
                async with client.submit("calls", {"peer": call.request_id}, inputs=inputs) as play:
                    played = [frame.data["played"] async for frame in play if isinstance(frame, Output)]
                assert played[-1] == len(TUNE) // 2
                assert played == sorted(played)
                assert len(played) > 8
                await trio.to_thread.run_sync(caller.wait, lambda: caller.hears(TUNE, 24_000))
                red = [seen for seen in caller.seen if seen.colour[2] > 200]
                assert 45 <= len(red) <= 50
                await trio.to_thread.run_sync(caller.wait, lambda: caller.seen[-1].colour[1] > 150)
                await call.feed("commands", '{"hang_up": true}\n')
                await until(call, "state", "closed")
