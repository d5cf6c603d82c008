"""The relay's WebSocket code as RFC 6455 wants a server: every case over a socket, against one echo process."""

import pytest
import trio

from tests.conformance import closing, framing, limits, unicode
from tests.conformance.cases import Case
from tests.conformance.conftest import Echo
from tests.conformance.frames import Opcode, ServerFrame, ServerFrames, binary
from tests.conformance.peer import PATIENCE_S, open_websocket


async def hold(case: Case, echo: Echo) -> None:
    """Hold the echo to a case."""
    async with open_websocket(echo.port) as peer:
        answers = None if case.breaks or case.closes else len(case.messages) + len(case.pongs)
        heard = await peer.converse(case.sent, case.chop, close_after=answers, polite=case.breaks)
    if case.all_messages:
        assert heard.messages == list(case.messages)
    else:
        assert heard.messages in ([], list(case.messages))
    assert heard.pongs == list(case.pongs)
    assert heard.closed, "no close frame came"
    assert heard.code == case.code, heard.reason
    assert heard.stray == 0, "something came behind the close frame"
    assert not heard.reset, "the connection was reset, which may eat a close frame that is underway"


@pytest.mark.trio
@pytest.mark.parametrize("case", framing.CASES, ids=lambda case: case.promise)
async def test_frames(case: Case, echo: Echo) -> None:
    await hold(case, echo)


@pytest.mark.trio
@pytest.mark.parametrize("case", unicode.CASES, ids=lambda case: case.promise)
async def test_text(case: Case, echo: Echo) -> None:
    await hold(case, echo)


@pytest.mark.trio
@pytest.mark.parametrize("case", closing.CASES, ids=lambda case: case.promise)
async def test_closing(case: Case, echo: Echo) -> None:
    await hold(case, echo)


@pytest.mark.trio
@pytest.mark.parametrize("promise", limits.CASES)
async def test_limits(promise: str, echo: Echo) -> None:
    await hold(limits.CASES[promise](), echo)


@pytest.mark.trio
@pytest.mark.parametrize("size", [0, 16, 4096])
async def test_a_thousand_messages_come_back_one_after_another(size: int, echo: Echo) -> None:
    """Autobahn 9.7 and 9.8: each is sent once the one before it has come back."""
    async with open_websocket(echo.port) as peer:
        frames = ServerFrames()
        with trio.fail_after(PATIENCE_S):
            for number in range(1000):
                payload = (b"%04d" % number * (size // 4 + 1))[:size]
                await peer.send(binary(payload))
                heard: list[ServerFrame] = []
                while not heard:
                    heard = frames.feed(await peer.receive())
                assert heard == [ServerFrame(Opcode.BINARY, True, payload)]
