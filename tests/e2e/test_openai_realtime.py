"""The official `openai` package, unchanged, talks to a relay and workers as a user starts them: the Realtime API."""

import base64
import hashlib
import math
from array import array
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.test_openai import client_of
from tests.support.processes import a_place, a_relay, a_worker

#: The `openai` package uses `websockets` as that was.
pytestmark = pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning")
#: It says back what it is told, and how many messages it was told before.
MODEL = """
def reply(messages: list, max_tokens: int = 100):
    yield f"Message {len(messages)} was "
    for word in messages[-1]["content"].split():
        yield word + " "
"""
CONFIG = '[talk]\nreply = "llm"\nspeech = "tts"\n[spaces.llm]\n[spaces.tts]\n'


def user(text: str) -> Any:
    """An item."""
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def response_of(connection: Any, **options: Any) -> tuple[Any, str, bytes]:
    """Ask for a response: what it is in the end, its text, and its samples."""
    connection.response.create(**options)
    text, pcm = "", b""
    for event in connection:
        match event.type:
            case "response.output_audio_transcript.delta" | "response.output_text.delta":
                text += event.delta
            case "response.output_audio.delta":
                pcm += base64.b64decode(event.delta)
            case "response.done":
                return event.response, text, pcm
            case "error":
                raise AssertionError(event)
    raise AssertionError("the connection was closed")


def talk(client: Any) -> None:
    """A whole session with the synchronous client."""
    with client.realtime.connect(model="gpt-realtime") as connection:
        assert connection.recv().type == "session.created"
        connection.session.update(
            session={"type": "realtime", "instructions": "Be brief.", "audio": {"output": {"voice": "marin"}}}
        )
        assert connection.recv().session.instructions == "Be brief."
        connection.conversation.item.create(item=user("hello there"))
        done, text, pcm = response_of(connection)
        assert (done.status, text) == ("completed", "Message 2 was hello there ")
        assert done.output[0].content[0].transcript == text
        asked = {"model": "tts", "voice": "default", "input": text.strip(), "response_format": "pcm"}
        spoken = client.audio.speech.create(**asked).read()
        assert hashlib.sha256(pcm).digest() == hashlib.sha256(spoken).digest()
        # The client hears 1 s of the 2 s, and says so.
        connection.conversation.item.truncate(
            item_id=done.output[0].id, content_index=0, audio_end_ms=len(pcm) // 48 // 2
        )
        assert connection.recv().type == "conversation.item.truncated"
        connection.conversation.item.retrieve(item_id=done.output[0].id)
        heard = connection.recv().item.content[0].transcript
        assert 0 < len(heard) < len(text)
        assert text.startswith(heard)
        connection.conversation.item.create(item=user("and now"))
        done, text, pcm = response_of(connection, response={"output_modalities": ["text"]})
        assert (done.status, text, pcm) == ("completed", "Message 4 was and now ", b"")
        assert done.output[0].content[0].type == "output_text"


def cancel(client: Any) -> None:
    """Hear the beginning, and cancel."""
    with client.realtime.connect(model="llm") as connection:
        connection.conversation.item.create(item=user("a long text " * 40))
        connection.response.create()
        for event in connection:
            if event.type == "response.output_audio.delta":
                break
        connection.response.cancel()
        for event in connection:
            if event.type == "response.done":
                assert event.response.status == "cancelled"
                break
        connection.response.cancel()
        error = connection.recv()
        assert error.error.code == "response_cancel_not_active"


@pytest.mark.trio
async def test_the_openai_package_talks(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    place = a_place(tmp_path, CONFIG)
    words = ("--engine", "function", "-o", "call=model:reply", "--space", "llm")
    async with (
        a_relay(place) as relay,
        a_worker(place, relay, *words, PYTHONPATH=str(tmp_path)),
        a_worker(place, relay, "--engine", "mock", "-o", "speed=0", "--space", "tts"),
    ):
        with await client_of(place, relay) as client:
            await trio.to_thread.run_sync(partial(talk, client))


@pytest.mark.trio
async def test_the_openai_package_interrupts(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    place = a_place(tmp_path, CONFIG)
    words = ("--engine", "function", "-o", "call=model:reply", "--space", "llm")
    async with (
        a_relay(place) as relay,
        a_worker(place, relay, *words, PYTHONPATH=str(tmp_path)),
        a_worker(place, relay, "--engine", "mock", "-o", "speed=1", "--space", "tts"),
    ):
        with await client_of(place, relay) as client:
            await trio.to_thread.run_sync(partial(cancel, client))
        await relay.event("request cancelled")


def tone(seconds: float) -> bytes:
    """What the mock takes for speech."""
    step = 2 * math.pi * 440 / 24_000
    return array("h", (round(8_000 * math.sin(step * at)) for at in range(round(seconds * 24_000)))).tobytes()


def say(connection: Any, pcm: bytes) -> None:
    """Send it as a microphone would, in pieces of 100 ms, but faster."""
    for start in range(0, len(pcm), 4_800):
        connection.input_audio_buffer.append(audio=base64.b64encode(pcm[start : start + 4_800]).decode())


def speak(client: Any) -> None:
    """Speak, be answered, interrupt the answer by speaking on, and be answered again."""
    silence = bytes(2 * 24_000)
    with client.realtime.connect(model="gpt-realtime") as connection:
        assert connection.recv().session.audio.input.turn_detection.type == "server_vad"
        say(connection, tone(0.5) + silence)
        heard, said, done = "", "", []
        for event in connection:
            match event.type:
                case "conversation.item.input_audio_transcription.completed":
                    heard += event.transcript + "|"
                case "response.output_audio.delta" if heard == "Tell me a story.|":
                    say(connection, tone(0.5) + silence)
                    heard += "…"
                case "input_audio_buffer.speech_started" if heard.endswith("…"):
                    heard += "!"
                case "response.done":
                    done.append((event.response.status, getattr(event.response.status_details, "reason", None)))
                    if len(done) == 2:
                        said = event.response.output[0].content[0].transcript
                        break
                case "error":
                    raise AssertionError(event)
        assert heard == "Tell me a story.|…!Stop.|"
        assert done == [("cancelled", "turn_detected"), ("completed", None)]
        assert said.endswith("Stop. ")


@pytest.mark.trio
async def test_the_openai_package_is_heard_and_interrupts_by_speaking(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    config = CONFIG.replace("[talk]", '[talk]\ntranscribe = "stt"\ninstructions = "Be brief."') + "[spaces.stt]\n"
    place = a_place(tmp_path, config)
    words = ("--engine", "function", "-o", "call=model:reply", "--space", "llm")
    ears = ("--engine", "mock", "-o", "transcripts=Tell me a story.|Stop.", "--space", "stt")
    async with (
        a_relay(place) as relay,
        a_worker(place, relay, *words, PYTHONPATH=str(tmp_path)),
        a_worker(place, relay, "--engine", "mock", "-o", "speed=1", "--space", "tts"),
        a_worker(place, relay, *ears),
    ):
        with await client_of(place, relay) as client:
            await trio.to_thread.run_sync(partial(speak, client))
