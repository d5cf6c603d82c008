"""The feed against a real relay: the picture comes, goes on after the relay was away, and is steered."""

import math
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from protocol.wire.frames import Audio, Started
from protocol.wire.messages import Accepted, Done, Registered, Rejected, Submit
from tests.support.fake_worker import FORMAT, fake_worker
from tests.support.relay import a_config, an_id, peer, running
from tui.model.feed import MAX_WAITING, Ask, Feed, Listen, Meter, Options, RelaySource, Tell
from tui.model.relay_model import RelayModel

TONE = array("h", (int(16_000 * math.sin(at / 7)) for at in range(24_000))).tobytes()


@attrs.define(eq=False)
class Watcher:
    model: RelayModel
    feed: Feed

    async def until(self, true: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not true():  # noqa: ASYNC110  what the feed holds has no event
                await trio.sleep(0.005)

    async def ask(self, action: str, target: str) -> Done | Rejected:
        answers: list[Done | Rejected] = []
        assert self.feed.ask(Ask(action, target, answers.append))
        await self.until(lambda: bool(answers))
        return answers[0]


@asynccontextmanager
async def watching(url: str, *, readonly: bool = False) -> AsyncIterator[Watcher]:
    model = RelayModel()
    feed = Feed(RelaySource(url, readonly=readonly), model, lambda: None, clock=trio.current_time)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        yield Watcher(model, feed)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_the_whole_picture_comes_on_attach_and_changes_follow(tmp_path: Path) -> None:
    async with running(a_config(tmp_path / "state")) as started, fake_worker(started.urls[0]) as worker:
        await worker.peer.next(Registered)
        async with watching(started.urls[0]) as here, peer(started.urls[0], "client") as client:
            await here.until(lambda: here.model.known)
            assert [view.key for view in here.model.rows("spaces")] == ["tts"]
            request_id = an_id()
            client.send(Submit(request_id=request_id, space="tts", params={"text": "hello"}))
            await client.next(Accepted)
            await here.until(
                lambda: (view := here.model.get("requests", request_id)) is not None and view.text("state") == "running"
            )


@pytest.mark.trio
async def test_without_a_relay_it_tries_for_ever_and_goes_on_when_one_comes(tmp_path: Path) -> None:
    state = tmp_path / "state"
    url = f"unix:{state}/relayd.sock"
    async with watching(url) as here:
        await here.until(lambda: bool(here.model.link.why))
        assert not here.model.link.up
        refusal = await here.ask("pause_space", "tts")
        assert isinstance(refusal, Rejected)
        assert "nothing was done" in refusal.message
        for _ in range(2):
            async with running(a_config(state)):
                await here.until(lambda: here.model.link.up and here.model.relay is not None)
                told_at = here.model.updated_at
            await here.until(lambda: not here.model.link.up)
            assert here.model.rows("spaces"), "the last that was known stays"
            assert here.model.updated_at >= told_at


@pytest.mark.trio
async def test_steering_reaches_the_relay_and_readonly_is_refused_by_it(tmp_path: Path) -> None:
    async with running(a_config(tmp_path / "state")) as started:
        async with watching(started.urls[0]) as here:
            await here.until(lambda: here.model.known)
            assert isinstance(await here.ask("pause_space", "tts"), Done)
            await here.until(lambda: here.model.rows("spaces")[0].text("state") == "paused")
            refusal = await here.ask("cancel", an_id())
            assert isinstance(refusal, Rejected)
            assert refusal.code == "request_not_found"
        async with watching(started.urls[0], readonly=True) as here:
            await here.until(lambda: here.model.known)
            refusal = await here.ask("resume_space", "tts")
            assert isinstance(refusal, Rejected)
            assert refusal.code == "forbidden"
            assert here.model.rows("spaces")[0].text("state") == "paused"


@pytest.mark.trio
async def test_a_running_request_is_described_and_listened_to(tmp_path: Path) -> None:
    async with running(a_config(tmp_path / "state")) as started, fake_worker(started.urls[0]) as worker:
        await worker.peer.next(Registered)
        async with watching(started.urls[0]) as here, peer(started.urls[0], "client") as client:
            submit = Submit(request_id=an_id(), space="tts", params={"text": "hello"})
            client.send(submit)
            assign = await worker.assigned()
            worker.peer.send(Started(request_id=assign.request_id, attempt=assign.attempt, seq=0, format=FORMAT))
            await here.until(lambda: here.model.get("requests", submit.request_id) is not None)
            levels: list[float] = []
            assert here.feed.ask(Listen(submit.request_id, -1, levels.append))
            worker.peer.send(Audio(request_id=assign.request_id, attempt=assign.attempt, seq=1, pcm=TONE))
            await here.until(lambda: any(level > 0.3 for level in levels))
            answer = await here.ask("describe", submit.request_id)
            assert isinstance(answer, Done)
            timeline = answer.data["timeline"]
            assert isinstance(timeline, list)
            assert {"created", "started"} <= {event["event"] for event in timeline}
            assert here.feed.ask(Listen(None))
            await here.until(
                lambda: (
                    (view := here.model.get("requests", submit.request_id)) is not None and view.number("readers") == 1
                )
            )


class Silent:
    """A source that sends nothing."""

    async def follow(self, tell: Tell) -> None:
        await trio.sleep_forever()

    async def steer(self, action: str, target: str, options: Options) -> Done | Rejected:
        return Done(action=action, target=target)

    async def listen(self, request_id: str, after_seq: int, heard: Callable[[bytes], None]) -> None:
        """Measure nothing."""


@pytest.mark.trio
async def test_too_much_asked_for_is_refused_and_never_waited_for() -> None:
    feed = Feed(Silent(), RelayModel(), lambda: None)
    asks = [feed.ask(Ask("cancel", "x", lambda _answer: None)) for _ in range(MAX_WAITING + 1)]
    assert asks == [True] * MAX_WAITING + [False]


def test_a_meter_gives_the_level_since_the_last_look() -> None:
    meter = Meter()
    meter.add(TONE)
    assert meter.read_level() == pytest.approx(16_000 / 32_768 / math.sqrt(2), rel=0.02)
    assert meter.read_level() == 0.0
    meter.add(b"\x01")  # half a sample
    assert meter.read_level() == 0.0
