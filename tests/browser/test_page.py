"""The page in Chromium, on a real relay with real workers."""

import io
import signal
import wave
from pathlib import Path

import attrs
import pytest

from gpuworker.engines.mock import Tune, default_duration_s, tune_key
from protocol import open_relay
from tests.browser.window import HEARD_LIVE, LOUD, MOCK, Browser, BrowserPlace, a_site, a_window, steer
from tests.deploy.proxies import open_proxy
from tests.support.processes import a_relay, a_worker

#: 2.6 s and 5 s of tune, made in as long.
SHORT = "a tune that is not quite so long at all"
LONG = "a tune that is long enough to be cut in two. " * 5
RATE = 24_000
HEARS = f"window.loudness() > {LOUD}"
HEARD_S = "Number(document.querySelector('.wave input').value)"
STATE = "document.querySelector('.request').dataset.state"


def tune(text: str) -> bytes:
    """The samples that engine mock makes of a text."""
    return Tune(RATE).pcm(tune_key(text, 0), 0, round(default_duration_s(text) * RATE))


def samples(wav: bytes) -> bytes:
    with wave.open(io.BytesIO(wav)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        pcm: bytes = file.readframes(file.getnframes())
        return pcm


@pytest.mark.trio
async def test_speech_is_heard_before_its_request_has_ended(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        await window.log_in(site)
        await window.type("text", "A tune, 一首歌")
        await window.type("text", "\ue009\ue007")  # Ctrl + Enter
        await window.until(HEARD_LIVE)
        request_id = (await window.words(".request code")).removeprefix("tts · ")
        async with open_relay(site.url.replace("http:", "ws:"), token=site.token) as relay:
            assert (await relay.status(request_id)).space == "tts"  # by that id it is known
        assert await window.words(".request .said") == "A tune, 一首歌"
        await window.until_state("completed")
        assert await window.words(".request .state") == "✓ Completed"
        names = await window.js("[...document.querySelectorAll('.figures div')].map((row) => row.dataset.name)")
        assert names == ["first", "run", "length", "rtf"]
        assert 0.9 < float(await window.words(".figures [data-name=rtf] dd")) < 2
        told = await window.js("document.getElementById('says').innerText")
        assert "Request accepted." in told
        assert "Request completed: 2.2 s of audio." in told
        assert samples(await window.download()) == tune("A tune, 一首歌")
        await window.until("document.querySelector('.clock').textContent.startsWith('0:02.1 /')")  # played to its end
        await window.until("window.loudness() < 0.001")
    assert browser.errors() == []


@pytest.mark.trio
async def test_a_reload_in_mid_stream_goes_on_where_it_was(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        await window.log_in(site)
        request_id = await window.submit(LONG)
        await window.until(HEARS)
        await window.until(f"{HEARD_S} > 1")
        await window.do(lambda driver: driver.refresh())
        await window.until(HEARD_LIVE)
        assert request_id in await window.words(".request code")
        assert await window.js(HEARD_S) > 0.9  # it does not begin at its first word again
        await window.until_state("completed")
        assert samples(await window.download()) == tune(LONG)
        await window.do(lambda driver: driver.refresh())
        await window.until("document.querySelector('.wave').offsetWidth > 0")  # the relay has it still
        assert await window.words(".request .state") == "✓ Completed"
        assert samples(await window.download()) == tune(LONG)
        assert await window.js("window.loudness()") < LOUD  # nobody asked to hear it again
        await window.click(".play")
        await window.until(HEARS)
    assert browser.errors() == []


@pytest.mark.trio
async def test_three_windows_share_one_queue_and_see_their_places(site: BrowserPlace, browser: Browser) -> None:
    async with (
        a_window(browser) as first,
        a_window(browser) as second,
        a_window(browser) as third,
    ):
        for window in (first, second, third):
            await window.log_in(site)
        await first.click("#more summary")
        await first.type("param-duration_s", "60")
        await first.submit("first")
        await first.until(HEARS)
        await second.submit("second")
        await third.submit("third")
        await second.until("document.querySelector('.request .state').textContent.startsWith('Position 1 of 2')")
        await third.until("document.querySelector('.request .state').textContent.startsWith('Position 2 of 2')")
        await third.until("document.getElementById('space-load').textContent === '1 of 1 slots busy, 2 waiting'")
        await first.click(".cancel")
        await first.until_state("cancelled")
        await third.until("document.querySelector('.request .state').textContent.startsWith('Position 1 of 1')")
        await second.until(HEARS)
        await third.click(".cancel")
        await third.until_state("cancelled")  # out of the queue at once
        await second.until_state("completed")
    assert browser.errors() == []


@pytest.mark.trio
async def test_a_killed_worker_and_a_killed_relay_cost_no_sample(tmp_path: Path, browser: Browser) -> None:
    colour = "getComputedStyle(document.getElementById('space-state')).color"
    async with a_site(tmp_path) as (site, relay), a_window(browser) as window:
        async with a_worker(site, relay, *MOCK) as worker:
            await window.log_in(site)
            assert await window.words("#space-state") == "✓ Connected"
            assert await window.js(colour) == "rgb(23, 112, 58)"
            await window.submit(SHORT)
            await window.until(HEARS)
            await window.type("text", " and more")
            worker.send_signal(signal.SIGKILL)
            await worker.ended()
            await window.until("document.getElementById('form').disabled")
            assert await window.words("#space-state") == "✗ Not connected"
            assert await window.js(colour) == "rgb(168, 40, 28)"
        async with a_worker(site, relay, *MOCK):
            await window.until("!document.getElementById('form').disabled")
            assert await window.words("#space-state") == "✓ Connected"
            assert await window.js("document.activeElement.id") == "text"  # who was writing goes on
            await window.type("text", "!")
            assert (await window.js("document.getElementById('text').value")).endswith(" and more!")
            await window.until_state("completed")
            assert samples(await window.download()) == tune(SHORT)
            assert browser.errors() == []

            await window.submit(SHORT)
            await window.until(f"{HEARS} && {STATE} === 'running'")
            relay.send_signal(signal.SIGKILL)
            await relay.ended()
            await window.until("document.getElementById('link').textContent === '✗ Not connected, reconnecting…'")
            assert await window.js("document.getElementById('form').disabled")
            await window.until("document.querySelector('.request .state').innerText === 'Not connected to the relay'")
            async with a_relay(site, "--listen", site.url.removeprefix("http://").removesuffix("/")):
                await window.until("document.getElementById('link').textContent === '✓ Connected as anna'")
                await window.until_state("completed")
                assert samples(await window.download()) == tune(SHORT)
    unexpected = [line for line in browser.errors() if "WebSocket connection to" not in line]
    assert unexpected == []  # tries that find nobody are told by Chromium itself


@pytest.mark.trio
async def test_a_wrong_token_is_told_and_the_right_one_stays_in_the_tab(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        await window.open(site.url)
        await window.type("token", "rly_c_wrong", "\n")
        await window.until("document.getElementById('login-fault').offsetHeight > 0")
        assert "does not know this token" in await window.words("#login-fault")
        assert await window.js("document.activeElement.id") == "token"
        assert await window.js("sessionStorage.getItem('relayd.token')") is None
        await window.js("document.getElementById('token').select()")
        await window.type("token", site.token, "\n")
        await window.until("!document.getElementById('form').disabled")
        assert await window.js("sessionStorage.getItem('relayd.token')") == site.token
        kept = await window.js("JSON.stringify(localStorage) + location.href + document.cookie")
        assert site.token not in kept
        await window.do(lambda driver: driver.refresh())
        await window.until("!document.getElementById('form').disabled")
        await window.click("#leave")
        assert await window.js("sessionStorage.getItem('relayd.token')") is None
        await window.do(lambda driver: driver.refresh())
        await window.until("document.getElementById('token').offsetHeight > 0")
        assert await window.js("document.getElementById('desk').hidden")
    assert browser.errors() == []


@pytest.mark.trio
async def test_what_goes_wrong_is_said_in_words(site: BrowserPlace, browser: Browser) -> None:
    write = "document.getElementById('text').value = values[0].repeat(values[1])"
    async with a_window(browser) as window:
        await window.log_in(site)
        await window.click("#more summary")
        await window.type("text", "broken")
        await window.type("param-fail", "{how: raise}")
        await window.click("#submit")
        await window.until("document.getElementById('ask-fault').textContent === 'fail: this is not valid JSON.'")
        await window.js("document.getElementById('param-fail').value = values[0]", '{"how": "raise", "at": 3}')
        await window.submit("broken")
        await window.until_state("failed")
        assert await window.words(".request .state") == "✗ Failed"
        told = await window.words(".request .wrong")
        assert told == "the request asked for this failure The audio up to here can be played and downloaded."
        assert samples(await window.download()) == tune("broken")[: 3 * 2 * RATE // 10]

        await window.js("document.getElementById('param-fail').value = ''")
        await window.js(write, "x", 20_001)
        await window.click("#submit")
        await window.until("document.querySelectorAll('.request').length === 2")
        await window.until_state("rejected")
        assert "text: " in await window.words(".request .wrong")
        assert await window.js("document.getElementById('text').getAttribute('aria-invalid')") == "true"
        await window.js(write, "字", 30_000)
        await window.click("#submit")
        await window.until(
            "document.getElementById('ask-fault').textContent.startsWith('Text and settings have 88 KiB')"
        )

        await window.type("param-output", "text")
        await window.submit("words and no sound")
        await window.until_state("completed")
        assert await window.words(".request .output") == "words and no sound"
    assert browser.errors() == []


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["nginx", "caddy"])
async def test_it_speaks_over_tls_behind_a_proxy(
    site: BrowserPlace, browser: Browser, tmp_path: Path, kind: str
) -> None:
    relay = site.url.removeprefix("http://").removesuffix("/")
    async with open_proxy(kind, tmp_path, relay) as proxy, a_window(browser) as window:
        await window.log_in(attrs.evolve(site, url=f"https://localhost:{proxy.port}/"))
        await window.submit(kind)
        await window.until(HEARD_LIVE)
        await window.until_state("completed")
        assert samples(await window.download()) == tune(kind)
    assert browser.errors() == []


@pytest.mark.trio
async def test_a_revoked_token_leads_back_to_the_door(site: BrowserPlace, browser: Browser) -> None:
    token = (await steer(site, "create_token", "bob", role="client"))["token"]
    async with a_window(browser) as window:
        await window.log_in(attrs.evolve(site, token=token))
        await steer(site, "revoke_token", "bob")
        await window.until("document.getElementById('login-fault').offsetHeight > 0")
        assert "does not know this token" in await window.words("#login-fault")
        assert await window.js("sessionStorage.getItem('relayd.token')") is None
    assert browser.errors() == []
