"""What a hostile peer does to a relay: `python -m bench.attackers KIND PORT [TOKEN]`, until it is ended."""

import itertools
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from protocol.client.address import parse_address
from protocol.link.dial import log_in, open_link
from protocol.link.websocket_frames import BINARY, PING, make_frame
from protocol.wire.codec import encode
from protocol.wire.errors import ConnectError, LinkError
from protocol.wire.messages import PATH, SUBPROTOCOL, Attach, Hello, Ping, Register, Spaces, Status, Submit
from protocol.wire.validators import Message

#: Strangers at the same time.
STRANGERS = 2_000
#: Requests that wait while their positions are asked for.
QUEUED = 90
#: Messages sent before the answers are read.
BATCH = 32
_HEAD = f"GET {PATH} HTTP/1.1\r\nHost: relay\r\n"
_HANDSHAKE = (
    f"{_HEAD}Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
)
#: A TLS 1.2 ClientHello's first bytes; a relay without TLS sees what is no HTTP.
_CLIENT_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(100)
_SLOW_S = 1.0

# -- strangers


async def _stranger(port: int, first: bytes, slowly: bytes) -> None:
    """Connect, say `first`, then a byte a second of `slowly`, and come again when hung up on."""
    while True:
        with suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:
                if first:
                    await stream.send_all(first)

                async def trickle(stream: trio.SocketStream = stream) -> None:
                    with suppress(trio.BrokenResourceError):
                        for byte in slowly:
                            await trio.sleep(_SLOW_S)
                            await stream.send_all(bytes([byte]))

                if slowly:
                    nursery.start_soon(trickle)
                while await stream.receive_some():
                    pass
                nursery.cancel_scope.cancel()
        await trio.sleep(0.01)


def _strangers(first: bytes, slowly: bytes = b"") -> Callable[[int, str], Awaitable[None]]:
    async def attack(port: int, _token: str) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(STRANGERS):
                nursery.start_soon(_stranger, port, first, slowly)
                await trio.sleep(0.0005)

    return attack


async def _logins(port: int, token: str) -> None:
    """Logins again and again, with a token; without one, with tokens that do not exist."""

    async def log_in_again() -> None:
        for number in itertools.count():
            hello = Hello(version=1, role="client", token=token or f"rly_c_{number:043d}")
            with suppress(ConnectError, LinkError, OSError):
                async with open_link(parse_address(f"ws://127.0.0.1:{port}")) as link:
                    await log_in(link, hello)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(log_in_again)


# -- tenants


def _tenant(
    make: Callable[[int, str], Message], queued: int = 0, role: str = "client"
) -> Callable[[int, str], Awaitable[None]]:
    """Send messages as fast as the relay reads them; `make` gets the number of each, and the id of a queued request."""

    async def attack(port: int, token: str) -> None:
        hello = Hello(version=1, role=role, token=token)
        while True:
            with suppress(ConnectError, LinkError):
                async with open_link(parse_address(f"ws://127.0.0.1:{port}")) as link, trio.open_nursery() as nursery:
                    await log_in(link, hello)
                    ids = [f"{number:032x}" for number in range(1, queued + 1)]
                    for request_id in ids:
                        link.send(Submit(request_id=request_id, space="empty", params={}, detach=True))

                    async def read() -> None:
                        async for _ in link:
                            pass
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(read)
                    for number in itertools.count():
                        link.send(make(number, ids[number % len(ids)] if ids else ""))
                        if number % BATCH == 0:
                            await link.drained()
            await trio.sleep(0.1)

    return attack


async def _control_frames(port: int, token: str) -> None:
    """Pings of WebSocket itself, as many as the connection carries."""
    login = encode(Hello(version=1, role="client", token=token))
    pings = make_frame(PING, b"", masked=True) * 4_000
    while True:
        with suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:
                await stream.send_all(_HANDSHAKE.encode())
                await stream.receive_some()
                await stream.send_all(make_frame(BINARY, login, masked=True))

                async def read(stream: trio.SocketStream = stream) -> None:
                    while await stream.receive_some():
                        pass
                    nursery.cancel_scope.cancel()

                nursery.start_soon(read)
                while True:
                    await stream.send_all(pings)


def _register(_number: int, _id: str) -> Message:
    return Register(worker="hostile", instance="0" * 32, spaces=["empty"], slots=1, engine="x", params={})


#: Name -> what it does.
ATTACKS: dict[str, Callable[[int, str], Awaitable[None]]] = {
    "silent connections": _strangers(b""),
    "slow heads": _strangers(b"GET / HT", b"TP/1.1\r\nHost: relay-of-somebody\r\n"),
    "handshakes without a hello": _strangers(_HANDSHAKE.encode()),
    "TLS hellos": _strangers(_CLIENT_HELLO),
    "kept-alive connections": _strangers(b"GET /health HTTP/1.1\r\nHost: relay\r\n\r\n"),
    "status": _tenant(lambda _n, name: Status(request_id=name), QUEUED),
    "attach": _tenant(lambda _n, name: Attach(request_id=name), QUEUED),
    "spaces": _tenant(lambda _n, _name: Spaces()),
    "refused submits": _tenant(lambda n, _name: Submit(request_id=f"{n + 1:032x}", space="bench", params={"no": n})),
    "submits": _tenant(lambda n, _name: Submit(request_id=f"{n + 1:032x}", space="empty", params={}, detach=True)),
    "pings": _tenant(lambda n, _name: Ping(timestamp=float(n))),
    "control frames": _control_frames,
    "logins": _logins,
    "registrations": _tenant(_register, role="worker"),
    # The last: it has the address, which is everybody's here, wait before each login for some minutes.
    "bad logins": lambda port, _token: _logins(port, ""),
}


def main() -> None:
    """Attack."""
    kind, port, token = sys.argv[1], int(sys.argv[2]), (sys.argv[3] if len(sys.argv) > 3 else "")
    trio.run(ATTACKS[kind], port, token)


if __name__ == "__main__":
    main()
