"""A call from Chromium: it sees the idle loop, hears and sees what is played, and is silent when that is cancelled."""

from pathlib import Path
from typing import Any

import pytest
import trio

from gpuworker.engines.mock import Tune, tune_key
from protocol import Live, open_relay
from protocol.client.inputs import InputSource
from tests.browser.window import LOUD, Browser, Window, a_site, a_window
from tests.support.caller import an_ivf
from tests.support.calls import BLUE, CONFIG, L16, RED, WORKER, until
from tests.support.processes import a_worker

TUNE_S = 7
TUNE = Tune(24_000).pcm(tune_key("hello", 0), 0, 24_000 * TUNE_S)
#: Offers a call; keeps how loud it is, and the colour of what it shows.
OFFER = """
const [done] = arguments;
document.body.innerHTML = "<video autoplay playsinline muted></video>";
const video = document.querySelector("video");
const pc = window.pc = new RTCPeerConnection();
pc.addTransceiver("audio", { direction: "recvonly" });
pc.addTransceiver("video", { direction: "recvonly" });
window.channel = pc.createDataChannel("oai-events");
window.said = [];
channel.onmessage = ({ data }) => said.push(data);
window.loud = [];
pc.ontrack = ({ track, streams }) => {
  video.srcObject = streams[0];
  if (track.kind === "video") return;
  const context = new AudioContext();
  const ear = new AnalyserNode(context, { fftSize: 256 });
  context.createMediaStreamSource(new MediaStream([track])).connect(ear);
  const heard = new Float32Array(256);
  setInterval(() => {
    ear.getFloatTimeDomainData(heard);
    loud.push([performance.now(), Math.max(...heard.map(Math.abs))]);
  }, 5);
};
window.colour = () => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.drawImage(video, 0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
pc.createOffer().then((offer) => pc.setLocalDescription(offer)).then(() => {
  const look = () => (pc.iceGatheringState === "complete" ? done(pc.localDescription.sdp) : setTimeout(look, 20));
  look();
});
"""
ACCEPT = """
const [sdp, done] = arguments;
pc.setRemoteDescription({ type: "answer", sdp }).then(() => done(""), (error) => done(String(error)));
"""
STATS = """
const [done] = arguments;
const wanted = ({ type, kind }) => type === "inbound-rtp" && kind === "video";
pc.getStats().then((all) => done([...all.values()].find(wanted)));
"""


async def ask(window: Window, script: str, *values: Any) -> Any:
    return await window.do(lambda driver: driver.execute_async_script(script, *values))


async def decoded_in(window: Window, seconds: float) -> float:
    """Pictures that it decodes in a second."""
    before = await ask(window, STATS)
    await trio.sleep(seconds)
    after = await ask(window, STATS)
    return float(
        (after["framesDecoded"] - before["framesDecoded"]) / ((after["timestamp"] - before["timestamp"]) / 1000)
    )


@pytest.mark.trio
async def test_a_browser_sees_and_hears_a_call_and_an_interruption_is_silence(browser: Browser, tmp_path: Path) -> None:
    async with a_site(tmp_path, CONFIG) as (place, relay), a_worker(place, relay, *WORKER), a_window(browser) as window:
        url = place.url.replace("http:", "ws:")
        async with open_relay(url, token=place.token) as client:
            offer = await ask(window, OFFER)
            inputs: dict[str, InputSource] = {"commands": Live(), "idle": (an_ivf(BLUE, 75, size=360), "video/x-ivf")}
            async with client.submit("calls", {"offer": offer}, inputs=inputs) as call:
                assert await ask(window, ACCEPT, await until(call, "answer")) == ""
                await until(call, "state", "connected")
                await window.until("colour()[2] > 150 && colour()[0] < 100")
                assert await decoded_in(window, 3) >= 20, "idle"
                await window.js("channel.send('hello')")
                assert await until(call, "event") == "hello"
                await call.feed("commands", '{"send": "good day"}\n')
                await window.until("said[0] === 'good day'")
                video = an_ivf(RED, 25 * TUNE_S, size=360)
                inputs = {"audio": (TUNE, L16), "video": (video, "video/x-ivf")}
                async with client.submit("calls", {"peer": call.request_id}, inputs=inputs) as play:
                    await window.until(f"loud.at(-1)[1] > {LOUD}")
                    await window.until("colour()[0] > 150 && colour()[2] < 100")
                    assert await decoded_in(window, 3) >= 20, "talking"
                    cancelled_at = await window.js("performance.now()")
                    await client.cancel(play.request_id)
                await window.until("colour()[2] > 150 && colour()[0] < 100")
                await window.until("loud.at(-1)[0] > values[0] + 1000", cancelled_at)
                last = await window.js(f"Math.max(...loud.filter(([, level]) => level > {LOUD}).map(([at]) => at))")
                assert last - cancelled_at < 300
                assert (await ask(window, STATS))["pliCount"] <= 1
                await window.js("pc.close()")
                await until(call, "state", "closed")
