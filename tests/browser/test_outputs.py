"""Results that are files: shown, played and downloaded as the bytes they are."""

import base64
from pathlib import Path

import pytest

from tests.browser.window import Browser, BrowserPlace, a_window

#: One pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
#: What the worker does: makes a picture larger than a message, sound, words, or bytes of no known kind.
MAKER = f"""
import io, wave

PNG = {PNG!r}

def make(text: str):
    if text == "picture":
        yield PNG + bytes(1_500_000)
    elif text == "sound":
        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(bytes(8000))
        yield file.getvalue()
        yield "and words"
    else:
        yield b"\\0\\1\\2" * 1000
"""


@pytest.mark.trio
async def test_pictures_and_sound_are_shown_and_bytes_are_downloaded(
    tmp_path: Path, site: BrowserPlace, browser: Browser
) -> None:
    (site.folder / "maker.py").write_text(MAKER)
    run = ("--space", "echo", "--engine", "function", "-o", "call=maker:make")
    async with site.start("gpuworker", "run", *run), a_window(browser) as window:
        await window.log_in(site, "echo")
        await window.submit("picture")
        await window.until_state("completed")
        await window.until("document.querySelector('.request .media img').naturalWidth === 1")
        assert await window.js("document.querySelector('.request .output').hidden")
        assert await window.download("png") == PNG + bytes(1_500_000)

        await window.submit("sound")
        await window.until_state("completed")
        await window.until("document.querySelector('.request .media audio').duration === 0.5")
        assert await window.words(".request .output") == "and words"
        assert (await window.download())[:4] == b"RIFF"

        await window.submit("bytes")
        await window.until_state("completed")
        assert await window.words(".request .output") == "[application/octet-stream · 3 KiB]"
        assert await window.download("bin") == b"\0\1\2" * 1000
    assert browser.errors() == []
