"""wss://: a link over TLS, and certificates that do not hold.

tls/ holds a self-signed certificate for localhost and its key, made for these tests and of use to nobody:
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 36500 -nodes -keyout key.pem -out cert.pem
-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1
locked.pem is that key with a password: openssl ec -aes128 -passout pass:secret -in key.pem -out locked.pem
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from protocol import ConnectError, open_relay
from tests.support.scripted_relay import serve, speak

HERE = Path(__file__).parents[2] / "support" / "tls"


@asynccontextmanager
async def tls_relay() -> AsyncIterator[int]:
    """Its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(HERE / "cert.pem", HERE / "key.pem")
    listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1", https_compatible=True)

    async def handler(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with trio.move_on_after(10):
            try:
                await stream.do_handshake()
            except trio.BrokenResourceError:
                return
            await serve(stream, speak)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, handler, listeners)
        inner = listeners[0].transport_listener
        assert isinstance(inner, trio.SocketListener)
        yield inner.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_relay_is_reached_over_tls() -> None:
    trusting = ssl.create_default_context(cafile=str(HERE / "cert.pem"))
    with trio.fail_after(20):
        async with (
            tls_relay() as port,
            open_relay(f"wss://localhost:{port}", token="right", ssl_context=trusting) as relay,
            relay.submit("tts", {"text": "hi"}) as stream,
        ):
            assert len(b"".join([pcm async for pcm in stream.audio()])) == 14_400


@pytest.mark.trio
async def test_a_certificate_nobody_vouches_for_is_refused_in_words() -> None:
    with trio.fail_after(20):
        async with tls_relay() as port:
            with pytest.raises(ConnectError, match=r"TLS failed: .*self.signed certificate"):
                async with open_relay(f"wss://localhost:{port}", token="right"):
                    pytest.fail("entered")


@pytest.mark.trio
async def test_tls_to_what_speaks_none_is_refused_in_words() -> None:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, lambda stream: serve(stream, speak), listeners)
            port = listeners[0].socket.getsockname()[1]
            with pytest.raises(ConnectError, match="TLS failed"):
                async with open_relay(f"wss://127.0.0.1:{port}", token="right"):
                    pytest.fail("entered")
            nursery.cancel_scope.cancel()
