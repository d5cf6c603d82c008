"""Peers that break off, never hang up, or announce the world: each costs the server little, others nothing."""

from pathlib import Path

import pytest
import trio

from tests.conformance.conftest import Echo
from tests.conformance.frames import Opcode, ServerFrames, binary, close, frame, ping, text
from tests.conformance.peer import PATIENCE_S, Peer, open_peer, open_websocket, request

MIB = 1 << 20

#: What was said before the peer hung up.
LAST_WORDS = {
    "nothing": b"",
    "half a head": frame(Opcode.BINARY, bytes(70_000))[:5],
    "half a small frame": text("Hello")[:-2],
    "half a large frame": frame(Opcode.BINARY, bytes(200_000))[:100_000],
    "half a message": text("Hel", fin=False),
    "a ping": ping(b"anybody?"),
    "a whole message": text("Hello"),
}


async def serves(echo: Echo) -> None:
    """See that it still does."""
    async with open_websocket(echo.port) as peer:
        heard = await peer.converse(text("still there?"), close_after=1)
    assert [message.payload for message in heard.messages] == [b"still there?"]


async def let_go(peer: Peer) -> None:
    """Wait until the server's program has closed its end."""
    with trio.fail_after(PATIENCE_S):
        await peer.server.let_go()


@pytest.mark.trio
@pytest.mark.parametrize("said", LAST_WORDS)
async def test_a_peer_that_ends_its_side_is_let_go_after(said: str, echo: Echo) -> None:
    async with open_websocket(echo.port) as peer:
        await peer.send(LAST_WORDS[said])
        await peer.stream.send_eof()
        await let_go(peer)
    await serves(echo)


@pytest.mark.trio
@pytest.mark.parametrize("said", LAST_WORDS)
async def test_a_peer_that_resets_is_let_go_after(said: str, echo: Echo) -> None:
    async with open_websocket(echo.port) as peer:
        await peer.send(LAST_WORDS[said])
        peer.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await serves(echo)


@pytest.mark.trio
@pytest.mark.parametrize("cut", [0, 1, 30, 100])
async def test_a_peer_that_hangs_up_in_its_handshake_is_let_go(cut: int, echo: Echo) -> None:
    async with open_peer(echo.port) as peer:
        await peer.send(request(echo.port)[:cut])
        await peer.stream.send_eof()
        await let_go(peer)
    await serves(echo)


@pytest.mark.trio
async def test_a_peer_that_never_hangs_up_is_let_go_after_its_fault_and_after_its_close(echo: Echo) -> None:
    """Section 7.1.1: it is the server that closes the connection, and it does not wait for ever for the other side."""
    async with open_websocket(echo.port) as broken, open_websocket(echo.port) as closed:
        await broken.send(frame(3))
        await closed.send(close())
        await let_go(closed)
        await let_go(broken)


@pytest.mark.trio
async def test_a_peer_that_reads_nothing_holds_up_nobody_else(echo: Echo) -> None:
    async with open_websocket(echo.port) as deaf, trio.open_nursery() as nursery:

        async def talk() -> None:
            await deaf.send(binary(bytes(MIB)) * 40)

        nursery.start_soon(talk)
        for _ in range(20):
            await serves(echo)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_peer_that_reads_late_gets_all_of_it(echo: Echo) -> None:
    async with open_websocket(echo.port) as late:
        frames, payloads = ServerFrames(), [bytes([number]) * MIB for number in range(24)]
        with trio.fail_after(PATIENCE_S):
            for payload in payloads:  # the kernel holds little of it: the rest waits in the server
                await late.send(binary(payload))
            await late.server.read_all()
            got: list[bytes] = []
            while len(got) < len(payloads):
                got += [one.payload for one in frames.feed(await late.receive())]
        assert got == payloads


def _peak_bytes(pid: int) -> int:
    """The most address space that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmPeak:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmPeak")


@pytest.mark.trio
async def test_nothing_is_allocated_for_what_is_only_announced_and_too_long(echo: Echo) -> None:
    assert echo.pid is not None, "this one needs an echo that it knows the memory of"
    before = _peak_bytes(echo.pid)
    for announced in (1 << 28, 1 << 30, 1 << 36, 1 << 46, 1 << 62):
        for head in (frame(Opcode.BINARY, announced=announced), text("a", fin=False) + frame(0, announced=announced)):
            async with open_websocket(echo.port) as peer:
                heard = await peer.converse(head)
            assert heard.code == 1009
    assert _peak_bytes(echo.pid) - before < 64 * MIB
