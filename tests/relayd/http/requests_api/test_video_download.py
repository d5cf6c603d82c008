"""Video over HTTP: IVF that is sent while it is made, and the events that name its pictures."""

import base64
import io
from pathlib import Path
from typing import Any

import h11
import pytest
import trio

from protocol.wire.frames import Audio, Completed, Output, Started, Video
from protocol.wire.messages import Assign
from tests.relayd.http.requests_api.answers import POST, one
from tests.support.fake_worker import FORMAT, FakeWorker, fake_worker, identity, samples
from tests.support.pictures import PICTURES, VIDEO, ivf
from tests.support.raw_http_client import events_of, visitor
from tests.support.relay import daemon


def shows(worker: FakeWorker, assign: Assign, first: int, end: int, **formats: Any) -> None:
    """Send the frames from `first` to `end` of a request of five pictures: `started` is 0, `completed` is 6."""
    frames: list[Any] = [Started(**identity(assign, 0), **({"video": VIDEO} | formats))]
    for seq, (data, pts) in enumerate(PICTURES, 1):
        frames.append(Video(**identity(assign, seq), data=data, pts=pts, key=not pts))
    frames.append(Completed(**identity(assign, 6), result={"pictures": 5}))
    for frame in frames[first:end]:
        worker.send(frame)


@pytest.mark.trio
async def test_video_is_seen_while_it_is_made_and_again_later(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assert posted.json["links"]["video"] == one(posted, "/video")
        assign = await worker.assigned()
        await http.begin("GET", one(posted, "/video"))
        shows(worker, assign, 0, 2)
        answer = await http.answer()
        assert (answer.status, answer.headers["content-type"]) == (200, "video/x-ivf")
        assert answer.headers["accept-ranges"] == "none"
        await answer.until(ivf(PICTURES[:1]))
        assert relay.relay.requests[assign.request_id].live, "it came before the end"
        shows(worker, assign, 2, 7)
        await answer.rest()
        assert answer.body == ivf(PICTURES)
        await relay.at_rest()
        again = await http.get(one(posted, "/video"))
        assert (again.status, again.body) == (200, ivf(PICTURES))
        head = await http.ask("HEAD", one(posted, "/video"))
        assert (head.status, head.headers["content-type"], head.body) == (200, "video/x-ivf", b"")
        pictures = [
            data for kind, _, data in events_of((await http.get(one(posted, "/events"))).body) if kind == "video"
        ]
        told = [(base64.b64decode(each["data"]["base64"]), each["pts"], each["key"]) for each in pictures]
        assert told == [(data, pts, not pts) for data, pts in PICTURES]


@pytest.mark.trio
async def test_ffmpeg_plays_what_is_sent(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        shows(worker, await worker.assigned(), 0, 7)
        body = (await http.get(one(posted, "/video"))).body
    with av.open(io.BytesIO(body)) as container:
        assert [frame.time for frame in container.decode(video=0)] == [0.0, 0.04, 0.08, 0.12, 0.16]


@pytest.mark.trio
async def test_a_request_without_video_says_so(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        worker.speak(await worker.assigned(), [samples(10)])
        answer = await http.get(one(posted, "/video"))
        assert (answer.status, answer.error["code"]) == (409, "no_video")
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), video=VIDEO))
        worker.send(Completed(**identity(assign, 1)))
        answer = await http.get(one(posted, "/video"))
        assert (answer.status, answer.error["code"]) == (502, "engine_failed")
        assert "made no video" in answer.error["message"]
        audio = await http.get(one(posted, "/audio"))
        assert (audio.status, audio.error["code"]) == (409, "no_audio")


@pytest.mark.trio
async def test_a_worker_lost_in_mid_video_cuts_it_short_and_never_silently(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"worker_grace_s": 0.1}) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url) as worker:
            posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
            shows(worker, await worker.assigned(), 0, 3)
            answer = await http.open("GET", one(posted, "/video"))
            await answer.until(ivf(PICTURES[:2]))
        with pytest.raises((trio.BrokenResourceError, h11.RemoteProtocolError)):
            await answer.rest()
        assert not answer.whole
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("makes", ["video", "both", "video and words"])
async def test_a_link_leads_to_what_a_request_has_made_also_after_a_restart(tmp_path: Path, makes: str) -> None:
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url) as worker,
        visitor(relay.url) as http,
    ):
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        shows(worker, assign, 0, 6, format=FORMAT if makes == "both" else None)
        if makes == "both":
            worker.send(Audio(**identity(assign, 6), pcm=samples(10)))
        else:
            worker.send(Output(**identity(assign, 6), data="words", mark=None if "words" in makes else {}))
        worker.send(Completed(**identity(assign, 7)))
        await relay.at_rest()
        before = (await http.get(one(posted, "/link"))).json
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http:
        after = (await http.get(one(posted, "/link"))).json
        assert (await http.get(after["links"]["video"])).body == ivf(PICTURES)
    for told in (before, after):
        assert told["url"].startswith(one(posted, "/audio?" if makes == "both" else "/video?"))
