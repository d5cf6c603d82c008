"""Video through a real daemon: every picture as it was sent, to whoever knows what it is."""

from pathlib import Path
from typing import Any

import pytest

from protocol.wire.frames import Audio, Completed, Frame, Output, Started, Video
from protocol.wire.messages import Assign, Attach
from tests.relayd.core.equal_requests import CACHE, ONE
from tests.support.fake_worker import FORMAT, FakeWorker, fake_worker, identity, samples
from tests.support.pictures import PICTURES, VIDEO
from tests.support.relay import a_submit, daemon, peer


def shows(worker: FakeWorker, assign: Assign) -> list[Any]:
    """Send audio and video by turns, with words of no picture; returns the frames."""
    frames: list[Any] = [Started(**identity(assign, 0), format=FORMAT, video=VIDEO)]
    for data, pts in PICTURES:
        frames.append(Video(**identity(assign, len(frames)), data=data, pts=pts, key=not pts))
        frames.append(Audio(**identity(assign, len(frames)), pcm=samples(960, pts)))
    frames.append(Output(**identity(assign, len(frames)), data="a video"))
    frames.append(Completed(**identity(assign, len(frames)), result={"pictures": len(PICTURES)}))
    for frame in frames:
        worker.send(frame)
    return frames


def identity_of(frame: Frame) -> dict[str, Any]:
    return {"request_id": frame.request_id, "attempt": frame.attempt, "seq": frame.seq}


@pytest.mark.trio
@pytest.mark.parametrize("memory_bytes", [64 * 1024 * 1024, 1])
async def test_video_is_read_as_it_was_made_also_later_and_also_from_the_disk(
    tmp_path: Path, memory_bytes: int
) -> None:
    async with (
        daemon(tmp_path, results={"memory_bytes": memory_bytes}) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
        peer(relay.url, "operator") as listener,
    ):
        client.send(submit := a_submit())
        frames = shows(worker, await worker.assigned())
        assert await client.frames(submit) == frames
        assert relay.relay.requests[submit.request_id].audio_s == 0.2
        for after in (-1, 4):
            listener.send(Attach(request_id=submit.request_id, after_seq=after))
            assert await listener.frames(submit, first=after + 1) == frames[after + 1 :]
        await relay.at_rest()


@pytest.mark.trio
async def test_a_client_that_does_not_know_video_misses_no_number(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client", video=None) as client,
    ):
        client.send(submit := a_submit())
        frames = shows(worker, await worker.assigned())
        read = await client.frames(submit)
        assert [frame.seq for frame in read] == [frame.seq for frame in frames]
        for sent, got in zip(frames, read, strict=True):
            assert got == (Output(**identity_of(sent), mark={}) if isinstance(sent, Video) else sent)


@pytest.mark.trio
async def test_an_equal_request_gets_the_pictures_of_the_first(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, spaces={"tts": CACHE}) as relay,
        fake_worker(relay.url, **ONE) as worker,
        peer(relay.url, "client") as client,
    ):
        client.send(first := a_submit())
        frames = shows(worker, await worker.assigned())
        assert await client.frames(first) == frames
        client.send(second := a_submit())
        copied = await client.frames(second)
        assert [(frame.data, frame.pts, frame.key) for frame in copied if isinstance(frame, Video)] == [
            (data, pts, not pts) for data, pts in PICTURES
        ]
        assert copied[0].video == VIDEO
        assert copied[-1].cached
