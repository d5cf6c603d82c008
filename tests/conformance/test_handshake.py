"""The opening handshake (RFC 6455, section 4.2): what is let in, and that whoever is refused is told why and let go."""

from collections.abc import Mapping
from contextlib import suppress

import attrs
import pytest
import trio

from tests.conformance.conftest import Echo
from tests.conformance.frames import close, text
from tests.conformance.peer import EXAMPLE_KEY, PATIENCE_S, Peer, accept_for, open_peer, request

#: Of a request's head (docs/design.md §10).
MAX_HEAD_BYTES = 16 * 1024


@attrs.frozen
class Answer:
    """The head of a server's HTTP answer."""

    status: int
    headers: Mapping[str, str]


async def answer(peer: Peer) -> Answer:
    """Read and parse it."""
    head = (await peer.head()).decode("latin-1")
    first, *lines = head.split("\r\n")
    version, status, *_ = first.split(" ")
    assert version == "HTTP/1.1", first
    parted = [line.partition(":") for line in lines]
    return Answer(int(status), {name.lower(): value.strip() for name, _, value in parted})


async def ask(echo: Echo, head: bytes, chop: int = 0) -> Answer:
    """The answer to a request, once the server has also done what it must afterwards: serve, or hang up."""
    async with open_peer(echo.port) as peer:
        with trio.fail_after(PATIENCE_S):
            await peer.send(head, chop)
            got = await answer(peer)
            if got.status == 101:
                heard = await peer.converse(text("Hello"), close_after=1)
                assert [message.payload for message in heard.messages] == [b"Hello"]
                return got
            left = int(got.headers["content-length"])
            while body := await peer.receive():
                left -= len(body)
            assert left == 0, "its body was not as long as it said"
            with suppress(OSError):
                await peer.stream.send_eof()
            await peer.server.let_go()
    return got


@pytest.mark.trio
async def test_the_answer_is_that_of_rfc_6455_for_its_own_example(echo: Echo) -> None:
    got = await ask(echo, request(echo.port))
    assert got.status == 101
    assert got.headers["upgrade"].lower() == "websocket"
    assert got.headers["connection"].lower() == "upgrade"
    assert got.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert "sec-websocket-extensions" not in got.headers
    assert "sec-websocket-protocol" not in got.headers


@pytest.mark.trio
async def test_every_key_gets_its_own_answer(echo: Echo) -> None:
    for key in ("AAAAAAAAAAAAAAAAAAAAAA==", "/////////////////////w==", "AQIDBAUGBwgJCgsMDQ4PEA=="):
        got = await ask(echo, request(echo.port, {"sec-websocket-key": key}))
        assert got.headers["sec-websocket-accept"] == accept_for(key)


GOOD: dict[str, dict[str, str | None]] = {
    "Upgrade in other letters": {"upgrade": "WebSocket"},
    "Connection with keep-alive": {"connection": "keep-alive, Upgrade"},
    "Connection in other letters": {"connection": "uPGRADE"},
    "several protocols to upgrade to": {"upgrade": "h2c, websocket"},
    "compression offered": {"sec-websocket-extensions": "permessage-deflate; client_max_window_bits"},
    "an extension that nobody knows": {"sec-websocket-extensions": "x-unheard-of"},
    "a long cookie": {"cookie": "a" * 8000},
    "octets beyond ASCII in a header": {"user-agent": "caf\xe9"},
}


@pytest.mark.trio
@pytest.mark.parametrize("name", GOOD)
async def test_a_handshake_is_let_in_with(name: str, echo: Echo) -> None:
    got = await ask(echo, request(echo.port, GOOD[name]))
    assert got.status == 101
    assert "sec-websocket-extensions" not in got.headers


@pytest.mark.trio
async def test_header_names_count_in_any_letters(echo: Echo) -> None:
    head = request(echo.port)
    for name in (b"host", b"upgrade", b"connection", b"sec-websocket-key", b"sec-websocket-version"):
        head = head.replace(b"\r\n" + name + b":", b"\r\n" + name.upper() + b":")
    assert (await ask(echo, head)).status == 101


