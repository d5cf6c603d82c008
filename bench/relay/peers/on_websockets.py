"""On websockets and uvloop."""

import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from bench.relay.frames import ROUTE
from bench.relay.peers import announce_listening, ping_interval_s

readers: dict[bytes, list[ServerConnection]] = {}


async def serve_one(ws: ServerConnection) -> None:
    assert ws.request is not None
    try:
        if ws.request.path == "/in":
            async for message in ws:
                assert isinstance(message, bytes)
                for reader in readers[message[ROUTE]]:
                    await reader.send(message)
        else:
            readers.setdefault(ws.request.path.removeprefix("/out/").encode(), []).append(ws)
            await ws.wait_closed()
    except ConnectionClosed:
        pass


async def main() -> None:
    async with serve(serve_one, "127.0.0.1", 0, compression=None, ping_interval=ping_interval_s()) as server:
        announce_listening(server.sockets[0].getsockname()[1])
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
