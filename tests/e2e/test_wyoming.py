"""The packages `wyoming` and `wyoming-bench`, unchanged, and what Home Assistant does with the first of them."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.event import Event
from wyoming.handle import Handled
from wyoming.info import Describe, Info
from wyoming.tts import (
    Synthesize,
    SynthesizeChunk,
    SynthesizeStart,
    SynthesizeStop,
    SynthesizeStopped,
    SynthesizeVoice,
)

from tests.support.processes import PATIENCE_S, Place, Proc, a_place, a_relay, a_worker

CONFIG = """
[wyoming]
listen = "127.0.0.1:0"

[talk]
reply = "llm"
speech = "tts"
transcribe = "stt"

[spaces.tts]
[spaces.stt]
[spaces.llm]
"""
SENTENCES = ("It was a bright cold day in April. ", "The clocks were ", "striking thirteen.")


async def port_of(relay: Proc) -> int:
    listening = await relay.event("listening")
    return int(listening["doors"][-1].rpartition(":")[2])


async def next_event(client: AsyncTcpClient) -> Event:
    event = await asyncio.wait_for(client.read_event(), PATIENCE_S)
    assert event is not None, "connection lost"
    return event


async def until(client: AsyncTcpClient, last: Any) -> list[Event]:
    events = [await next_event(client)]
    while not last.is_type(events[-1].type):
        events.append(await next_event(client))
    return events


def seconds(events: list[Event]) -> float:
    chunks = [AudioChunk.from_event(event) for event in events if AudioChunk.is_type(event.type)]
    return sum(chunk.seconds for chunk in chunks)


async def speaks_listens_and_converses(port: int) -> None:
    """What Home Assistant's integration does: a connection for each thing that is asked."""
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event(Describe().event())
        info = Info.from_event(await next_event(client))
    (speech,), (hearing,), (talk,) = info.tts, info.asr, info.handle
    assert all(voice.installed and voice.languages for voice in speech.voices)
    assert {"en-US", "de", "zh-CN"} <= {language for voice in speech.voices for language in voice.languages}
    assert [model.name for model in hearing.models] == ["stt"]
    assert speech.supports_synthesize_streaming
    assert talk.supports_handled_streaming
    async with AsyncTcpClient("127.0.0.1", port) as client:
        voice = SynthesizeVoice(name=next(voice.name for voice in speech.voices if voice.languages == ["de"]))
        await client.write_event(Synthesize("Guten Morgen", voice=voice).event())
        whole = await until(client, AudioStop)
        assert AudioStart.from_event(whole[0]).rate == 22_050
        assert 0.5 < seconds(whole) < 5
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event(SynthesizeStart().event())
        heard: list[Event] = []
        for text in SENTENCES[:2]:  # the first is known to be whole when the next one begins
            await client.write_event(SynthesizeChunk(text).event())
        heard += await until(client, AudioChunk)
        await client.write_event(SynthesizeChunk(SENTENCES[2]).event())
        await client.write_event(Synthesize("".join(SENTENCES)).event())
        await client.write_event(SynthesizeStop().event())
        heard += await until(client, SynthesizeStopped)
        assert 3 < seconds(heard) < 12
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event(Transcribe(language="en-US").event())
        form = {"rate": 16_000, "width": 2, "channels": 1}
        await client.write_event(AudioStart(**form).event())
        for _ in range(20):
            await client.write_event(AudioChunk(audio=b"\x00\x40\x00\xc0" * 512, **form).event())
        await client.write_event(AudioStop().event())
        assert Transcript.from_event((await until(client, Transcript))[-1]).text == "Turn on the light."
    async with AsyncTcpClient("127.0.0.1", port) as client:
        for text in ("My name is Ann.", "What did I say?"):
            await client.write_event(Transcript(text, context={"conversation_id": "01JDX"}, language="en").event())
            handled = Handled.from_event((await until(client, Handled))[-1])
            assert handled.text
            assert handled.context == {"conversation_id": "01JDX"}


@pytest.mark.trio
async def test_the_packages_speak_listen_and_converse(tmp_path: Path) -> None:
    place = a_place(tmp_path, CONFIG)
    async with (
        a_relay(place) as relay,
        a_worker(place, relay, "--engine", "espeak", "--space", "tts"),
        a_worker(place, relay, "--engine", "mock", "--space", "stt", "-o", "transcripts=Turn on the light."),
        a_worker(place, relay, "--engine", "eliza", "--space", "llm"),
    ):
        port = await port_of(relay)
        await trio.to_thread.run_sync(asyncio.run, speaks_listens_and_converses(port))
        told = await bench(place, "tts", f"127.0.0.1:{port}", "--rounds", "1", "--warmup", "0", "--texts", *SENTENCES)
        assert told.count("ok=3 fail=0") == 2, told
        assert not [line for line in relay.lines if '"level": "error"' in line]


async def bench(place: Place, *args: str) -> str:
    """What `wyoming-bench` prints."""
    command = Path(sys.executable).with_name("wyoming-bench")
    with trio.fail_after(PATIENCE_S):
        done = await trio.run_process(
            [str(command), *args], capture_stdout=True, capture_stderr=True, check=False, cwd=place.folder
        )
    told = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, told
    return told
