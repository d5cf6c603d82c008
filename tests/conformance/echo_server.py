"""An echo through the relay's own WebSocket code, for conformance tools.

Started as `python -m tests.conformance.echo_server --listen HOST:PORT`.
"""

import argparse
import sys
from functools import partial

import attrs
import trio

from protocol.link.limits import LinkRules
from protocol.link.websocket_frames import TEXT
from protocol.wire.errors import LinkError
from relayd.connections.gateway import hang_up
from relayd.net.http_head import MAX_HEAD_BYTES, ends, is_to_be_answered, read_head, split_head
from relayd.net.reactor import Plane, SocketLink, open_plane
from relayd.net.websocket_handshake import Refusal, answer_to, check_upgrade, parse_head

#: The Autobahn test suite's largest cases have this.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
RULES = LinkRules(max_message_bytes=MAX_MESSAGE_BYTES, max_backlog_bytes=16 * MAX_MESSAGE_BYTES)


@attrs.frozen
class Echo:
    """Sends back whatever comes."""

    link: SocketLink

    def take(self, messages: list[bytes]) -> None:
        """See `protocol.link.limits.Taker`."""
        try:
            self.link.send_frames(messages)
        except LinkError:
            return

    def take_text(self, text: str) -> None:
        """See `protocol.link.limits.Taker`."""
        self.link.send_frame(TEXT, text.encode())

    def hear_end(self) -> None:
        """See `protocol.link.limits.Taker`."""

    def hear_cut(self) -> None:
        """See `protocol.link.limits.Taker`."""


async def welcome(plane: Plane, stream: trio.SocketStream) -> None:
    """Shake hands, and have the plane echo from then on."""
    async with stream:
        data = await read_head(stream)
        if not is_to_be_answered(data):
            return
        try:
            if not ends(data):
                raise Refusal(431, f"the head of a request may have {MAX_HEAD_BYTES} bytes")
            text, early = split_head(data)
            head = parse_head(text)
            check_upgrade(head, None)
        except Refusal as refusal:
            await hang_up(stream, refusal)
            return
        link = plane.adopt(stream, "peer", RULES, answer_to(head, None))
        link.hand_to(Echo(link))
        if early:
            link.hear_early(early)


async def serve(host: str, port: int) -> None:
    """Echo until cancelled; says where it listens once it does."""
    listeners = await trio.open_tcp_listeners(port, host=host)
    async with open_plane() as plane:
        print(f"listening ws://{host}:{listeners[0].socket.getsockname()[1]}", flush=True)
        await trio.serve_listeners(partial(welcome, plane), listeners)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.echo_server", description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:9001", metavar="HOST:PORT")
    host, _, port = parser.parse_args().listen.rpartition(":")
    if not host or not port.isdigit():
        parser.error("--listen wants HOST:PORT")
    try:
        trio.run(serve, host, int(port))
    except KeyboardInterrupt:
        return 130
    except OSError as fault:
        print(f"cannot listen on {host}:{port}: {fault.strerror or fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
