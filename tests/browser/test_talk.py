"""The tab to talk in, with an ELIZA that takes its time and a voice that can be heard."""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import pytest

from tests.browser.test_access import nameless, pale
from tests.browser.test_modules import call
from tests.browser.window import LOUD, Browser, BrowserPlace, Window, a_site, a_window
from tests.support.processes import Proc, a_relay, a_worker

CONFIG = '[talk]\nreply = "llm"\nspeech = "tts"\n[spaces.llm]\n[spaces.tts]\n'
#: The mock's tune for a text is 0.1 s a character, made as fast as it is played.
WORKERS = (("--space", "llm", "--engine", "eliza", "-o", "pace_ms=100"), ("--space", "tts", "--engine", "mock"))
HEARS = f"window.loudness() > {LOUD}"
SILENT = "window.loudness() < 0.001"
TURNS = "[...document.querySelectorAll('.turn')].map((turn) => turn.querySelector('p').textContent)"
STATES = "[...document.querySelectorAll('.turn')].map((turn) => turn.dataset.state).join()"
OPENING = "Number(document.querySelector('#face .mouth').dataset.opening)"


#: Remembers how wide the mouth was at most.
WATCH_WIDTH = """(() => {
  const mouth = document.querySelector("#face .mouth");
  window.widest = 0;
  const look = () => { window.widest = Math.max(window.widest, Number(mouth.getAttribute("rx"))); };
  new MutationObserver(look).observe(mouth, { attributes: true });
  return true;
})()"""


@asynccontextmanager
async def a_talk(
    folder: Path, workers: tuple[tuple[str, ...], ...] = WORKERS, config: str = CONFIG
) -> AsyncIterator[tuple[BrowserPlace, Proc]]:
    async with a_site(folder, config) as (site, relay), AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(a_worker(site, relay, *worker))
        yield site, relay


async def by_link(window: Window, site: BrowserPlace) -> None:
    """Open the link to which that of `relayd demo --talk` leads."""
    await window.open(f"{site.url}#login={site.token}")
    await window.until("document.getElementById('talk-text').offsetHeight > 0")


async def say(window: Window, text: str) -> None:
    await window.type("talk-text", text, "\n")


