"""What a principal may use: exact bounds, whose limits hold, and how its share of the event loop is counted."""

import time
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from protocol.wire.messages import Submit
from relayd.auth.tokens import Principal
from relayd.config.schema import ConfigError, PrincipalLimits, SpaceConfig, structure
from relayd.core.principals import (
    UNLIMITED,
    Principals,
    PrincipalUsage,
    TokenBucket,
    cap_submit,
    full_message,
    is_limited,
    limits_of,
)
from relayd.store.records import TokenLimits

SETTINGS = PrincipalLimits()


def a_principal(name: str = "ann", role: str = "client", **fields: Any) -> Principal:
    return Principal(name=name, role=role, token_id=fields.pop("token_id", f"token of {name}"), **fields)


@attrs.frozen
class Connection:
    principal: Principal | None


@attrs.define(eq=False)
class Turn:
    """Does something at its turn."""

    work: Callable[[], object]

    def resume(self) -> None:
        """See `Deferrable`."""
        self.work()


# -- whose limits hold -------------------------------------------------------------------------------------------------


def test_a_token_names_limits_of_its_own_and_those_of_the_settings_hold_beside_them() -> None:
    own = a_principal(limits=TokenLimits(max_queued=7, max_priority=0))
    assert limits_of(own, SETTINGS) == attrs.evolve(SETTINGS, max_queued=7, max_priority=0)
    assert limits_of(a_principal(), SETTINGS) is SETTINGS


def test_local_users_and_operators_have_no_limits_and_others_do() -> None:
    for free in (a_principal(local=True), a_principal(role="operator")):
        assert not is_limited(free)
        assert limits_of(free, SETTINGS) is UNLIMITED
    assert is_limited(a_principal())
    assert is_limited(a_principal(role="worker"))


def test_no_setting_allows_more_than_those_without_limits_have() -> None:
    names = [field.name for field in attrs.fields(PrincipalLimits) if field.name != "max_running"]
    for name in names:
        structure(PrincipalLimits, {name: getattr(UNLIMITED, name)}, (), "the largest")
        with pytest.raises(ConfigError):
            structure(PrincipalLimits, {name: getattr(UNLIMITED, name) + 1}, (), "beyond it")
    assert UNLIMITED.max_running is None


@pytest.mark.parametrize(
    ("principal", "others", "allowed"),
    [
        (a_principal(), ["ann"], True),
        (a_principal(), ["ann", "ann"], False),
        (a_principal(), ["ann", "bob", "bob", None], True),
        (a_principal(local=True), ["ann"] * 9, True),
        (a_principal(role="operator"), ["ann"] * 9, True),
        (a_principal(limits=TokenLimits(max_connections=3)), ["ann"] * 2, True),
        (a_principal(limits=TokenLimits(max_connections=3)), ["ann"] * 3, False),
        (a_principal(limits=TokenLimits(max_connections=1), token_id="another"), ["ann"] * 3, True),
        (a_principal(limits=TokenLimits(max_connections=1), role="operator"), ["ann"], False),
    ],
)
def test_connections_are_counted_by_principal_or_by_a_token_that_names_their_number(
    principal: Principal, others: list[str | None], allowed: bool
) -> None:
    open_now = [Connection(None if name is None else a_principal(name)) for name in others]
    message = full_message(principal, attrs.evolve(SETTINGS, max_connections=2), open_now)
    assert (message is None) is allowed


def test_a_submit_is_capped_by_what_the_operator_allows() -> None:
    space = SpaceConfig(queue_timeout_s=10.0, run_timeout_s=20.0)
    limits = attrs.evolve(SETTINGS, max_priority=4)
    plain = Submit(request_id="1" * 32, space="tts", params={})
    capped = cap_submit(attrs.evolve(plain, priority=9, queue_timeout_s=11.0, run_timeout_s=21.0), limits, space)
    assert (capped.priority, capped.queue_timeout_s, capped.run_timeout_s) == (4, 10.0, 20.0)
    low = attrs.evolve(plain, priority=3, queue_timeout_s=9.0, run_timeout_s=19.0)
    assert cap_submit(low, limits, space) == low
    unset = cap_submit(plain, limits, space)
    assert (unset.queue_timeout_s, unset.run_timeout_s) == (None, None)


# -- requests a second -------------------------------------------------------------------------------------------------


def test_a_bucket_is_never_fuller_than_its_burst_and_gives_whole_events_only() -> None:
    bucket = TokenBucket.full(4.0, 2.0, 100.0)
    assert (bucket.level, bucket.burst, bucket.rate) == (2.0, 2.0, 4.0)
    bucket.refill(200.0)
    assert (bucket.level, bucket.updated_at) == (2.0, 200.0)
    assert (bucket.consume(200.0), bucket.consume(200.0), bucket.level) == (0.0, 0.0, 0.0)
    assert bucket.consume(200.125) == 0.125
    assert bucket.level == 0.5, "what is refused costs nothing"


