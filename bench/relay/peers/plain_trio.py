"""On trio-websocket: awaiting a send holds up the whole worker."""

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from bench.relay.frames import ROUTE
from bench.relay.peers import announce_listening, ping_interval_s

readers: dict[bytes, list[WebSocketConnection]] = {}


async def serve_one(request: WebSocketRequest) -> None:
    ws = await request.accept()
    try:
        if request.path == "/in":
            while True:
                message = await ws.get_message()
                assert isinstance(message, bytes)
                for reader in readers[message[ROUTE]]:
                    await reader.send_message(message)
        readers.setdefault(request.path.removeprefix("/out/").encode(), []).append(ws)
        if ping_s := ping_interval_s():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ping, ws, ping_s)
                await ws.get_message()
        await ws.get_message()
    except* ConnectionClosed:
        pass


async def ping(ws: WebSocketConnection, interval_s: float) -> None:
    while True:
        await trio.sleep(interval_s)
        await ws.ping()


async def main() -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            lambda *, task_status: serve_websocket(serve_one, "127.0.0.1", 0, None, task_status=task_status)
        )
        announce_listening(server.port)


if __name__ == "__main__":
    trio.run(main)
