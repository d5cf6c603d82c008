"""The end of a link of the reactor: closes, silence, broken rules, and what the peer sent last."""

import socket

import pytest
import trio
import trio.testing

from protocol.link import base
from protocol.link.limits import LinkLimits
from protocol.link.websocket_frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Close,
    Ping,
    Pong,
    close_payload,
    make_frame,
)
from protocol.wire.errors import LinkBroken, LinkClosed
from protocol.wire.frames import MAX_MESSAGE_BYTES
from relayd.net.reactor import open_reactor
from tests.relayd.net.far_end import FarEnd, Taken, hear_out, linked
from tests.support.relay import until


@pytest.mark.trio
async def test_pings_go_out_and_their_pongs_tell_the_round_trip() -> None:
    async with linked(ping_interval_s=0.1) as (_plane, link, far):
        for _ in range(3):
            ping = await far.next()
            assert isinstance(ping, Ping)
            await far.send(ping.payload, PONG)
        await until(lambda: link.rtt_s is not None)
        await far.send(b"are you there", PING)
        while not isinstance(event := await far.next(), Pong):
            pass
        assert event.payload == b"are you there"


@pytest.mark.trio
async def test_a_silent_peer_is_taken_for_dead_and_one_that_sends_anything_is_not() -> None:
    async with linked(ping_interval_s=0.1, dead_after_s=0.5) as (_plane, link, far):
        for _ in range(8):
            await trio.sleep(0.1)
            await far.send(b"here")
        assert link.gone is None
        last = trio.current_time()
        with pytest.raises(LinkBroken, match="nothing received"):
            await hear_out(link)
        assert trio.current_time() - last > 0.2
        assert link.close_code == 1006


@pytest.mark.trio
async def test_a_peer_that_closes_is_answered_and_hung_up_on_and_its_last_messages_are_kept() -> None:
    async with linked() as (_plane, link, far):
        await far.stream.send_all(
            make_frame(BINARY, b"last words", masked=True)
            + make_frame(CLOSE, close_payload(4001, "bye"), masked=True)
            + make_frame(BINARY, b"too late", masked=True)
        )
        assert await far.next() == Close(4001, "")
        assert await far.hung_up()
        assert await link.receive() == b"last words"
        with pytest.raises(LinkBroken, match="4001: bye"):
            await link.receive()
        taken = Taken()
        link.set_handler(taken)  # who comes late is told all the same
        await until(lambda: taken.ends > 0)
        assert (taken.messages, taken.ends) == ([], 1)


@pytest.mark.trio
async def test_closing_sends_the_backlog_and_the_code_and_waits_for_the_answer() -> None:
    async with linked(max_backlog_bytes=64 * MAX_MESSAGE_BYTES) as (_plane, link, far), trio.open_nursery() as nursery:
        for _ in range(20):
            link.send_nowait(bytes(MAX_MESSAGE_BYTES))
        nursery.start_soon(link.aclose, 1001, "going away")
        for _ in range(20):
            assert await far.next() == bytes(MAX_MESSAGE_BYTES)
        assert await far.next() == Close(1001, "going away")
        assert not link.stopped
        await far.send(close_payload(1001, ""), CLOSE)
        assert await far.hung_up()
    assert link.close_code == 1001
    assert isinstance(link.gone, LinkClosed)


@pytest.mark.trio
async def test_closing_ends_in_time_when_the_peer_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CLOSE_S", 0.2)
    async with linked() as (_plane, link, far):
        await link.aclose(1001, "going away")
        assert link.stopped
        assert await far.next() == Close(1001, "going away")
        assert await far.hung_up()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x82\x05hello", 1002),  # not masked
        (b"\x82\xff\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00", 1009),  # announces a GiB
        (make_frame(BINARY, bytes(MAX_MESSAGE_BYTES + 1), masked=True) * 4, 1009),
    ],
)
async def test_who_breaks_a_rule_reads_why_and_is_hung_up_on(data: bytes, code: int) -> None:
    async with linked() as (_plane, link, far):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(far.stream.send_all, data)
            close = await far.next()
        assert isinstance(close, Close)
        assert close.code == code
        assert await far.hung_up()
        await far.stream.aclose()
        await link.aclose()
        assert link.close_code == code


@pytest.mark.trio
async def test_an_end_in_the_middle_of_a_send_is_told_later_and_once() -> None:
    async with linked() as (_plane, link, far):
        taken = Taken()
        link.set_handler(taken)
        far.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await far.stream.aclose()  # a reset
        while link.gone is None:
            link.send_nowait(b"x" * 1_000)
            assert taken.ends == 0, "not within the send"
            await trio.lowlevel.checkpoint()
        await until(lambda: taken.ends > 0)
        link.abort("again")
        await link.aclose()
        await until(lambda: taken.cuts > 0)
        assert (taken.ends, taken.cuts) == (1, 1)


@pytest.mark.trio
async def test_what_is_connected_when_the_plane_closes_is_cut_and_told() -> None:
    async with open_reactor() as reactor:
        ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in socket.socketpair())
        link, taken = reactor.register(ours, "peer", LinkLimits()), Taken()
        link.set_handler(taken)
    assert taken.ends == 1
    async with theirs:
        assert await FarEnd(theirs).hung_up()


@pytest.mark.trio
@pytest.mark.parametrize("tcp", [True, False])
async def test_the_last_words_of_a_peer_that_is_gone_are_heard_though_a_send_fails_first(tcp: bool) -> None:
    async with linked(tcp=tcp) as (_plane, link, far):
        taken = Taken()
        link.set_handler(taken)
        sock = socket.socket(fileno=far.stream.socket.detach())
        words = make_frame(BINARY, b"last words", masked=True)
        sock.sendall(words + make_frame(CLOSE, close_payload(4001, "bye"), masked=True))
        sock.close()
        for _ in range(3):  # before the plane has its turn; the kernel says no by the second at the latest
            link.send_nowait(b"too late")
        await until(lambda: taken.cuts > 0)
        assert taken.messages == [b"last words"]
        assert (link.close_code, link.reason) == (4001, "peer closed the connection (4001: bye)")


@pytest.mark.trio
async def test_what_a_peer_said_before_it_closed_is_given_to_who_takes_its_messages_later() -> None:
    async with linked() as (_plane, link, far):
        await far.send(b"one")
        await far.send(b"words", TEXT)
        await far.send(close_payload(1000, ""), CLOSE)
        await until(lambda: link.gone is not None)
        taken = Taken()
        link.set_handler(taken)
        assert (taken.messages, taken.texts) == ([b"one"], ["words"])
        await until(lambda: taken.ends > 0)