@pytest.mark.trio
async def test_a_head_may_come_octet_by_octet(echo: Echo) -> None:
    assert (await ask(echo, request(echo.port), chop=1)).status == 101


@pytest.mark.trio
async def test_frames_right_behind_the_head_are_served(echo: Echo) -> None:
    behind = text("early", fin=True)
    for cut in (len(behind), 1, 7):
        async with open_peer(echo.port) as peer:
            with trio.fail_after(PATIENCE_S):
                await peer.send(request(echo.port) + behind[:cut])
                assert (await answer(peer)).status == 101
                heard = await peer.converse(behind[cut:], close_after=1)
        assert [message.payload for message in heard.messages] == [b"early"]
        assert heard.code == 1000


@pytest.mark.trio
async def test_a_close_right_behind_the_head_is_answered(echo: Echo) -> None:
    async with open_peer(echo.port) as peer:
        with trio.fail_after(PATIENCE_S):
            await peer.send(request(echo.port) + close(1001))
            assert (await answer(peer)).status == 101
            heard = await peer.converse(b"", polite=False)
    assert heard.code == 1001


#: What is wrong -> the headers that make it so, and the statuses that say so.
BAD: dict[str, tuple[dict[str, str | None], set[int]]] = {
    "no Upgrade": ({"upgrade": None}, {400, 426}),
    "an Upgrade to something else": ({"upgrade": "h2c"}, {400, 426}),
    "an Upgrade to something like it": ({"upgrade": "websocket2"}, {400, 426}),
    "no Connection": ({"connection": None}, {400, 426}),
    "a Connection that upgrades nothing": ({"connection": "keep-alive"}, {400, 426}),
    "no version": ({"sec-websocket-version": None}, {400, 426}),
    "an empty version": ({"sec-websocket-version": ""}, {400, 426}),
    "version 0": ({"sec-websocket-version": "0"}, {426}),
    "version 8": ({"sec-websocket-version": "8"}, {426}),
    "version 14": ({"sec-websocket-version": "14"}, {426}),
    "version 130": ({"sec-websocket-version": "130"}, {426}),
    "no key": ({"sec-websocket-key": None}, {400}),
    "an empty key": ({"sec-websocket-key": ""}, {400}),
    "a key that is no base64": ({"sec-websocket-key": "not base64 at all !!!!!"}, {400}),
    "a key of 15 octets": ({"sec-websocket-key": "AAAAAAAAAAAAAAAAAAAA"}, {400}),
    "a key of 17 octets": ({"sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAAA="}, {400}),
    "a key without its padding": ({"sec-websocket-key": EXAMPLE_KEY.rstrip("=")}, {400}),
    "no Host": ({"host": None}, {400}),
}


@pytest.mark.trio
@pytest.mark.parametrize("name", BAD)
async def test_a_handshake_is_refused_and_let_go_with(name: str, echo: Echo) -> None:
    headers, statuses = BAD[name]
    got = await ask(echo, request(echo.port, headers))
    assert got.status in statuses
    if got.status == 426:  # section 4.4: what would do instead
        assert got.headers["sec-websocket-version"] == "13"
        assert got.headers["upgrade"].lower() == "websocket"


@pytest.mark.trio
async def test_whoever_is_refused_and_does_not_hang_up_is_let_go_all_the_same(echo: Echo) -> None:
    async with open_peer(echo.port) as peer:
        with trio.fail_after(PATIENCE_S):
            await peer.send(request(echo.port, {"sec-websocket-version": "8"}))
            assert (await answer(peer)).status == 426
            await peer.server.let_go()


@pytest.mark.trio
async def test_two_keys_are_refused(echo: Echo) -> None:
    line = f"sec-websocket-key: {EXAMPLE_KEY}\r\n".encode()
    assert (await ask(echo, request(echo.port).replace(line, line * 2))).status == 400


