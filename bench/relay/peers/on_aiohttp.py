"""On aiohttp and uvloop."""

import asyncio

import uvloop
from aiohttp import WSMsgType, web

from bench.relay.frames import ROUTE
from bench.relay.peers import announce_listening, ping_interval_s

readers: dict[bytes, list[web.WebSocketResponse]] = {}
PING_S = ping_interval_s()


async def take_in(request: web.Request) -> web.WebSocketResponse:
    ws = web.WebSocketResponse(compress=False, heartbeat=PING_S)
    await ws.prepare(request)
    async for message in ws:
        if message.type is WSMsgType.BINARY:
            for reader in readers[message.data[ROUTE]]:
                await reader.send_bytes(message.data)
    return ws


async def give_out(request: web.Request) -> web.WebSocketResponse:
    ws = web.WebSocketResponse(compress=False, heartbeat=PING_S)
    await ws.prepare(request)
    readers.setdefault(request.match_info["id"].encode(), []).append(ws)
    async for _ in ws:
        pass
    return ws


async def main() -> None:
    app = web.Application()
    app.add_routes([web.get("/in", take_in), web.get("/out/{id}", give_out)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    announce_listening(runner.addresses[0][1])
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
