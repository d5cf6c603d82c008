"""One principal's share: what is beyond it waits or is refused, and no other principal notices."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.frames import Completed
from protocol.wire.messages import Accepted, Attach, Ping, Pong, Queued, Rejected, Spaces, SpacesReply, Status
from relayd.core import retention
from relayd.core.principals import (
    CPU_BURST_S,
    CPU_SHARE,
    MAX_DEBT_S,
    STRANGERS_SHARE,
    TIDY_AT,
    LinkMeter,
    Principals,
    PrincipalUsage,
    TokenBucket,
)
from relayd.store.records import TokenLimits
from tests.support.fake_worker import fake_worker, samples
from tests.support.relay import Peer, a_submit, an_input, daemon, new_token, peer, until


def limited(**limits: Any) -> dict[str, Any]:
    return {"limits": {"principal": limits}}


def test_a_bucket_allows_a_burst_and_then_its_rate() -> None:
    bucket = TokenBucket.full(2.0, 3.0, now=10.0)
    assert [bucket.consume(10.0) for _ in range(3)] == [0.0] * 3
    assert bucket.consume(10.0) == pytest.approx(0.5)
    assert bucket.consume(10.25) == pytest.approx(0.25)
    assert bucket.consume(10.5) == 0.0
    assert bucket.consume(10.0) > 0.0, "a clock that is read out of order gives nothing"
    assert [bucket.consume(1e9) for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(0.5)]


@attrs.define(eq=False)
class Turn:
    """A connection whose turn costs `cost_s`, and which comes `left` times again."""

    usage: PrincipalUsage
    principals: Principals
    cost_s: float
    left: int
    done_at: float = 0.0

    def resume(self) -> None:
        """Use the principal's share."""
        self.usage.charge(self.cost_s, trio.current_time())
        self.left -= 1
        if self.left:
            self.principals.defer(self.usage, self)
        else:
            self.done_at = trio.current_time()