@pytest.mark.trio
@pytest.mark.parametrize("method", ["POST", "PUT", "HEAD", "OPTIONS", "get", "CONNECT"])
async def test_only_get_upgrades(method: str, echo: Echo) -> None:
    async with open_peer(echo.port) as peer:
        with trio.fail_after(PATIENCE_S):
            await peer.send(request(echo.port, method=method))
            assert (await answer(peer)).status in (400, 405, 501)
            while await peer.receive():
                pass


@pytest.mark.trio
@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/3", "HTTP/1.10"])
async def test_only_http_1_1_upgrades(version: str, echo: Echo) -> None:
    assert (await ask(echo, request(echo.port, version=version))).status in (400, 426, 505)


NO_HEADS = {
    "a request line of one word": b"GET\r\n\r\n",
    "a request line of two words": b"GET /\r\nHost: here\r\n\r\n",
    "a request line of four words": b"GET / / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a version of something else": b"GET / SIP/2.0\r\nHost: here\r\n\r\n",
    "a header without a colon": b"GET / HTTP/1.1\r\nHost here\r\n\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\n: here\r\n\r\n",
    "a header whose name has a space": b"GET / HTTP/1.1\r\nHost : here\r\n\r\n",
    "a header that is folded": b"GET / HTTP/1.1\r\nHost: here\r\n  and there\r\n\r\n",
}


@pytest.mark.trio
@pytest.mark.parametrize("name", NO_HEADS)
async def test_what_is_no_request_is_refused_and_let_go(name: str, echo: Echo) -> None:
    assert (await ask(echo, NO_HEADS[name])).status == 400


NO_HTTP = {
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "zeros": bytes(64),
    "a WebSocket frame": text("no head at all"),
}


@pytest.mark.trio
@pytest.mark.parametrize("name", NO_HTTP)
async def test_what_is_no_http_is_hung_up_on_at_once(name: str, echo: Echo) -> None:
    """There is no head to wait for, and nobody who would read an answer; one is allowed."""
    async with open_peer(echo.port) as peer:
        with trio.fail_after(PATIENCE_S):
            await peer.send(NO_HTTP[name])
            assert (await peer.head())[:13] in (b"", b"HTTP/1.1 400 ")
            await peer.server.let_go()


@pytest.mark.trio
async def test_lines_that_end_in_a_bare_lf_are_answered(echo: Echo) -> None:
    """RFC 9112, section 2.2: they may be taken for ended. Either way nobody waits for more."""
    assert (await ask(echo, request(echo.port).replace(b"\r\n", b"\n"))).status in (101, 400)


@pytest.mark.trio
@pytest.mark.parametrize("chop", [0, 1024])
async def test_a_huge_head_is_refused_before_it_ends(chop: int, echo: Echo) -> None:
    head = request(echo.port).removesuffix(b"\r\n") + b"x-more: " + b"*" * (2 * MAX_HEAD_BYTES)
    async with open_peer(echo.port) as peer:
        with trio.fail_after(PATIENCE_S):
            await peer.send(head, chop)
            assert (await answer(peer)).status in (400, 431)
            while await peer.receive():
                pass


@pytest.mark.trio
async def test_a_huge_head_that_ends_is_refused(echo: Echo) -> None:
    head = request(echo.port, {"x-more": "*" * 2 * MAX_HEAD_BYTES})
    assert (await ask(echo, head)).status in (400, 431)


@pytest.mark.trio
async def test_a_slow_head_is_cut_off_and_does_not_buy_time_by_dribbling(echo: Echo) -> None:
    async with open_peer(echo.port) as silent, open_peer(echo.port) as dribbling:
        await silent.send(b"GET / HT")
        with trio.fail_after(2 * PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(silent.server.let_go)
                for octet in request(echo.port, {"x-more": "*" * 8000}):
                    if dribbling.server.is_let_go:
                        break
                    with suppress(trio.BrokenResourceError):
                        await dribbling.send(bytes([octet]))
                    await trio.sleep(0.05)
                await dribbling.server.let_go()
