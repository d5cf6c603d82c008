"""The wall clock jumps by a day, forwards or back: nothing depends on it but what people read, and a token's date."""

import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.errors import LoginRefused
from protocol.wire.frames import Failed
from protocol.wire.messages import Attach, Done, Error, Queued, Rejected, Status, StatusReply, Steer
from relayd.core import retention
from relayd.views.rows import relay_row
from tests.support.fake_worker import fake_worker, samples
from tests.support.relay import Daemon, a_submit, daemon, peer, until

DAY_S = 86_400.0
PCM = [samples(1_000, seed) for seed in (1, 2, 3)]
JUMPS = pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])


@attrs.define(eq=False)
class WallClock:
    """The machine's wall clock, as the daemon reads it."""

    offset_s: float = 0.0

    def jump(self, seconds: float) -> None:
        self.offset_s += seconds


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    clock, real = WallClock(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + clock.offset_s)
    return clock


async def status(client: Any, request_id: str) -> StatusReply:
    client.send(Status(request_id=request_id))
    reply: StatusReply = await client.next(StatusReply)
    return reply


@pytest.mark.trio
@JUMPS
async def test_order_deadlines_etas_and_ages_of_what_waits_and_runs_do_not_notice(
    tmp_path: Path, wall: WallClock, jump_s: float
) -> None:
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        first = a_submit()
        client.send(first)
        worker.speak(await worker.assigned(), PCM)
        await client.frames(first)  # the space's pace is known
        running, *waiting = [a_submit() for _ in range(4)]
        dies = a_submit(queue_timeout_s=0.5)
        for submit in (running, *waiting[:2]):
            client.send(submit)
        assign = await worker.assigned()
        await client.settled()
        wall.jump(jump_s)
        client.send(waiting[2])
        client.send(dies)
        while (place := await client.next(Queued)).request_id != dies.request_id:
            pass
        assert (place.position, place.of) == (4, 4), "who came before the jump is before it"
        assert place.eta_s is not None
        assert 0 <= place.eta_s < 10
        for submit in (running, *waiting):
            assert 0 <= (await status(client, submit.request_id)).age_s < 10
        assert 0 <= float(relay_row(relay.relay)["uptime_s"] or 0.0) < 10
        wall.jump(-2 * jump_s)
        (failed,) = await client.frames(dies)
        assert isinstance(failed, Failed)
        assert failed.code == "queue_timeout"
        worker.speak(assign, PCM)
        for submit in waiting:
            assign = await worker.assigned()
            assert assign.request_id == submit.request_id
            worker.speak(assign, PCM)
        assert len(await client.frames(waiting[-1])) == 5
        await relay.at_rest()
        runs = relay.relay.scheduler.state.spaces["tts"].recent_runs_s
        assert all(0 <= run_s < 10 for run_s in runs)
        assert len(runs) == 5


@pytest.mark.trio
@JUMPS
async def test_a_running_request_keeps_its_own_deadlines(tmp_path: Path, wall: WallClock, jump_s: float) -> None:
    limits = {"resume_window_s": 0.4}
    async with (
        daemon(tmp_path, limits=limits) as relay,
        fake_worker(relay.url, slots=2) as worker,
        peer(relay.url, "client") as client,
        peer(relay.url, "client") as leaver,
    ):
        submit, left = a_submit(run_timeout_s=0.6), a_submit()
        client.send(submit)
        leaver.send(left)
        for _ in range(2):
            await worker.assigned()
        began = trio.current_time()
        await leaver.cut()
        wall.jump(jump_s)
        (failed,) = await client.frames(submit)
        assert failed.code == "run_timeout"
        assert trio.current_time() - began >= 0.5
        request = relay.relay.requests[left.request_id]
        await until(lambda: request.stopped_at is not None or not request.live)
        assert trio.current_time() - began < 5


@pytest.mark.trio
@JUMPS
async def test_results_are_kept_for_their_time_and_no_longer(
    tmp_path: Path, wall: WallClock, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    monkeypatch.setattr(retention, "REAP_INTERVAL_S", 0.05)
    kept = {"results": {"retain_s": 1.0}, "store": "sqlite"}
    async with (
        daemon(tmp_path, **kept) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        client.send(submit)
        worker.speak(await worker.assigned(), PCM)
        await client.frames(submit)
        ended_at = relay.relay.requests[submit.request_id].ended_at
        assert ended_at is not None
        wall.jump(jump_s)
        await trio.sleep(0.3)  # six times over, it was looked whether it is to go
        client.send(Attach(request_id=submit.request_id))
        assert len(await client.frames(submit)) == 5
        await until(lambda: submit.request_id not in relay.relay.requests)
        assert 1.0 <= trio.current_time() - ended_at < 5


@pytest.mark.trio
@JUMPS
async def test_a_restart_behind_a_jump_keeps_order_results_and_whole_deadlines(
    tmp_path: Path, wall: WallClock, jump_s: float
) -> None:
    done, *waiting = [a_submit(detach=True) for _ in range(4)]
    sqlite = {"store": "sqlite"}
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url) as worker:
            client.send(done)
            worker.speak(await worker.assigned(), PCM)
            await client.frames(done)
            await relay.at_rest()
        for submit in waiting[:2]:
            client.send(submit)
        await client.settled()
        wall.jump(-jump_s)
        client.send(waiting[2])  # the newest, by the wall clock the oldest or far younger
        await until(lambda: len(relay.relay.scheduler.state.spaces["tts"].queue) == 3)
        await relay.relay.finalizer.wait_finalized()
        await relay.relay.store.flush()
    wall.jump(2 * jump_s)
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        client.send(Attach(request_id=done.request_id))
        assert [frame.pcm for frame in (await client.frames(done))[1:-1]] == PCM
        for number, submit in enumerate(waiting, start=1):
            reply = await status(client, submit.request_id)
            assert (reply.state, reply.position, reply.of) == ("queued", number, 3)
            assert 0 <= reply.age_s < 10
        await _goes_in_order(relay, waiting)


async def _goes_in_order(relay: Daemon, waiting: list[Any]) -> None:
    async with fake_worker(relay.url) as worker:
        for submit in waiting:
            assign = await worker.assigned()
            assert assign.request_id == submit.request_id
            worker.speak(assign, PCM)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_token_goes_by_its_date_at_the_login_and_a_connection_by_what_was_left_then(
    tmp_path: Path, wall: WallClock
) -> None:
    """A token's expiry is a date, so it alone follows the clock; who is in is neither thrown out by a jump nor kept."""
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay, peer(relay.url, "operator") as operator:
        tokens = []
        for name, expires in (("hour", "1h"), ("second", "1s")):
            operator.send(Steer(action="create_token", target=name, options={"role": "client", "expires": expires}))
            tokens.append((await operator.next(Done)).data["token"])
        hour, second = tokens
        async with peer(relay.urls[0], "client", hour) as one, peer(relay.urls[0], "client", second) as two:
            wall.jump(DAY_S)
            await one.settled()
            with pytest.raises(LoginRefused, match="expired"):
                async with peer(relay.urls[0], "client", hour):
                    pass
            wall.jump(-2 * DAY_S)
            assert (await two.next(Error, Rejected)).message == "the token has expired"
            async with peer(relay.urls[0], "client", hour) as again:
                await again.settled()
            await one.settled()
