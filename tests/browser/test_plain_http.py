"""The page over plain HTTP from another machine, to browsers no secure context; and the form of any space."""

import hashlib
import os
from pathlib import Path

import attrs
import pytest

from tests.browser.test_page import HEARS, samples, tune
from tests.browser.window import HEARD_LIVE, Browser, BrowserPlace, a_window

#: What the worker does: tells what it was given.
DRAW = """
import hashlib

def draw(style: str = "plain", *, voice: bytes, prompt: str, note: str | None = None):
    yield f"{prompt}, {style}, {note}: {len(voice)} bytes, {hashlib.sha256(voice).hexdigest()}"
"""

#: What Chromium says of a page that is no secure context, of how such a page plays sound, and of a download from it.
EXPECTED = (
    "The Cross-Origin-Opener-Policy header has been ignored",
    "The ScriptProcessorNode is deprecated",
    "was loaded over an insecure connection",
)


@pytest.mark.trio
async def test_only_the_microphone_needs_a_secure_context(site: BrowserPlace, browser: Browser) -> None:
    other = attrs.evolve(site, url=site.url.replace("127.0.0.1", "relay.test"))
    async with a_window(browser) as window:
        await window.log_in(other)
        assert not await window.js("window.isSecureContext")
        await window.submit("from afar")
        await window.until(HEARD_LIVE)
        await window.until_state("completed")
        assert samples(await window.download()) == tune("from afar")
        await window.until("document.querySelector('.clock').textContent.startsWith('0:02.1 /')")  # played to its end
        await window.until("window.loudness() < 0.001")
        await window.click(".play")
        await window.until(HEARS)  # and once more
    assert [error for error in browser.errors() if not any(words in error for words in EXPECTED)] == []


@pytest.mark.trio
async def test_the_first_text_is_the_large_field_and_files_are_sent_from_anywhere(
    tmp_path: Path, site: BrowserPlace, browser: Browser
) -> None:
    (site.folder / "draw_it.py").write_text(DRAW)
    file = tmp_path / "voice.wav"
    file.write_bytes(os.urandom(700_001))  # more than one piece of an upload
    other = attrs.evolve(site, url=site.url.replace("127.0.0.1", "relay.test"))
    run = ("--space", "echo", "--engine", "function", "-o", "call=draw_it:draw")
    async with site.start("gpuworker", "run", *run), a_window(browser) as window:
        await window.log_in(other, "echo")
        assert await window.words("#text-label") == "prompt"
        tops = "['text', 'record-voice'].map((id) => document.getElementById(id).getBoundingClientRect().top)"
        text_top, files_top = await window.js(tops)
        assert text_top < files_top
        assert await window.js("document.getElementById('param-prompt')") is None
        assert await window.js("document.getElementById('record-voice').disabled")
        assert (await window.words("#inputs .hint")).startswith("Browsers allow recording only over HTTPS")
        await window.do(lambda driver: driver.find_element("css selector", "#inputs input").send_keys(str(file)))
        await window.js("document.getElementById('more').open = true")
        await window.type("param-note", "as it is")
        await window.submit("a house")
        assert await window.words(".request .said") == "a house"
        await window.until_state("completed")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert await window.words(".request .output") == f"a house, plain, as it is: 700001 bytes, {digest}"
    assert [error for error in browser.errors() if not any(words in error for words in EXPECTED)] == []