@pytest.mark.trio
async def test_a_principal_in_debt_waits_and_another_does_not(autojump_clock: trio.testing.MockClock) -> None:
    principals = Principals()
    greedy, modest = principals.usage_of("greedy"), principals.usage_of("modest")
    assert principals.usage_of("greedy") is greedy
    began = trio.current_time()
    assert not greedy.charge(1.0, began)
    turns = [Turn(greedy, principals, 0.1, 3), Turn(modest, principals, 0.0, 1)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        for turn in turns:
            principals.defer(turn.usage, turn)
        await until(lambda: all(not turn.left for turn in turns))
        nursery.cancel_scope.cancel()
    assert turns[1].done_at == began
    assert turns[0].done_at - began == pytest.approx((1.2 - CPU_BURST_S) / CPU_SHARE, abs=0.01)


@pytest.mark.trio
async def test_a_connection_that_waits_again_and_again_is_scheduled_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    principals = Principals()
    usage = principals.usage_of("busy")
    turn = Turn(usage, principals, 0.01, 200)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        principals.defer(usage, turn)
        await until(lambda: turn.left < 50)
        assert len(principals._due) <= 1
        nursery.cancel_scope.cancel()


@attrs.define(eq=False)
class MeteredLink:
    """A link that is read at once when it may be."""

    spent_s: list[float]
    meter: LinkMeter | None = None
    reading_paused: bool = False
    stopped: bool = False
    turns: int = 0

    def pause_reading(self) -> None:
        """Wait for a turn."""
        self.reading_paused = True

    def resume_reading(self) -> None:
        """Be read again, later."""
        self.reading_paused = False

    def read(self) -> None:
        """Use 0.1 s."""
        if not self.reading_paused and self.meter is not None:
            self.meter.begin()
            self.spent_s[0] += 0.1
            self.turns += 1
            self.meter.end()


@pytest.mark.trio
async def test_links_that_wait_are_not_all_read_together(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent_s = [0.0]
    monkeypatch.setattr("time.thread_time", lambda: spent_s[0])
    principals = Principals()
    usage = principals.usage_of("busy")
    links = [MeteredLink(spent_s) for _ in range(10)]
    for link in links:
        link.meter = LinkMeter(link, usage, principals)
        link.read()
    assert all(link.reading_paused for link in links)
    turns_at_once = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        for _ in range(1_000):
            await trio.sleep(0.02)
            before = sum(link.turns for link in links)
            for link in links:
                link.read()
            turns_at_once.append(sum(link.turns for link in links) - before)
        nursery.cancel_scope.cancel()
    assert max(turns_at_once) == 1
    assert sum(turns_at_once) == pytest.approx((20.0 * CPU_SHARE - MAX_DEBT_S) / 0.1, rel=0.1)
    turns = [link.turns for link in links]
    assert max(turns) - min(turns) <= 1


@pytest.mark.trio
async def test_a_link_waits_once_is_charged_from_its_beginning_and_costs_nothing_after_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent_s, real = [0.0], time.thread_time
    monkeypatch.setattr("time.thread_time", lambda: real() + spent_s[0])
    principals = Principals()
    usage = principals.usage_of("busy")
    usage.charge(50.0, trio.current_time())
    link = MeteredLink(spent_s)
    meter = LinkMeter(link, usage, principals)
    for _ in range(2):  # the second in the middle of what the first has left
        spent_s[0] += 10.0
        meter.end()
        meter.begin()
    assert usage.charged_s == pytest.approx(70.0, abs=2.0)
    assert list(usage.deferred) == [meter]
    link.stopped = True
    meter.resume()
    assert link.reading_paused
    assert usage.charged_s == pytest.approx(70.0, abs=2.0)


@attrs.define(eq=False)
class Onlooker:
    """Sees how far another is when its own turn comes."""

    other: Turn
    left: int = 0

    def resume(self) -> None:
        """Look."""
        self.left = self.other.left


@pytest.mark.trio
async def test_a_principal_that_has_its_share_still_lets_others_go_in_between(
    autojump_clock: trio.testing.MockClock,
) -> None:
    principals = Principals()
    turn = Turn(principals.usage_of("busy"), principals, 0.0, 200)
    onlooker = Onlooker(turn)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        principals.defer(turn.usage, turn)
        principals.defer(principals.usage_of("modest"), onlooker)
        await until(lambda: not turn.left)
        nursery.cancel_scope.cancel()
    assert onlooker.left > 190


@attrs.define(eq=False)
class Waiting:
    """One that waits for its turn, and does something then."""

    resume: Callable[[], None]


@pytest.mark.trio
@pytest.mark.parametrize("are_strangers", [False, True])
async def test_those_who_wait_have_their_turns_in_order_and_strangers_the_latest_first(are_strangers: bool) -> None:
    principals, came = Principals(), list[int]()
    usage = principals.strangers() if are_strangers else principals.usage_of("ann")
    for number in range(3):
        principals.defer(usage, Waiting(partial(came.append, number)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        await until(lambda: len(came) == 3)
        nursery.cancel_scope.cancel()
    assert came == ([2, 1, 0] if are_strangers else [0, 1, 2])


@pytest.mark.trio
async def test_whoever_gives_up_waiting_in_the_turn_of_another_costs_nothing_and_a_turn_is_charged_what_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent_s, principals, came = [0.0], Principals(), list[str]()
    monkeypatch.setattr("time.thread_time", lambda: spent_s[0])
    usage = principals.usage_of("ann")
    usage.charge(0.001, trio.current_time())

    def stay_alone() -> None:
        usage.deferred.clear()
        came.append("first")

    def work() -> None:
        usage.charge(2.0, trio.current_time())
        spent_s[0] += 5.0
        came.append("third")

    principals.defer(usage, Waiting(stay_alone))
    principals.defer(usage, Waiting(partial(came.append, "second")))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        await until(lambda: bool(came))
        principals.defer(usage, Waiting(work))
        await until(lambda: len(came) == 2)
        nursery.cancel_scope.cancel()
    assert came == ["first", "third"]
    assert usage.charged_s == pytest.approx(5.001)


@pytest.mark.trio
async def test_strangers_do_not_wait_for_a_whole_flood_and_those_who_left_are_forgotten(
    autojump_clock: trio.testing.MockClock,
) -> None:
    principals = Principals()
    strangers = principals.strangers()
    began = trio.current_time()
    for _ in range(10_000):  # each is read once, and pauses, and is closed
        assert not strangers.charge(0.01, began)
        link = MeteredLink([0.0], reading_paused=True)
        principals.defer(strangers, LinkMeter(link, strangers, principals))
        link.stopped = True
    assert len(strangers.deferred) <= 2 * TIDY_AT
    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        await principals.wait_stranger_turn(0.001)
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began <= 2 * MAX_DEBT_S / STRANGERS_SHARE


@pytest.mark.trio
async def test_messages_beyond_the_share_wait_and_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.principals.CPU_BURST_S", 1e-9)
    async with daemon(tmp_path) as relay, peer(relay.url, "client", await new_token(relay)) as client:
        stamps = [float(number) for number in range(300)]
        for stamp in stamps:
            client.send(Ping(timestamp=stamp))
        assert [(await client.next(Pong)).timestamp for _ in stamps] == stamps
        client.send(Spaces())
        await client.next(SpacesReply)


@pytest.mark.trio
async def test_a_client_that_leaves_while_it_waits_for_its_turn_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.principals.CPU_BURST_S", 1e-9)
    monkeypatch.setattr("relayd.core.principals.CPU_SHARE", 0.02)
    monkeypatch.setattr("relayd.core.principals.MAX_DEBT_S", 0.02)  # a garbage collection in its turn costs no minute
    async with daemon(tmp_path) as relay:
        async with peer(relay.url, "client", await new_token(relay)) as client:
            for number in range(100):
                client.send(Ping(timestamp=float(number)))
            await client.next(Pong)
        await until(lambda: not relay.relay.connections and not relay.gateway.budget.open)


@pytest.mark.trio
async def test_submits_beyond_the_rate_are_refused_until_later(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, **limited(requests_per_s=0.5)) as relay,
        peer(relay.url, "client", await new_token(relay)) as client,
        peer(relay.url, "client") as local,
    ):
        submits = [a_submit() for _ in range(3)]
        for submit in submits:
            client.send(submit)
        refused = await client.next(Rejected)
        assert (refused.request_id, refused.code) == (submits[2].request_id, "rate_limited")
        assert refused.retryable
        assert 0.0 < (refused.retry_after_s or 0.0) <= 2.0
        client.send(submits[0])  # the same again is no new request
        client.send(Status(request_id=submits[0].request_id))
        await client.next(Queued, Accepted)
        for _ in range(5):  # local users are not limited
            local.send(a_submit())
            await local.next(Queued)


@pytest.mark.trio
@pytest.mark.parametrize(("limits", "of_token"), [({"max_uploads": 1}, False), ({"max_uploads": 1}, True)])
async def test_uploads_at_once_are_limited(tmp_path: Path, limits: dict[str, int], of_token: bool) -> None:
    async with (
        daemon(tmp_path, **limited(**({} if of_token else limits))) as relay,
        peer(relay.url, "client", await new_token(relay, limits=limits if of_token else {})) as client,
    ):
        first, second = (a_submit(inputs={"voice": an_input(b"voice")}) for _ in range(2))
        client.send(first)
        client.send(second)
        refused = await client.next(Rejected)
        assert (refused.request_id, refused.code) == (second.request_id, "rate_limited")
        assert "may upload the inputs of 1 requests" in refused.message


@pytest.mark.trio
async def test_inputs_of_waiting_requests_are_limited_together(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, **limited(max_input_bytes=10)) as relay,
        peer(relay.url, "client", await new_token(relay)) as client,
    ):
        large, next_one = (a_submit(inputs={"voice": an_input(b"v" * size)}) for size in (12, 1))
        client.send(large)  # a single request may have any size
        client.send(next_one)
        refused = await client.next(Rejected)
        assert (refused.request_id, refused.code) == (next_one.request_id, "rate_limited")
        assert "13 bytes" in refused.message


@pytest.mark.trio
async def test_readers_are_limited(tmp_path: Path) -> None:
    async with daemon(tmp_path, **limited(max_readers=1)) as relay:
        token = await new_token(relay)
        async with peer(relay.url, "client", token) as client, peer(relay.url, "client", token) as other:
            submit, one_more = a_submit(), a_submit()
            client.send(submit)
            await client.next(Queued)
            client.send(one_more)
            refused = await client.next(Rejected)
            assert (refused.request_id, refused.code) == (one_more.request_id, "rate_limited")
            for peer_ in (client, other):  # its own again, also from a new connection after a cut, counts once
                peer_.send(Attach(request_id=submit.request_id))
                await peer_.next(Queued)


@pytest.mark.trio
async def test_a_client_cannot_exceed_the_priority_and_the_timeouts_that_the_operator_set(tmp_path: Path) -> None:
    space = {"tts": {"queue_timeout_s": 60.0, "run_timeout_s": 50.0}}
    async with daemon(tmp_path, spaces=space, **limited(max_priority=6)) as relay:
        for token, priority, timeouts in (
            (await new_token(relay), 6, (60.0, 50.0)),
            (await new_token(relay, name="bob", limits={"max_priority": 8}), 8, (60.0, 50.0)),
            (None, 9, (1e6, 1e6)),  # a local user
        ):
            async with peer(relay.url, "client", token) as client:
                submit = a_submit(priority=9, queue_timeout_s=1e6, run_timeout_s=1e6)
                client.send(submit)
                await client.next(Queued)
                request = relay.relay.requests[submit.request_id]
                assert request.entry.priority == priority
                assert (request.queue_timeout_s, request.run_timeout_s) == timeouts
                client.send(attrs.evolve(submit, priority=3, run_timeout_s=2e6))  # and it is still the same request
                await client.next(Queued)


@pytest.mark.trio
async def test_timeouts_below_the_spaces_are_the_clients_own(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client", await new_token(relay)) as client:
        submit = a_submit(priority=1, queue_timeout_s=7.0, run_timeout_s=8.0)
        client.send(submit)
        await client.next(Queued)
        request = relay.relay.requests[submit.request_id]
        assert (request.entry.priority, request.queue_timeout_s, request.run_timeout_s) == (1, 7.0, 8.0)


async def finish(client: Peer, worker: Any, count: int) -> list[str]:
    """Requests that a worker has completed, one after the other."""
    ids = []
    for _ in range(count):
        submit = a_submit(detach=True)
        client.send(submit)
        worker.speak(await worker.assigned(), [samples(10)])
        await client.next(Completed)
        ids.append(submit.request_id)
    return ids


@pytest.mark.trio
@pytest.mark.parametrize("settings", [{"max_retained": 3}, {}], ids=["own limit", "limit of all"])
async def test_a_principal_with_many_results_pushes_out_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int]
) -> None:
    monkeypatch.setattr(retention, "REAP_INTERVAL_S", 0.02)
    if not settings:
        monkeypatch.setattr(retention, "MAX_ENDED", 4)
    async with daemon(tmp_path, **limited(**settings)) as relay, fake_worker(relay.url) as worker:
        async with peer(relay.url, "client", await new_token(relay)) as few:
            (own,) = await finish(few, worker, 1)
        async with peer(relay.url, "client", await new_token(relay, name="bob")) as many:
            others = await finish(many, worker, 8)
        await until(lambda: set(relay.relay.requests) == {own, *others[-3:]})


def test_a_token_can_name_every_limit_of_a_principal() -> None:
    from relayd.config.schema import PrincipalLimits

    assert {field.name for field in attrs.fields(TokenLimits)} == {f.name for f in attrs.fields(PrincipalLimits)}
