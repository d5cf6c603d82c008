"""The button "Call" of the tab to talk in: replies are heard and seen on a call, or else by the page."""

import signal
from pathlib import Path

import pytest

from tests.browser.test_talk import HEARS, SILENT, STATES, TURNS, VOICE, WORKERS, a_talk, by_link, say
from tests.browser.window import LOUD, Browser, Window, a_window
from tests.support.calls import WORKER
from tests.support.processes import a_worker

FACE = ("--space", "face", "--engine", "face", "-o", "size=128")
CONFIG = (
    '[talk]\nreply = "llm"\nspeech = "tts"\ncalls = "calls"\nface = "face"\n'
    "[spaces.llm]\n[spaces.tts]\n[spaces.face]\n[spaces.calls]\nrun_timeout_s = 3600\n"
)
#: How loud the call is; by an analyser, as the video element is not part of the page's own player.
LISTEN = """(() => {
  const video = document.getElementById("talk-video");
  const context = new AudioContext();
  const ear = new AnalyserNode(context, { fftSize: 2048 });
  context.createMediaStreamSource(video.srcObject).connect(ear);
  const heard = new Float32Array(2048);
  window.onCall = () => (ear.getFloatTimeDomainData(heard), Math.max(...heard.map(Math.abs)));
  return true;
})()"""
VIDEO = "document.getElementById('talk-video')"
SEEN = f"{VIDEO}.offsetHeight > 0 && {VIDEO}.videoWidth === 128"
FAULT = "document.getElementById('talk-fault').textContent"


async def ring(window: Window) -> None:
    await window.click("#talk-call")
    await window.until(SEEN)
    await window.js(LISTEN)


@pytest.mark.trio
async def test_a_reply_is_heard_and_seen_on_the_call_and_interrupted(tmp_path: Path, browser: Browser) -> None:
    async with a_talk(tmp_path, (*WORKERS, FACE, WORKER), CONFIG) as (site, _), a_window(browser) as window:
        await by_link(window, site)
        await ring(window)
        assert await window.words("#talk-call") == "Hang up"
        await say(window, "I am sad about a great many things.")
        await window.until(f"onCall() > {LOUD}")
        assert await window.js(SILENT), "the page does not play it, too"
        await window.click("#talk-stop")
        await window.until(f"onCall() < 0.001 && ({STATES}).startsWith('done,')")
        assert await window.js("document.querySelector('.turn:last-child del') !== null")  # what nobody heard
        await window.click("#talk-mute")
        assert await window.js(f"{VIDEO}.muted")
        await window.click("#talk-call")
        await window.until(f"{VIDEO}.offsetHeight === 0")
        await say(window, "Hello")
        await window.until(HEARS)
        await window.until(f"({TURNS}).length === 4 && ({STATES}).endsWith('done')")
    browser.errors()  # a call may have ended before it is hung up


@pytest.mark.trio
async def test_what_is_said_on_the_call_is_answered_there_and_muted_it_is_not_heard(
    tmp_path: Path, browser: Browser
) -> None:
    ears = ("--space", "stt", "--engine", "mock", "-o", "transcripts=I am sad about a great many things.|Good bye")
    config = CONFIG.replace('face = "face"', 'transcribe = "stt"') + "[spaces.stt]\n"
    voice = "window.voice.gain.value"
    async with a_talk(tmp_path, (*WORKERS, ears, WORKER), config) as (site, _), a_window(browser) as window:
        await by_link(window, site)
        await window.js(f"(() => {{ {VOICE} }})()")
        await window.click("#talk-call")
        await window.until("document.getElementById('talk-mute').offsetHeight > 0")
        assert await window.js("document.getElementById('talk-mic').offsetHeight") == 0
        await window.js(LISTEN)
        await window.js(f"{voice} = 0.8, window.since = window.voice.context.currentTime")
        await window.until("window.voice.context.currentTime > window.since + 0.6")
        await window.js(f"{voice} = 0, true")
        await window.until(f"({TURNS})[0] === 'I am sad about a great many things.' && onCall() > {LOUD}")
        assert await window.js(SILENT), "the page does not play it, too"
        await window.js(f"{voice} = 0.8, true")
        await window.until(f"({STATES}).startsWith('done,interrupted')")
        await window.click("#talk-mute")
        assert await window.js("window.voice.stream.getAudioTracks().every(({ enabled }) => !enabled)")
        await window.until(f"({TURNS})[2] === 'Good bye' && ({STATES}).endsWith('done')")  # muted is silent
        assert not await window.js(f"{VIDEO}.muted"), "one hears on"
        await window.click("#talk-call")
        await window.until("window.voice.stream.getAudioTracks().every(({ readyState }) => readyState === 'ended')")
    browser.errors()  # a call may have ended before it is hung up


@pytest.mark.trio
async def test_without_a_gateway_or_when_it_dies_the_page_plays_by_itself(tmp_path: Path, browser: Browser) -> None:
    async with a_talk(tmp_path, (*WORKERS, FACE), CONFIG) as (site, relay), a_window(browser) as window:
        await by_link(window, site)
        await window.click("#talk-call")
        await window.until(f"{FAULT}.includes('no worker of space')")
        assert await window.words("#talk-call") == "Call"
        async with a_worker(site, relay, *WORKER) as gateway:
            await ring(window)
            gateway.send_signal(signal.SIGKILL)
            await window.until(f"{FAULT}.includes('was lost') && {VIDEO}.offsetHeight === 0")
        await say(window, "Hello")
        await window.until(HEARS)
    browser.errors()  # of what was refused


@pytest.mark.trio
async def test_a_call_whose_media_does_not_get_through_is_given_up(tmp_path: Path, browser: Browser) -> None:
    async with a_talk(tmp_path, (*WORKERS, FACE, WORKER), CONFIG) as (site, _), a_window(browser) as window:
        await by_link(window, site)
        await window.js("(RTCPeerConnection.prototype.setRemoteDescription = async () => {}, true)")  # as without UDP
        await window.click("#talk-call")
        await say(window, "Hello")
        await window.until(HEARS)
        assert await window.words("#talk-call") == "Calling…"
        await window.until(f"{FAULT}.includes('did not get through')")
        assert await window.words("#talk-call") == "Call"
        await say(window, "Hello again")
        await window.until(HEARS)
    assert browser.errors() == []
