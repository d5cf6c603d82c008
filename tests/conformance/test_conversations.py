"""The relay's WebSocket code as RFC 6455 wants a server: every case over a socket, against one echo process."""

import pytest

from tests.conformance import closing, framing, unicode
from tests.conformance.cases import Case
from tests.conformance.conftest import Echo
from tests.conformance.peer import open_websocket


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
    assert heard.in_order, "the connection was reset, which may eat a close frame that is underway"


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
