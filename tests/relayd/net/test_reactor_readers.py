"""Links that a task of their own reads, and messages that are passed on one by one."""

from functools import partial

import pytest
import structlog.testing
import trio
import trio.testing

from protocol.link.websocket_frames import (
    BINARY,
    CLOSE,
    PING,
    Close,
    Event,
    Ping,
    close_payload,
    make_frame,
)
from protocol.wire.frames import MAX_MESSAGE_BYTES
from tests.relayd.net.far_end import Taken, linked
from tests.support.relay import until


@pytest.mark.trio
async def test_a_trusted_link_is_read_by_a_task_of_its_own_to_its_end() -> None:
    async with linked() as (reactor, link, far), trio.open_nursery() as nursery:
        taken = Taken()
        link.use_bulk_mode()
        link.set_handler(taken)
        nursery.start_soon(reactor.serve_worker_link, link, lambda _data: False, link.close_soon)
        link.max_messages_per_turn = 10
        every = [number.to_bytes(2, "big") * 3_000 for number in range(500)]
        for each in every:
            await far.send(each)
            link.send_nowait(each)
        for each in every:
            assert await far.next() == each
        await until(lambda: len(taken.messages) == len(every))
        assert taken.messages == every
        await far.send(close_payload(1000, "done"), CLOSE)
        assert await far.next() == Close(1000, "")
        await far.stream.aclose()
        await until(lambda: taken.cuts > 0)
        # The nursery ends: so has its task.


@pytest.mark.trio
async def test_a_link_that_is_attended_no_more_is_read_on_by_the_plane() -> None:
    async with linked() as (reactor, link, far):
        taken = Taken()
        link.use_bulk_mode()
        link.set_handler(taken)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reactor.serve_worker_link, link, lambda _data: False, link.close_soon)
            await far.send(b"1")
            await until(lambda: taken.messages == [b"1"])
            nursery.cancel_scope.cancel()
        await far.send(b"2")
        await until(lambda: taken.messages == [b"1", b"2"])
        link.close_soon(1001, "bye")
        assert await far.next() == Close(1001, "bye")
        await far.send(close_payload(1001, ""), CLOSE)
        with trio.fail_after(1):  # and not after `CLOSE_S`: its answer was read
            assert await far.hung_up()


@pytest.mark.trio
async def test_what_comes_alone_is_passed_on_and_all_else_is_handed_over_in_order() -> None:
    async with linked() as (reactor, link, far), trio.open_nursery() as nursery:
        taken = Taken()
        passed: list[bytes] = []

        def pass_on(data: bytes) -> bool:
            if data.startswith(b"no"):
                return False
            taken.messages.append(data)
            passed.append(data)
            return True

        link.use_bulk_mode()
        link.set_handler(taken)
        nursery.start_soon(reactor.serve_worker_link, link, pass_on, link.close_soon)
        alone, refused, short = b"yes" * 100, b"no!" * 100, b"short"
        sent = [[alone], [refused], [short], [alone, alone], [alone]]
        for number, messages in enumerate(sent):
            await far.stream.send_all(b"".join(make_frame(BINARY, each, masked=True) for each in messages))
            so_far = sum(map(len, sent[: number + 1]))
            await until(partial(taken.has, so_far))
        assert taken.messages == [message for messages in sent for message in messages]
        assert passed == [alone, alone], "of the five, two came alone and were wanted"
        await far.send(b"", CLOSE)
        await far.next()
        await far.stream.aclose()


@pytest.mark.trio
async def test_a_fault_of_who_passes_on_is_told_and_ends_that_link_alone() -> None:
    def fall(_data: bytes) -> bool:
        raise RuntimeError("a mistake")

    def tell() -> None:
        link.close_soon(1011, "a mistake")

    async with linked() as (reactor, link, far), trio.open_nursery() as nursery:
        link.use_bulk_mode()
        link.set_handler(Taken())
        with structlog.testing.capture_logs() as logs:
            nursery.start_soon(reactor.serve_worker_link, link, fall, tell)
            await far.send(b"x" * 200)
            assert await far.next() == Close(1011, "a mistake")
            await far.send(close_payload(1011, ""), CLOSE)
            assert await far.hung_up()
        assert [each["event"] for each in logs] == ["internal error in connection"]


@pytest.mark.trio
@pytest.mark.parametrize("size", [130, 7_680, 300_000])
async def test_one_by_one_a_full_kernel_loses_nothing_of_frames_and_pings(size: int) -> None:
    async with linked(max_backlog_bytes=64 * MAX_MESSAGE_BYTES) as (_plane, link, far):
        sent: list[Event] = []
        while link.backlog_bytes < 1_000_000:
            number = len(sent).to_bytes(4, "big")
            link.send_frames([number * (size // 4)])
            link._put_control(PING, number)
            sent += [number * (size // 4), Ping(number)]
        for each in sent:
            assert await far.next() == each
        assert link.backlog_bytes == 0


@pytest.mark.trio
async def test_messages_that_are_kept_go_to_who_takes_them_next() -> None:
    async with linked() as (_plane, link, far):
        first, second = Taken(), Taken()
        link.set_handler(first)
        await far.send(b"1")
        await until(lambda: first.messages == [b"1"])
        link.buffer_again([b"1"])
        await far.send(b"2")
        assert await link.receive() == b"1"
        await far.send(b"3")
        assert await link.receive() == b"2"
        await far.send(b"4")
        await until(lambda: len(link._inbox or ()) == 2)
        link.set_handler(second)
        assert second.messages == [b"3", b"4"]
        assert first.messages == [b"1"]


@pytest.mark.trio
@pytest.mark.parametrize("ours", [True, False])
async def test_a_trusted_link_that_is_cut_ends_its_task(ours: bool) -> None:
    async with linked() as (reactor, link, far), trio.open_nursery() as nursery:
        link.use_bulk_mode()
        link.set_handler(Taken())
        nursery.start_soon(reactor.serve_worker_link, link, lambda _data: False, link.close_soon)
        await trio.testing.wait_all_tasks_blocked()
        if ours:
            link.abort("enough")
        else:
            await far.stream.aclose()
