"""Calls of conversations as users make them: by WHEP, and by the unchanged `openai` package."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import httpx2
import pytest
import trio

from tests.e2e.test_openai import client_of
from tests.support.caller import Caller
from tests.support.calls import WORKER
from tests.support.processes import PATIENCE_S, Place, Proc, a_place, a_relay, a_worker

CONFIG = (
    '[talk]\nreply = "llm"\nspeech = "tts"\ncalls = "calls"\nface = "face"\ntranscribe = "stt"\n'
    "[spaces.llm]\n[spaces.tts]\n[spaces.stt]\n[spaces.face]\n[spaces.calls]\nrun_timeout_s = 3600\n"
)
WORKERS = (
    ("--space", "llm", "--engine", "eliza", "-o", "pace_ms=0"),
    ("--space", "tts", "--engine", "mock"),
    ("--space", "face", "--engine", "face", "-o", "size=64"),
    ("--space", "stt", "--engine", "mock", "-o", "transcripts=I am sad."),
    WORKER,
)


@asynccontextmanager
async def a_place_to_talk(folder: Path) -> AsyncIterator[tuple[Place, Proc]]:
    place = a_place(folder, CONFIG)
    async with a_relay(place) as relay, AsyncExitStack() as stack:
        for worker in WORKERS:
            await stack.enter_async_context(a_worker(place, relay, *worker))
        yield place, relay


async def speak(caller: Caller) -> None:
    """Say something into the microphone, for half a second."""
    until, caller.speaks = caller.spoken + 25, True
    await trio.to_thread.run_sync(caller.wait, lambda: caller.spoken >= until)
    caller.speaks = False


async def say(http: httpx2.AsyncClient, text: str) -> bytes:
    """Say something; returns the speech of the reply, as the relay keeps it."""
    turn = (await http.post("/v1/talks/s1/say", json={"text": text, "interrupt": True})).json()["turn"]
    return (await http.get(f"/v1/requests/{turn['speech_request']}/audio", params={"format": "pcm"})).content


async def speak_until(http: httpx2.AsyncClient, caller: Caller, turns: int) -> list[str]:
    """Say something, until the user has said so much; returns what.

    It is said again: what is said while the relay is away, nobody hears.
    """
    with trio.fail_after(PATIENCE_S):
        while True:
            await speak(caller)
            for _ in range(30):
                said = [
                    turn for turn in (await http.get("/v1/talks/s1/turns")).json()["turns"] if turn["role"] == "user"
                ]
                if len(said) >= turns:
                    return [turn["content"] for turn in said]
                await trio.sleep(0.1)


@pytest.mark.trio
async def test_a_call_by_whep_is_heard_and_seen_also_after_the_relay_was_killed(tmp_path: Path) -> None:
    async with a_place_to_talk(tmp_path) as (place, relay):
        address = (await relay.event("listening"))["urls"][0].removeprefix("ws://").partition("/")[0]
        token, _ = await place.run("relayd", "token", "create", "--role", "client", "--name", "caller")
        headers = {"Authorization": f"Bearer {token.decode().strip()}"}
        with Caller() as caller:
            async with httpx2.AsyncClient(base_url=f"http://{address}", headers=headers, timeout=PATIENCE_S) as http:
                await http.post("/v1/talks", json={"session": "s1"})
                offer = await trio.to_thread.run_sync(caller.offer)
                sdp = {"Content-Type": "application/sdp"}
                answer = await http.post("/v1/talks/s1/whep", content=offer, headers=sdp)
                assert answer.status_code == 201, answer.text
                await trio.to_thread.run_sync(caller.accept, answer.text)
                speech = await say(http, "Hello")
                await trio.to_thread.run_sync(caller.wait, lambda: caller.hears(speech, 24_000))
                await trio.to_thread.run_sync(caller.wait, lambda: any(seen.width == 64 for seen in caller.seen))
                relay.send_signal(signal.SIGKILL)
                await relay.ended()
                async with a_relay(place, "--listen", address):
                    again = await say(http, "I am sad.")
                    await trio.to_thread.run_sync(caller.wait, lambda: caller.hears(again, 24_000))
                    assert (await http.delete(answer.headers["location"])).status_code == 200


@pytest.mark.trio
async def test_a_call_is_listened_to_also_after_the_relay_was_killed(tmp_path: Path) -> None:
    async with a_place_to_talk(tmp_path) as (place, relay):
        address = (await relay.event("listening"))["urls"][0].removeprefix("ws://").partition("/")[0]
        token, _ = await place.run("relayd", "token", "create", "--role", "client", "--name", "caller")
        headers = {"Authorization": f"Bearer {token.decode().strip()}"}
        with Caller(video=False, microphone=True) as caller:
            caller.speaks = False
            async with httpx2.AsyncClient(base_url=f"http://{address}", headers=headers, timeout=PATIENCE_S) as http:
                await http.post("/v1/talks", json={"session": "s1"})
                offer = await trio.to_thread.run_sync(caller.offer)
                sdp = {"Content-Type": "application/sdp"}
                answer = await http.post("/v1/talks/s1/whep", content=offer, headers=sdp)
                await trio.to_thread.run_sync(caller.accept, answer.text)
                assert await speak_until(http, caller, 1) == ["I am sad."]
                relay.send_signal(signal.SIGKILL)
                await relay.ended()
                async with a_relay(place, "--listen", address):
                    assert set(await speak_until(http, caller, 2)) == {"I am sad."}


@pytest.mark.trio
async def test_openais_package_calls(tmp_path: Path) -> None:
    async with a_place_to_talk(tmp_path) as (place, relay):
        with (
            Caller(video=False, channel="oai-events", microphone=True) as caller,
            await client_of(place, relay) as openai,
        ):
            caller.speaks = False
            create = partial(openai.realtime.calls.create, session={"type": "realtime", "model": "gpt-realtime"})
            offer = await trio.to_thread.run_sync(caller.offer)
            answer = await trio.to_thread.run_sync(partial(create, sdp=offer))
            await trio.to_thread.run_sync(caller.accept, answer.text)
            content = [{"type": "input_text", "text": "Hello"}]
            item = {"type": "message", "role": "user", "content": content}
            for event in ({"type": "conversation.item.create", "item": item}, {"type": "response.create"}):
                await trio.to_thread.run_sync(caller.say, json.dumps(event))

            def types() -> list[str]:
                return [json.loads(text)["type"] for text in caller.said]

            await trio.to_thread.run_sync(caller.wait, lambda: "output_audio_buffer.stopped" in types())
            assert "response.done" in types()
            assert caller.loudness(0) > 0.05
            await speak(caller)
            await trio.to_thread.run_sync(caller.wait, lambda: types().count("output_audio_buffer.stopped") == 2)
            assert "input_audio_buffer.speech_started" in types()
            call_id = answer.response.headers["location"].rpartition("/")[2]
            await trio.to_thread.run_sync(openai.realtime.calls.hangup, call_id)
