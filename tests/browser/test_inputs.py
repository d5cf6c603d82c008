"""Files and the microphone, for a space that takes audio."""

import hashlib
import os
import wave
from pathlib import Path

import pytest

from tests.browser.window import Browser, BrowserPlace, a_window

#: What the worker does: tells what it was given, and says it again.
ECHO = """
import hashlib, io, wave

def say(text: str, voice: bytes, speed: float = 1.0):
    with wave.open(io.BytesIO(voice)) as file:
        rate, frames = file.getframerate(), file.getnframes()
        yield file.readframes(frames)
    yield f"{text}: {len(voice)} bytes, {hashlib.sha256(voice).hexdigest()}, {frames / rate:.1f} s, speed {speed:g}"
"""


@pytest.mark.trio
async def test_a_file_and_a_recording_reach_the_worker_as_they_are(
    tmp_path: Path, site: BrowserPlace, browser: Browser
) -> None:
    (site.folder / "echo_back.py").write_text(ECHO)
    sound = tmp_path / "voice.wav"
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes(os.urandom(1_000_000))  # more than one piece of an upload
    run = ("--space", "echo", "--engine", "function", "-o", "call=echo_back:say", "-o", "sample_rate=48000")
    async with site.start("gpuworker", "run", *run), a_window(browser) as window:
        await window.log_in(site, "echo")
        await window.click("#submit")
        await window.until("document.getElementById('text').matches(':invalid')")  # the browser asks for a text
        await window.type("text", "A file")
        await window.click("#submit")
        await window.until("document.getElementById('ask-fault').textContent.startsWith('voice is required')")

        await window.do(lambda driver: driver.find_element("css selector", "#inputs input").send_keys(str(sound)))
        await window.click("#more summary")
        await window.type("param-speed", "1.5")
        await window.submit("A file")
        await window.until_state("completed")
        whole = sound.read_bytes()
        told = f"A file: {len(whole)} bytes, {hashlib.sha256(whole).hexdigest()}, 10.4 s, speed 1.5"
        assert await window.words(".request .output") == told

        await window.click("#record-voice")
        await window.until("document.querySelector('.told').textContent === 'Recording… 1.0 s'")
        assert await window.words("#record-voice") == "Stop"
        await window.click("#record-voice")
        await window.until("document.querySelector('.told').textContent.startsWith('Recorded: ')")
        await window.until(
            "document.querySelector('#inputs audio').duration > 0.9"
        )  # to be listened to before it is sent
        await window.submit("A voice")
        await window.until_state("completed")
        said = await window.words(".request .output")
        assert said.startswith("A voice: ")
        assert 0.9 < float(said.split(", ")[2].removesuffix(" s")) < 20
        assert await window.js("document.querySelector('.wave').offsetWidth > 100")  # and can be heard again
    assert browser.errors() == []
