"""A call when a process of it is killed: the relay, or the worker that holds the call."""

import os
import signal
from pathlib import Path

import pytest
import trio

from protocol import Live, RequestFailed
from protocol.client.inputs import InputSource
from protocol.wire.frames import Output
from tests.support.caller import Caller, an_ivf
from tests.support.calls import BLUE, L16, TUNE, a_place_for_calls, until
from tests.support.processes import PATIENCE_S, a_relay, a_worker, engines_of


@pytest.mark.trio
async def test_a_killed_relay_does_not_interrupt_the_media_of_a_call(tmp_path: Path) -> None:
    async with a_place_for_calls(tmp_path) as (place, relay, _, client):
        with Caller() as caller:
            offer = await trio.to_thread.run_sync(caller.offer)
            inputs: dict[str, InputSource] = {"commands": Live(), "idle": (an_ivf(BLUE, 10), "video/x-ivf")}
            async with client.submit("calls", {"offer": offer}, inputs=inputs) as call:
                await trio.to_thread.run_sync(caller.accept, await until(call, "answer"))
                await until(call, "state", "connected")
                url = (await relay.event("listening"))["urls"][0]
                async with client.submit("calls", {"peer": call.request_id}, inputs={"audio": (TUNE, L16)}) as play:
                    await until(play, "played")
                    relay.send_signal(signal.SIGKILL)
                    await relay.ended()
                    await trio.to_thread.run_sync(caller.wait, lambda: caller.hears(TUNE, 24_000))
                    seen = len(caller.seen)
                    await trio.to_thread.run_sync(caller.wait, lambda: len(caller.seen) > seen + 20)
                    async with a_relay(place, "--listen", url.removeprefix("ws://").partition("/")[0]):
                        played = [frame.data["played"] async for frame in play if isinstance(frame, Output)]
                        assert played[-1] == len(TUNE) // 2
                        await call.feed("commands", '{"hang_up": true}\n')
                        await until(call, "state", "closed")


@pytest.mark.trio
async def test_a_killed_gateway_ends_its_calls_and_nothing_else(tmp_path: Path) -> None:
    async with a_place_for_calls(tmp_path, "[spaces.tts]\n") as (place, relay, worker, client):
        mock = ("--engine", "mock", "--space", "tts")
        with Caller() as caller, Caller() as again:
            async with a_worker(place, relay, *mock), client.submit("tts", {"text": "hello"}) as speech:
                offer = await trio.to_thread.run_sync(caller.offer)
                with pytest.raises(RequestFailed) as fault:  # noqa: PT012 - the block of the call ends with it
                    async with client.submit("calls", {"offer": offer}, inputs={"commands": Live()}) as call:
                        await trio.to_thread.run_sync(caller.accept, await until(call, "answer"))
                        await until(call, "state", "connected")
                        (engine,) = engines_of(worker)
                        os.kill(engine, signal.SIGKILL)
                        await until(call, "never")
                assert fault.value.code == "engine_failed"
                pcm = b"".join([piece async for piece in speech.audio()])
                assert len(pcm) > 2 * 24_000
                offer = await trio.to_thread.run_sync(again.offer)
                with trio.fail_after(PATIENCE_S):
                    async with client.submit("calls", {"offer": offer}, inputs={"commands": Live()}) as call:
                        await trio.to_thread.run_sync(again.accept, await until(call, "answer"))
                        await until(call, "state", "connected")
