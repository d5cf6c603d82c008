"""On python-socketio, served by uvicorn on uvloop: a client joins the room of its id, where frames are events."""

import socket

import socketio
import uvicorn
import uvloop

from bench.relay.peers import announce_listening, ping_interval_s

sio = socketio.AsyncServer(
    async_mode="asgi", ping_interval=ping_interval_s() or 25, ping_timeout=60, max_http_buffer_size=10_000_000
)


async def join(sid: str, name: str) -> str:
    await sio.enter_room(sid, name)
    return name


async def frame(sid: str, name: str, data: bytes) -> None:
    await sio.emit("frame", data, room=name)


async def main() -> None:
    sio.on("join", join)
    sio.on("frame", frame)
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    announce_listening(listening.getsockname()[1])
    config = uvicorn.Config(
        socketio.ASGIApp(sio), loop="uvloop", log_level="warning", ws_per_message_deflate=False, ws_ping_interval=None
    )
    await uvicorn.Server(config).serve(sockets=[listening])


if __name__ == "__main__":
    uvloop.run(main())
