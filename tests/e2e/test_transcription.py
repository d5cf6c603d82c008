"""The official `openai` package, unchanged, has a relay write down what is said, by engine `mock`."""

import io
import math
import wave
from array import array
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import trio

from tests.e2e.test_openai import client_of
from tests.support.processes import a_place, a_relay, a_worker

RATE = 16_000


def recording(*seconds: float) -> bytes:
    """A WAV with a tone, and a second of silence behind it, for each of these."""
    pcm = array("h")
    for each in seconds:
        pcm.extend(round(8_000 * math.sin(2 * math.pi * 440 * at / RATE)) for at in range(round(each * RATE)))
        pcm.extend(bytes(RATE))
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, RATE, 0, "NONE", ""))
        wav.writeframes(pcm.tobytes())
    return file.getvalue()


@pytest.mark.trio
async def test_the_openai_package_has_a_file_written_down_in_every_format(tmp_path: Path) -> None:
    place = a_place(tmp_path, "[spaces.stt]\n")
    command = ("--engine", "mock", "--space", "stt", "-o", "transcripts=Good morning.|Yes.")
    async with a_relay(place) as relay, a_worker(place, relay, *command):
        with await client_of(place, relay) as client:
            file = ("hello.wav", recording(1.0))
            create: Any = partial(client.audio.transcriptions.create, model="whisper-1", file=file)

            def all_of_them() -> None:
                assert create().text == "Good morning."
                assert create(response_format="text") == "Good morning.\n"
                told = create(response_format="verbose_json", timestamp_granularities=["segment"])
                assert (told.text, told.language, told.duration) == ("Good morning.", "en", 2.0)
                assert [segment.text for segment in told.segments] == ["Good", " morning."]
                assert "00:00:00,000 --> 00:00:01,000\nGood\n" in create(response_format="srt")
                kinds = [(event.type, getattr(event, "delta", None)) for event in create(stream=True)]
                deltas = [("transcript.text.delta", "Good"), ("transcript.text.delta", " morning.")]
                assert kinds == [*deltas, ("transcript.text.done", None)]
                with pytest.raises(openai.BadRequestError, match="reads audio/l16"):
                    create(file=("hello.mp3", b"ID3" + bytes(60)))

            await trio.to_thread.run_sync(all_of_them)
        output, _ = await place.run("relay", "submit", "--space", "stt", "--input", "audio=-", stdin=recording(1, 1))
        lines = output.decode().splitlines()
        assert [line for line in lines if line and not line.startswith("{")] == ["Good", " morning.", "Yes."]
        assert sum(line.startswith('{"speech_stopped"') for line in lines) == 2
