"""On picows and uvloop."""

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

from bench.relay.frames import ROUTE
from bench.relay.peers import announce_listening, ping_interval_s

readers: dict[bytes, list[WSTransport]] = {}


class Sender(WSListener):
    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.BINARY:
            message = frame.get_payload_as_bytes()
            for reader in readers[message[ROUTE]]:
                reader.send(WSMsgType.BINARY, message)


class Reader(WSListener):
    def __init__(self, name: bytes) -> None:
        super().__init__()
        self.name = name

    def on_ws_connected(self, transport: WSTransport) -> None:
        readers.setdefault(self.name, []).append(transport)


def listener(request: WSUpgradeRequest) -> WSListener:
    path = bytes(request.path)
    return Sender() if path == b"/in" else Reader(path.removeprefix(b"/out/"))


async def main() -> None:
    ping_s = ping_interval_s()
    idle_s = ping_s or 3600
    server = await ws_create_server(
        listener,
        "127.0.0.1",
        0,
        enable_auto_ping=bool(ping_s),
        auto_ping_idle_timeout=idle_s,
        auto_ping_reply_timeout=idle_s,
    )
    announce_listening(server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