@pytest.mark.trio
async def test_five_seconds_of_requests_may_come_at_once_and_at_least_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    principals, ann = Principals(), a_principal()
    settings = attrs.evolve(SETTINGS, requests_per_s=2.0)
    assert [principals.request_wait_s(ann, settings) for _ in range(11)] == [0.0] * 10 + [0.5]
    assert principals.request_wait_s(a_principal("bob"), settings) == 0.0
    slow = attrs.evolve(SETTINGS, requests_per_s=0.1)
    assert [principals.request_wait_s(a_principal("cid"), slow) for _ in range(2)] == [0.0, 10.0]
    for free in (a_principal(local=True), a_principal(role="operator")):
        assert {principals.request_wait_s(free, slow) for _ in range(9)} == {0.0}
    await trio.sleep(0.25)
    assert principals.request_wait_s(ann, attrs.evolve(settings, requests_per_s=4.0)) == 0.0, "reloaded"


# -- its share of the event loop ---------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_principal_has_a_fifth_of_the_loop_and_strangers_a_half_together(
    autojump_clock: trio.testing.MockClock,
) -> None:
    principals = Principals()
    ann, strangers = principals.usage_of("ann"), principals.usage_of("")
    assert (ann.cpu.rate, strangers.cpu.rate) == (0.2, 0.5)
    assert (ann.newest_first, strangers.newest_first) == (False, True)
    assert ann.cpu.level == ann.cpu.burst == strangers.cpu.level == 0.003
    now = trio.current_time()
    assert ann.charge(0.002, now)
    assert not ann.charge(0.001, now), "nothing is left"
    assert ann.charged_s == pytest.approx(0.003)
    assert ann.max_retained is None
    await trio.sleep(0.01)
    assert ann.charge(0.0, trio.current_time())


async def turns_of(usage: PrincipalUsage, principals: Principals, count: int) -> list[tuple[int, float]]:
    """The turns of connections that came one after the other, each with its time."""
    began, taken = trio.current_time(), list[tuple[int, float]]()

    def take(number: int) -> None:
        usage.charge(0.1, trio.current_time())
        taken.append((number, round(trio.current_time() - began, 2)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        for number in range(count):
            principals.defer(usage, Turn(lambda number=number: take(number)))  # type: ignore[misc]
        await trio.sleep(20)
        assert len(taken) == count
        assert not usage.scheduled
        assert not usage.deferred
        nursery.cancel_scope.cancel()
    return taken


@pytest.mark.trio
async def test_turns_come_in_order_as_the_share_allows_and_to_the_newest_stranger_first(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    principals = Principals()
    ann = principals.usage_of("ann")
    ann.charge(0.103, trio.current_time())
    assert await turns_of(ann, principals, 3) == [(0, 0.5), (1, 1.0), (2, 1.5)]
    strangers = principals.usage_of("")
    strangers.charge(0.103, trio.current_time())
    assert await turns_of(strangers, principals, 3) == [(2, 0.2), (1, 0.4), (0, 0.6)]


@pytest.mark.trio
async def test_what_a_turn_costs_beyond_its_messages_is_charged_too(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [7.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    principals = Principals()
    usage = principals.usage_of("ann")

    def work() -> None:
        now[0] += 0.05
        usage.charge(0.02, trio.current_time())

    def fails() -> None:
        now[0] += 0.01
        raise OSError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        principals.defer(usage, Turn(work))
        await trio.sleep(1)
        assert usage.charged_s == pytest.approx(0.05)
        principals.defer(usage, Turn(fails))
        await trio.sleep(1)
        assert usage.charged_s == pytest.approx(0.06), "and a fault ends nothing"
        principals.defer(usage, Turn(lambda: usage.charge(0.5, trio.current_time())))
        await trio.sleep(1)
        assert usage.charged_s == pytest.approx(0.56), "nothing is given back"
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_strangers_pay_for_their_turn_and_wait_behind_those_that_wait(
    autojump_clock: trio.testing.MockClock,
) -> None:
    principals = Principals()
    strangers = principals.usage_of("")
    began = trio.current_time()
    await principals.wait_stranger_turn(0.053)
    assert trio.current_time() == began
    assert strangers.cpu.level == pytest.approx(-0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(principals.serve)
        await principals.wait_stranger_turn(0.05)
        assert trio.current_time() - began == pytest.approx(0.1, abs=0.002)
        with trio.move_on_after(0.01):
            await principals.wait_stranger_turn(0.05)
        assert not strangers.deferred, "who has gone waits no more"
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_only_who_has_used_up_its_requests_waits_to_be_refused(autojump_clock: trio.testing.MockClock) -> None:
    principals = Principals()
    usage = principals.usage_of("ann")
    usage.requests = TokenBucket(0.0, 2.0, 1.0, trio.current_time())
    await principals.wait_refused_turn("ann", 1.0)
    assert usage.cpu.level > 0.0, "it has one left"
    usage.requests.level = 0.999
    await principals.wait_refused_turn("ann", 1.0)
    assert usage.cpu.level == pytest.approx(0.003 - 1.0)
    with trio.move_on_after(1) as waits:
        await principals.wait_refused_turn("ann", 1.0)
    assert waits.cancelled_caught
