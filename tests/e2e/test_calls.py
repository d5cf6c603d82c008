"""A call through a real relay: aiortc's own client hears what is played on it, and sees it."""

from pathlib import Path

import pytest
import trio

from protocol import From, Live
from protocol.client.inputs import InputSource
from protocol.wire.frames import Output
from tests.support.caller import Caller, an_ivf
from tests.support.calls import BLUE, L16, RED, TUNE, a_place_for_calls, until
from tests.support.processes import a_worker


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


@pytest.mark.trio
async def test_speech_and_video_that_are_still_made_are_heard_and_seen_by_pipes(tmp_path: Path) -> None:
    async with a_place_for_calls(tmp_path, "[spaces.tts]\n") as (place, relay, _, client):
        mock = ("--engine", "mock", "--space", "tts", "--slots", "2")
        with Caller() as caller:
            async with a_worker(place, relay, *mock):
                offer = await trio.to_thread.run_sync(caller.offer)
                inputs: dict[str, InputSource] = {"commands": Live(), "idle": (an_ivf(BLUE, 10), "video/x-ivf")}
                async with client.submit("calls", {"offer": offer}, inputs=inputs) as call:
                    await trio.to_thread.run_sync(caller.accept, await until(call, "answer"))
                    await until(call, "state", "connected")
                    said = {"text": "hello", "duration_s": 2, "speed": 4}
                    video = said | {"output": "video", "chunk_ms": 40}
                    async with (
                        client.submit("tts", said, group="turn", detach=True) as speech,
                        client.submit("tts", video, group="turn", detach=True) as face,
                        client.submit(
                            "calls",
                            {"peer": call.request_id},
                            inputs={"audio": From(speech.request_id), "video": From(face.request_id)},
                            group="turn",
                        ) as play,
                    ):
                        played = [frame.data["played"] async for frame in play if isinstance(frame, Output)]
                    assert played[-1] == 48_000
                    await trio.to_thread.run_sync(caller.wait, lambda: caller.hears(TUNE, 24_000, 0.6))
                    assert sum(seen.width == 16 for seen in caller.seen) > 20, "the mock's pictures are small"
                    await trio.to_thread.run_sync(caller.wait, lambda: caller.seen[-1].width == 64)


@pytest.mark.trio
async def test_the_microphone_of_a_call_is_piped_into_another_request(tmp_path: Path) -> None:
    async with a_place_for_calls(tmp_path, "[spaces.tts]\n") as (place, relay, _, client):
        with Caller(microphone=True) as caller:
            async with a_worker(place, relay, "--engine", "mock", "--space", "tts"):
                offer = await trio.to_thread.run_sync(caller.offer)
                params = {"offer": offer, "listen": True}
                async with client.submit("calls", params, inputs={"commands": Live()}) as call:
                    await trio.to_thread.run_sync(caller.accept, await until(call, "answer"))
                    heard = {"audio": From(call.request_id)}
                    async with client.submit("tts", {"text": "", "output": "text"}, inputs=heard) as ear:
                        await until(call, "state", "connected")
                        await trio.to_thread.run_sync(caller.wait, lambda: len(caller.heard) > 50)
                        await call.feed("commands", '{"hang_up": true}\n')
                        told = await until(ear, "audio")
    assert told["media_type"] == "audio/L16;rate=16000;channels=1"
    assert told["size"] > 16_000
