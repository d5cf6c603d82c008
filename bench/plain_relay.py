"""The peer: a relay of a few lines on trio-websocket, without logs, codec, accounting or resume.

A message that comes in on `/in` goes to the one connection on `/out/ID` whose ID stands at `ROUTE` in it. Awaiting
that send holds up the whole worker: it is the cheapest relay that this library allows, not a good one.
"""

import json

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from bench.frames import ROUTE

readers: dict[bytes, WebSocketConnection] = {}


async def serve_one(request: WebSocketRequest) -> None:
    ws = await request.accept()
    try:
        if request.path == "/in":
            while True:
                message = await ws.get_message()
                assert isinstance(message, bytes)
                await readers[message[ROUTE]].send_message(message)
        readers[request.path.removeprefix("/out/").encode()] = ws
        await ws.get_message()
    except ConnectionClosed:
        pass


async def main() -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            lambda *, task_status: serve_websocket(serve_one, "127.0.0.1", 0, None, task_status=task_status)
        )
        print(json.dumps({"event": "listening", "urls": [f"ws://127.0.0.1:{server.port}"]}), flush=True)


if __name__ == "__main__":
    trio.run(main)