@pytest.mark.trio
async def test_what_is_typed_is_answered_heard_interrupted_and_kept(tmp_path: Path, browser: Browser) -> None:
    async with a_talk(tmp_path) as (site, _), a_window(browser) as window:
        await by_link(window, site)
        assert await window.js("location.hash") == ""
        await say(window, "Hello, 你好")
        spoken = f"({TURNS})[1]?.length > 1 && {HEARS} && {OPENING} > 0.3"  # all of it while it is still written
        await window.until(f"{STATES} === 'done,thinking' && {spoken}")
        await window.until(f"{STATES} === 'done,done'")
        first = await window.js(TURNS)
        assert first[0] == "Hello, 你好"
        await window.until(f"{SILENT} && {OPENING} < 0.05 && document.getElementById('talk-stop').disabled")

        await say(window, "I am sad about a great many things.")
        await window.until(f"{HEARS} && (document.getElementById('talk-stop').click(), true)")  # at once
        await window.until(f"{STATES} === 'done,done,done,interrupted' && {SILENT}")
        assert await window.words(".turn:last-child small") == "interrupted"
        assert await window.js("document.querySelector('.turn:last-child del') !== null")  # what nobody heard
        kept = await window.js(TURNS)
        assert kept[:2] == first

        await window.do(lambda driver: driver.refresh())
        await window.until(f"JSON.stringify({TURNS}) === JSON.stringify(values[0])", kept)
        await window.click(".turn .again:not([hidden])")
        await window.until(HEARS)
        assert await nameless(window) == []
        narrow = {"width": 320, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await window.cdp("Emulation.setDeviceMetricsOverride", **narrow)
        assert await pale(window) == []
        assert await window.js("document.documentElement.scrollWidth") <= 320

        async with a_window(browser) as other:  # another device
            await by_link(other, site)
            await other.until(f"JSON.stringify({TURNS}) === JSON.stringify(values[0])", kept)
            await other.click("#language")
            assert await other.words("#talk-send") == "发送"
            await say(other, "Good bye")
            await window.until(f"({TURNS})[4] === 'Good bye' && ({STATES}).endsWith('done')")
            await other.click("#language")
        await window.click("#talk-new")
        await window.until(f"({TURNS}).length === 0")
        assert await window.js("document.getElementById('talks').options.length") == 2
    assert browser.errors() == []


@pytest.mark.trio
async def test_a_relay_killed_in_mid_reply_costs_a_pause(tmp_path: Path, browser: Browser) -> None:
    async with a_talk(tmp_path) as (site, relay), a_window(browser) as window:
        port = site.url.rstrip("/").rpartition(":")[2]
        await by_link(window, site)
        await say(window, "I am sad about a great many things.")
        await window.until(HEARS)
        relay.send_signal(signal.SIGKILL)
        await relay.ended()
        async with a_relay(site, "--listen", f"127.0.0.1:{port}"):
            await window.until(f"{STATES} === 'done,done'")
            await window.until(f"{SILENT} && document.getElementById('talk-stop').disabled")
            unhurt = "document.getElementById('talk-blocked').hidden && document.getElementById('talk-fault').hidden"
            assert await window.js(unhurt)
    browser.errors()  # of the connections that were lost


#: A microphone whose tone the test turns up and down.
VOICE = """
  const context = new AudioContext();
  const tone = context.createOscillator();
  window.voice = context.createGain();
  window.voice.gain.value = 0;
  const into = context.createMediaStreamDestination();
  tone.connect(window.voice).connect(into);
  tone.start();
  window.voice.stream = into.stream;
  navigator.mediaDevices.getUserMedia = async () => into.stream;
  return true;
"""


@pytest.mark.trio
async def test_what_is_spoken_is_written_down_answered_and_interrupts(tmp_path: Path, browser: Browser) -> None:
    ears = ("--space", "stt", "--engine", "mock", "-o", "transcripts=I am sad about a great many things.|Good bye")
    config = CONFIG.replace("[talk]", '[talk]\ntranscribe = "stt"') + "[spaces.stt]\n"
    async with AsyncExitStack() as stack:
        site, relay = await stack.enter_async_context(a_site(tmp_path, config))
        for worker in (*WORKERS, ears):
            await stack.enter_async_context(a_worker(site, relay, *worker))
        window = await stack.enter_async_context(a_window(browser))
        await by_link(window, site)
        await window.js(f"(() => {{ {VOICE} }})()")
        await window.until("document.getElementById('talk-mic').offsetHeight > 0")
        await window.click("#talk-mic")
        await window.until("document.getElementById('talk-mic').classList.contains('recording')")
        assert await nameless(window) == []
        await window.js("window.voice.gain.value = 0.8, window.since = window.voice.context.currentTime")
        await window.until("window.voice.context.currentTime > window.since + 0.6")
        await window.js("window.voice.gain.value = 0, true")
        await window.until(f"({TURNS})[0] === 'I am sad about a great many things.' && {HEARS}")
        await window.js("window.voice.gain.value = 0.8, true")  # it speaks on meanwhile
        await window.until(f"({STATES}).startsWith('done,interrupted')")
        await window.js("window.voice.gain.value = 0, true")
        await window.until(f"({TURNS})[2] === 'Good bye' && ({STATES}).endsWith('done')")
        await window.click("#talk-mic")
        await window.until("!document.getElementById('talk-mic').classList.contains('recording')")
        assert await window.js("document.getElementById('talk-fault').hidden")
        narrow = {"width": 320, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await window.cdp("Emulation.setDeviceMetricsOverride", **narrow)
        assert await window.js("document.documentElement.scrollWidth") <= 320
    assert browser.errors() == []


@pytest.mark.trio
async def test_without_a_secure_context_the_microphone_says_why_it_is_off(tmp_path: Path, browser: Browser) -> None:
    config = CONFIG.replace("[talk]", '[talk]\ntranscribe = "stt"') + "[spaces.stt]\n"
    async with a_site(tmp_path, config) as (site, _), a_window(browser) as window:
        await by_link(window, attrs.evolve(site, url=site.url.replace("127.0.0.1", "relay.test")))
        await window.until("document.getElementById('talk-mic').offsetHeight > 0")
        assert await window.js("document.getElementById('talk-mic').disabled")
        assert "HTTPS" in await window.js("document.getElementById('talk-mic').title")
    browser.errors()  # what Chromium says of such a page


@pytest.mark.trio
async def test_a_relay_without_a_space_that_transcribes_has_no_microphone(tmp_path: Path, browser: Browser) -> None:
    async with a_talk(tmp_path) as (site, _), a_window(browser) as window:
        await by_link(window, site)
        assert await window.js("document.getElementById('talk-mic').offsetHeight") == 0
    assert browser.errors() == []


@pytest.mark.trio
async def test_a_relay_without_conversations_has_no_tab(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        await window.log_in(site)
        assert await window.js("document.getElementById('tabs').offsetHeight") == 0
    assert browser.errors() == []


@pytest.mark.trio
async def test_the_mouth_follows_what_espeak_tells_of_it(tmp_path: Path, browser: Browser) -> None:
    workers = (WORKERS[0], ("--space", "tts", "--engine", "espeak"))
    async with a_talk(tmp_path, workers) as (site, _), a_window(browser) as window:
        await by_link(window, site)
        assert await window.js(WATCH_WIDTH)
        await say(window, "Hello")
        await window.until("window.widest > 15")  # an "ee"; by loudness alone it is never wider than 14.5
    assert browser.errors() == []


@pytest.mark.trio
async def test_the_mouth_follows_visemes_and_else_the_loudness(site: BrowserPlace, browser: Browser) -> None:
    body = """
      const { mouthAt } = await import("/face.js");
      const visemes = [{ t: 0, opening: 0.1, width: 0.2 }, { t: 0.5, opening: 0.9, width: 0.4 }];
      const peaks = [0, 0.1, 0.9];
      return [mouthAt({ visemes, peaks }, 0.6), mouthAt({ peaks }, 0.01), mouthAt({ peaks }, 0.05)];
    """
    async with a_window(browser) as window:
        await window.open(site.url)
        by_data, closed, wide = await call(window, body)
    assert by_data == {"opening": 0.9, "width": 0.4}
    assert closed["opening"] == 0
    assert wide["opening"] == 1
