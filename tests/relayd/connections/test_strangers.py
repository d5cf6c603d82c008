"""Strangers have a budget of their own: however many there are, a peer with a token gets in."""

from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from protocol.client.address import parse_address
from protocol.link.dial import open_link
from protocol.wire.errors import ConnectError
from relayd.auth.login_throttle import MAX_FAILURES, network_of
from relayd.connections.budget import ConnectionBudget, ConnectionSlot
from tests.support.relay import a_config, daemon, kept_logs, new_token, peer, until


def budget_of(tmp_path: Path, **limits: int) -> ConnectionBudget:
    config = a_config(tmp_path, limits=limits)
    return ConnectionBudget(lambda: config)


def strangers(budget: ConnectionBudget, network: str, count: int) -> list[ConnectionSlot]:
    """New connections of one address; `hang_up` marks those that were dropped."""
    slots = []
    for port in range(count):
        slots.append(slot := budget.admit(f"{network}:{port}", None))
        slot.hang_up = partial(setattr, slot, "released", True)
    return slots


@pytest.mark.trio
async def test_the_oldest_stranger_of_an_address_makes_room_for_its_next(tmp_path: Path) -> None:
    budget = budget_of(tmp_path, max_pending_per_address=3)
    mine, others = strangers(budget, "192.0.2.1", 5), strangers(budget, "192.0.2.2", 3)
    assert [slot.released for slot in mine] == [True, True, False, False, False]
    assert not any(slot.released for slot in others)


@pytest.mark.trio
async def test_a_full_budget_is_paid_by_the_address_that_has_most(tmp_path: Path) -> None:
    budget = budget_of(tmp_path, max_pending=64, max_pending_per_address=64)
    few, many = strangers(budget, "192.0.2.2", 4), strangers(budget, "192.0.2.1", 64)
    assert not any(slot.released for slot in few)
    assert [slot.released for slot in many].count(True) == 4
    assert many[0].released
    assert len(budget) == 64


@pytest.mark.trio
async def test_a_login_leaves_the_strangers_and_a_logout_returns_to_them(tmp_path: Path) -> None:
    budget = budget_of(tmp_path, max_connections=40, max_pending_per_address=2)
    slot = budget.admit("192.0.2.1:1", None)
    assert slot.log_in("client")
    assert (budget.known, len(budget)) == (1, 0)
    strangers(budget, "192.0.2.1", 5)
    slot.log_out()
    assert (budget.known, len(budget)) == (0, 2)
    slot.release()
    slot.release()
    assert (budget.known, len(budget)) == (0, 1)


@pytest.mark.trio
async def test_some_connections_are_kept_for_workers_and_operators(tmp_path: Path) -> None:
    budget = budget_of(tmp_path, max_connections=40)
    slots = [budget.admit(f"192.0.2.{number}:1", None) for number in range(41)]
    assert [slot.log_in("client") for slot in slots].count(True) == 38
    assert [slot.log_in(role) for slot, role in zip(slots[38:], ["worker", "operator", "worker"], strict=True)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("peer_name", "network"),
    [
        ("192.0.2.1:80", "192.0.2.1"),
        ("[2001:db8:1:2:3:4:5:6]:80", "2001:db8:1:2::/64"),
        ("[fe80::1%eth0]:80", "fe80::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("a name", "a name"),
    ],
)
def test_an_ipv6_customer_has_one_network(peer_name: str, network: str) -> None:
    assert network_of(peer_name) == network


@pytest.mark.trio
@pytest.mark.parametrize("octets", [b"", b"GET ", b"GET /health HTTP/1.1\r\nHost: relay\r\n\r\n"])
async def test_silent_strangers_shut_nobody_out(tmp_path: Path, octets: bytes) -> None:
    limits = {"max_connections": 2, "max_pending_per_address": 5}
    async with daemon(tmp_path, listen="127.0.0.1:0", limits=limits) as relay:
        url, token = relay.urls[0], await new_token(relay)
        port = int(url.rpartition(":")[2])
        with kept_logs() as logs:
            streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(20)]
            for stream in streams:
                await stream.send_all(octets)
            async with peer(url, "client", token) as client, peer(relay.url, "operator") as operator:
                await client.settled()
                await operator.settled()
            await until(lambda: relay.gateway.budget.dropped >= 15)
            for stream in streams:
                await trio.aclose_forcefully(stream)
            await until(lambda: not relay.gateway.budget.open)
        assert sum(line["event"] == "connections dropped before their login" for line in logs) == 1
        await relay.goes_on()


@pytest.mark.trio
async def test_handshakes_without_a_login_shut_nobody_out(tmp_path: Path) -> None:
    limits = {"max_pending_per_address": 3, "hello_timeout_s": 60}
    async with daemon(tmp_path, listen="127.0.0.1:0", limits=limits) as relay, trio.open_nursery() as nursery:
        url, token = relay.urls[0], await new_token(relay)

        async def shake_hands_only() -> None:
            with suppress(ConnectError):  # dropped in the middle of it
                async with open_link(parse_address(url)) as link:
                    await link.wait_gone()

        for _ in range(10):
            nursery.start_soon(shake_hands_only)
        await until(lambda: relay.gateway.budget.dropped == 7)
        async with peer(url, "client", token) as client:
            await client.settled()
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_an_address_that_failed_too_often_waits_and_then_its_good_token_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.connections.budget.PENALTY_S", 0.2)
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        url, token = relay.urls[0], await new_token(relay)
        for _ in range(MAX_FAILURES):
            relay.gateway.budget.failures.add("127.0.0.1", trio.current_time())
        began = trio.current_time()
        async with peer(url, "client", token) as client:
            await client.settled()
        assert trio.current_time() - began >= 0.2


@pytest.mark.trio
@pytest.mark.parametrize("role", ["client", "nobody"])
async def test_http_requests_of_strangers_have_one_share_and_those_with_a_token_pass_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr("relayd.core.principals.STRANGERS_SHARE", 1e-9)
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        token = await new_token(relay)
        await relay.relay.principals.wait_stranger_turn(1.0)  # the share is used up
        port = int(relay.urls[0].rpartition(":")[2])
        header = f"Authorization: Bearer {token if role == 'client' else 'rly_c_unknown'}\r\n"
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(f"GET /v1/spaces HTTP/1.1\r\nHost: relay\r\n{header}\r\n".encode())
            with trio.move_on_after(10 if role == "client" else 0.2) as waited:
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        assert waited.cancelled_caught is (role == "nobody")
        await relay.goes_on()
