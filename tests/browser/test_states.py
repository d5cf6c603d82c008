"""What the page says of a request while nothing is made of it: the truth, and why."""

from pathlib import Path

import attrs
import pytest
import trio

from protocol import RelayClient, open_relay
from protocol.wire.errors import RequestError
from tests.browser.test_page import HEARS, SHORT, STATE, samples, tune
from tests.browser.window import MOCK, Browser, BrowserPlace, Window, a_site, a_window, steer
from tests.support.processes import a_worker

CARD = "document.querySelector('.request .state').textContent"
WHY = "document.querySelector('.request .why').textContent"
RUN = "document.querySelector('.figures [data-name=run] dd')?.textContent"


async def runs_for_a_minute(window: Window) -> None:
    """A request that runs until it is cancelled."""
    await window.js("document.getElementById('more').open = true")
    await window.js("document.getElementById('param-duration_s').value = ''")
    await window.type("param-duration_s", "60")
    await window.submit("a minute")
    await window.js("document.getElementById('param-duration_s').value = ''")
    await window.until(HEARS)


@pytest.mark.trio
async def test_a_lost_worker_is_told_and_its_clocks_stand_still(tmp_path: Path, browser: Browser) -> None:
    config = "[spaces.tts]\n[limits]\nworker_grace_s = 8\n"
    async with a_site(tmp_path, config) as (site, relay), a_window(browser) as window:
        async with a_worker(site, relay, *MOCK) as worker:
            await window.log_in(site)
            await window.submit(SHORT)
            await window.until(HEARS)
            worker.process.kill()
            await worker.ended()
        first = await window.until(f"/^Worker lost, waiting up to \\d s for it$/.test({CARD}) && {CARD}")
        run = await window.js(RUN)
        await window.until(f"{CARD} !== values[0]", first)  # a second later …
        assert await window.js(RUN) == run
        await window.do(lambda driver: driver.refresh())
        await window.until(f"{CARD}.startsWith('Worker lost') && document.querySelector('.wave').offsetWidth > 0")
        await window.until(f"{CARD} === 'Position 1 of 1'")
        why = await window.js(WHY)
        assert why.startswith("Queued again: worker ")
        assert why.endswith(" did not reconnect. No worker is connected; the request waits for one.")
        assert await window.js(RUN) is None
        await window.do(lambda driver: driver.refresh())
        await window.until(f"{CARD} === 'Position 1 of 1' && {WHY}.startsWith('Queued again')")
        await window.until("document.querySelector('.wave').offsetWidth > 0")  # what it had made is there again …
        assert await window.js(STATE) == "queued"  # … and is not taken for work
        async with a_worker(site, relay, *MOCK):
            await window.until_state("running")
            assert await window.js(WHY) == ""
            await window.until_state("completed")
            assert samples(await window.download()) == tune(SHORT)
    assert browser.errors() == []


@pytest.mark.trio
async def test_what_an_operator_does_is_told(tmp_path: Path, browser: Browser) -> None:
    async with a_site(tmp_path) as (site, relay), a_window(browser) as window, a_worker(site, relay, *MOCK):
        worker_id = (await relay.event("worker registered"))["worker"]
        await window.log_in(site)
        await runs_for_a_minute(window)
        second = await window.submit("second")
        await window.until(f"{CARD}.startsWith('Position 1 of 1')")
        assert await window.js(WHY) == ""
        await steer(site, "pause_space", "tts")
        await window.until(f"{WHY} === 'An operator has paused the space; the request waits until it is resumed.'")
        await steer(site, "resume_space", "tts")
        await window.until(f"{WHY} === ''")
        await steer(site, "drain_worker", worker_id)
        await window.until(f"{WHY} === 'The worker takes no new requests; the request waits for one that does.'")
        assert await window.words("#space-state") == "✗ Draining"
        assert await window.js("document.getElementById('form').disabled")
        await steer(site, "undrain_worker", worker_id)
        await window.until("!document.getElementById('form').disabled")
        await steer(site, "cancel", second)
        await window.until_state("cancelled")
        assert await window.words(".request .wrong") == "cancelled by operator root"
    assert browser.errors() == []


@pytest.mark.trio
async def test_a_refusal_for_now_counts_down_and_is_sent_again(site: BrowserPlace, browser: Browser) -> None:
    token = (await steer(site, "create_token", "carl", role="client", limits={"max_readers": 1}))["token"]
    async with a_window(browser) as window:
        await window.log_in(attrs.evolve(site, token=token))
        await runs_for_a_minute(window)
        await window.submit("second")
        await window.until(f"/^Refused for now, sent again in \\d s$/.test({CARD})")
        assert await window.js(WHY) == "'carl' may read 1 requests at once; leave one first"
        await window.click(".cancel")
        assert await window.until(f"{STATE} === 'cancelled'")  # at once: the relay does not have it
        await window.submit("third")
        await window.until_state("again")
        await window.js("document.querySelectorAll('.cancel')[2].click()")
        await window.until_state("cancelled", 2)
        await window.until_state("completed")
        assert samples(await window.download()) == tune("third")
    assert browser.errors() == []


#: A worker that makes no sound of what it is given.
HUSH = """
def hush(text: str):
    return iter(())
"""


async def until_forgotten(client: RelayClient, request_id: str) -> None:
    """Wait until the relay has dropped a result."""
    while True:
        try:
            await client.status(request_id)
        except RequestError:
            return
        await trio.sleep(0.1)


@pytest.mark.trio
async def test_no_audio_and_a_result_that_is_gone_are_told(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "hush.py").write_text(HUSH)
    config = "[spaces.tts]\n[spaces.hush]\n[results]\nretain_s = 0.1\n"
    quiet = ("--space", "hush", "--engine", "function", "-o", "call=hush:hush", "-o", "sample_rate=24000")
    async with (
        a_site(tmp_path, config) as (site, relay),
        a_worker(site, relay, *MOCK),
        a_worker(site, relay, *quiet),
        a_window(browser) as window,
    ):
        await window.log_in(site, "hush")
        await window.submit("nothing")
        await window.until_state("completed")
        assert await window.js(WHY) == "The engine made no audio of this."
        await window.type("space", "tts")
        await window.until("!document.getElementById('form').disabled")
        request_id = await window.submit("short")
        await window.until_state("completed")
        async with open_relay(site.url.replace("http:", "ws:"), token=site.token) as client:
            await until_forgotten(client, request_id)
        assert samples(await window.download()) == tune("short")  # the page has it still …
        await window.do(lambda driver: driver.refresh())
        await window.until_state("completed")  # … until it is loaded again
        told = "The relay no longer keeps this result."
        await window.until("document.querySelector('.request .wrong').textContent === values[0]", told)
        assert not await window.js("document.querySelector('.request .load').offsetWidth")
    assert browser.errors() == []
