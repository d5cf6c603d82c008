"""Deadlines outlive a relay that is killed and started again, and the time that it was away does not count."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.frames import Failed
from protocol.wire.messages import Accepted, Attach, Submit
from relayd.core import clock
from relayd.core.clock import RelayClock
from relayd.store.records import Loaded, PutUptime
from tests.support.fake_worker import fake_worker, samples
from tests.support.relay import Daemon, a_submit, an_id, daemon, peer, until

#: Of each life of a relay, and of its being away.
LIFE_S, AWAY_S = 0.25, 0.3
#: What is tried lasts longer than any single life.
DEADLINE_S = 0.6


@pytest.fixture(autouse=True)
def _saves_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SAVE_INTERVAL_S", 0.02)


@attrs.define(eq=False)
class Lives:
    """A relay that is killed again and again."""

    folder: Path
    settings: dict[str, Any] = attrs.field(factory=dict)
    #: Seconds that it has run, in all of its lives.
    ran_s: float = 0.0

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Daemon]:
        """The next of its lives."""
        began = trio.current_time()
        async with daemon(self.folder, store="sqlite", **self.settings) as relay:
            yield relay
        self.ran_s += trio.current_time() - began

    async def until_ended(self, submit: Submit) -> Failed:
        """Live until the request has ended; a deadline that began anew with each life would never come.

        Returns:
            Its last frame.
        """
        for _ in range(12):
            async with self.one() as relay:
                request = relay.relay.requests[submit.request_id]
                with trio.move_on_after(LIFE_S):
                    while request.live:
                        await request.changed.wait()
                end = await self._last_frame(relay, submit) if not request.live else None
            if end is not None:
                return end
            await trio.sleep(AWAY_S)
        raise AssertionError(f"it has not ended in {self.ran_s} s")

    @staticmethod
    async def _last_frame(relay: Daemon, submit: Submit) -> Failed:
        async with peer(relay.url, "client") as client:
            client.send(Attach(request_id=submit.request_id))
            end: Failed = await client.next(Failed)
            return end


async def accepted(relay: Daemon, **fields: Any) -> Submit:
    submit = a_submit(**({"detach": True} | fields))
    async with peer(relay.url, "client") as client:
        client.send(submit)
        await client.next(Accepted)
    return submit


@pytest.mark.trio
async def test_a_queue_timeout_comes_though_no_life_of_the_relay_is_as_long(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    async with lives.one() as relay:
        submit = await accepted(relay, queue_timeout_s=DEADLINE_S)
    end = await lives.until_ended(submit)
    assert end.code == "queue_timeout"
    assert lives.ran_s >= DEADLINE_S, "nor does the time count that it was away"


@pytest.mark.trio
async def test_a_worker_that_died_is_given_up_though_no_life_of_the_relay_is_as_long(tmp_path: Path) -> None:
    limits = {"worker_grace_s": DEADLINE_S}
    lives = Lives(tmp_path, {"limits": limits})
    async with lives.one() as relay, fake_worker(relay.url, instance=an_id()) as worker:
        submit = await accepted(relay, retry="never")
        await worker.assigned()
        await relay.relay.store.flush()
    end = await lives.until_ended(submit)
    assert end.code == "worker_lost"
    assert lives.ran_s >= DEADLINE_S, "nor does the time count that it was away"


@pytest.mark.trio
async def test_a_run_timeout_goes_on_where_it_stood(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    async with lives.one() as relay, fake_worker(relay.url, instance=an_id()) as worker:
        submit = await accepted(relay, run_timeout_s=DEADLINE_S)
        await worker.assigned()
        await relay.relay.store.flush()
    end = await lives.until_ended(submit)
    assert end.code == "run_timeout"
    assert lives.ran_s >= DEADLINE_S, "nor does the time count that it was away"


@pytest.mark.trio
async def test_a_request_that_nobody_holds_any_more_is_not_kept_for_ever_by_restarts(tmp_path: Path) -> None:
    # Its resume window begins anew with each life, as nobody could come back in between; its own deadline does not.
    limits = {"resume_window_s": 2 * LIFE_S}
    lives = Lives(tmp_path, {"limits": limits})
    async with lives.one() as relay:
        submit = await accepted(relay, detach=False, queue_timeout_s=DEADLINE_S)
    end = await lives.until_ended(submit)
    assert end.code == "queue_timeout"


@pytest.mark.trio
async def test_a_result_is_kept_for_its_time_over_all_lives(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    async with lives.one() as relay, fake_worker(relay.url, instance=an_id()) as worker:
        submit = await accepted(relay)
        worker.speak(await worker.assigned(), [samples(10)])
        await until(lambda: not relay.relay.requests[submit.request_id].live)
        await relay.relay.finalizer.wait_finalized()
        other = await accepted(relay)  # while it waits, the clock is stored
        await trio.sleep(LIFE_S)
    async with lives.one() as relay:
        ended_at = relay.relay.requests[submit.request_id].ended_at
        assert ended_at is not None
        assert trio.current_time() - ended_at >= LIFE_S * 0.8
        assert relay.relay.requests[other.request_id].live


def test_a_clock_goes_on_where_its_store_says_that_it_stood() -> None:
    async def main() -> None:
        now = trio.current_time()
        later = RelayClock.after(Loaded(uptime_s=100.0))
        assert 0.0 <= later.of(trio.current_time()) - 100.0 < 5.0
        assert 0.0 <= now - later.trio_time(40.0) - 60.0 + 5.0 < 10.0
        assert later.trio_time(None) == later.started_at

    trio.run(main)


@pytest.mark.trio
async def test_a_relay_at_rest_writes_nothing(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    async with lives.one() as relay:
        await relay.relay.store.flush()
        written = relay.relay.store.transactions
        await trio.sleep(0.2)
        assert relay.relay.store.transactions == written
        await relay.relay.store.commit(PutUptime(7.0))
        assert (await relay.relay.store.load()).uptime_s == 7.0
