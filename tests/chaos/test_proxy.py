"""Each trouble of a line, between an echoing server and a client."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import attrs
import pytest
import trio

from tests.chaos.proxy import Line, open_line

WORDS = bytes(range(256)) * 8


@attrs.frozen
class Bench:
    """A line to a server that sends back what it gets; `ends` are the server's of the connections, `dialed` ours."""

    line: Line
    ends: list[trio.SocketStream]
    dialed: list[trio.SocketStream]
    ended: list[trio.SocketStream]

    async def dial(self) -> trio.SocketStream:
        stream = await trio.open_tcp_stream("127.0.0.1", self.line.port)
        self.dialed.append(stream)
        return stream


@asynccontextmanager
async def a_line() -> AsyncIterator[Bench]:
    ends: list[trio.SocketStream] = []
    ended: list[trio.SocketStream] = []

    async def echo(stream: trio.SocketStream) -> None:
        ends.append(stream)
        with suppress(trio.BrokenResourceError):
            async for data in stream:
                await stream.send_all(data)
            await stream.aclose()
        ended.append(stream)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo, [listener])
        async with open_line("test", listener.socket.getsockname(), random.Random(7)) as line:
            bench = Bench(line, ends, [], ended)
            with trio.fail_after(20):
                yield bench
        for stream in (*bench.dialed, *ends):
            stream.socket.close()
        nursery.cancel_scope.cancel()


async def receive(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        assert piece, f"only {len(data)} bytes came"
        data += piece
    return data


async def echoed(stream: trio.SocketStream, words: bytes = WORDS) -> bytes:
    await stream.send_all(words)
    return await receive(stream, len(words))


async def hears_nothing(stream: trio.SocketStream, for_s: float = 0.1) -> bool:
    with trio.move_on_after(for_s):
        await stream.receive_some()
        return False
    return True


@pytest.mark.trio
async def test_a_healthy_line_passes_everything_and_the_end() -> None:
    async with a_line() as bench:
        line = bench.line
        stream = await bench.dial()
        assert await echoed(stream) == WORDS
        await stream.send_eof()
        assert await stream.receive_some() == b""
        while line.connections:
            await trio.lowlevel.checkpoint()
    assert line.opened == 1


@pytest.mark.trio
async def test_rst_breaks_both_ends_and_fin_closes_them() -> None:
    async with a_line() as bench:
        line = bench.line
        stream = await bench.dial()
        await echoed(stream)
        assert line.cut("rst") == 1
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        stream = await bench.dial()
        await echoed(stream)
        assert line.cut("fin") == 1
        assert await stream.receive_some() == b""
        assert len(bench.ends) == 2
        assert line.cut("rst") == 0, "what was cut is not counted again"


@pytest.mark.trio
async def test_a_lost_connection_is_silent_for_ever_and_a_new_one_is_not() -> None:
    async with a_line() as bench:
        line = bench.line
        stream = await bench.dial()
        await echoed(stream)
        assert line.lose() == 1
        await stream.send_all(WORDS)
        await stream.send_eof()
        assert await hears_nothing(stream)
        line.heal()
        assert await hears_nothing(stream)
        assert await echoed(await bench.dial()) == WORDS
        await bench.ends[0].send_all(WORDS)
        assert bench.ended == [], "the other end has received no FIN"


@pytest.mark.trio
async def test_what_was_held_comes_whole_once_healed_also_on_a_new_connection() -> None:
    async with a_line() as bench:
        line = bench.line
        stream = await bench.dial()
        line.hold()
        await stream.send_all(WORDS)
        fresh = await bench.dial()
        await fresh.send_all(WORDS)
        assert await hears_nothing(stream)
        assert await hears_nothing(fresh)
        line.heal()
        assert await receive(stream, len(WORDS)) == WORDS
        assert await receive(fresh, len(WORDS)) == WORDS


@pytest.mark.trio
async def test_one_direction_can_be_held_alone() -> None:
    async with a_line() as bench:
        line = bench.line
        stream = await bench.dial()
        await echoed(stream)
        line.hold("up")
        await bench.ends[0].send_all(WORDS)
        assert await receive(stream, len(WORDS)) == WORDS
        await stream.send_all(WORDS)
        assert await hears_nothing(stream)


@pytest.mark.trio
async def test_stopped_in_a_frame_a_part_comes_and_the_rest_once_healed() -> None:
    async with a_line() as bench:
        line = bench.line
        stream = await bench.dial()
        await echoed(stream)
        line.stop_in_frame("down")
        await stream.send_all(WORDS)
        part = b""
        with trio.move_on_after(0.2):
            while True:
                part += await stream.receive_some()
        assert 0 < len(part) < len(WORDS)
        line.heal()
        assert part + await receive(stream, len(WORDS) - len(part)) == WORDS


@pytest.mark.trio
async def test_trickled_throttled_and_delayed_bytes_come_in_order() -> None:
    async with a_line() as bench:
        line = bench.line
        stream = await bench.dial()
        line.trickling = True
        assert await echoed(stream, WORDS[:100]) == WORDS[:100]
        line.heal()
        line.bytes_per_s = 16_384
        began = trio.current_time()
        assert await echoed(stream) == WORDS
        assert trio.current_time() - began > 0.7 * len(WORDS) / 16_384
        line.heal()
        line.delay_s = 0.1
        began = trio.current_time()
        assert await echoed(stream) == WORDS
        assert trio.current_time() - began > 0.2
        assert line.connections == 1


@pytest.mark.trio
async def test_an_unplugged_line_and_one_without_a_target_reset_who_comes() -> None:
    async with a_line() as bench:
        line = bench.line
        line.unplugged = True
        with pytest.raises(trio.BrokenResourceError):
            await (await bench.dial()).receive_some()
        assert bench.ends == []
        line.heal()
        line.target = ("127.0.0.1", 9)
        with pytest.raises(trio.BrokenResourceError):
            await (await bench.dial()).receive_some()
