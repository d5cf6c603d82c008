"""An echo through the relay's own WebSocket code, for conformance tools.

Started as `python -m tests.conformance.echo_server --listen HOST:PORT`.
"""

import argparse
import sys
from functools import partial

import attrs
import trio

from protocol.link.limits import LinkLimits
from protocol.link.websocket_frames import TEXT
from protocol.wire.errors import LinkError
from relayd.net.hang_up import answer_and_hang_up
from relayd.net.http_head import MAX_HEAD_BYTES, is_complete, needs_answer, read_head, split_head
from relayd.net.reactor import Reactor, open_reactor
from relayd.net.socket_link import SocketLink
from relayd.net.websocket_handshake import HandshakeRejected, build_response, check_upgrade, parse_head

#: The Autobahn test suite's largest cases have this.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
RULES = LinkLimits(max_message_bytes=MAX_MESSAGE_BYTES, max_backlog_bytes=16 * MAX_MESSAGE_BYTES)


@attrs.frozen
class Echo:
    """Sends back whatever comes."""

    link: SocketLink

    def on_messages(self, messages: list[bytes]) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        try:
            self.link.send_frames(messages)
        except LinkError:
            return

    def on_text(self, text: str) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        self.link.send_frame(TEXT, text.encode())

    def on_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""

    def on_transport_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""


async def welcome(reactor: Reactor, stream: trio.SocketStream) -> None:
    """Shake hands, and have the plane echo from then on."""
    async with stream:
        data = await read_head(stream)
        if not needs_answer(data):
            return
        try:
            if not is_complete(data):
                raise HandshakeRejected(431, f"the head of a request may have {MAX_HEAD_BYTES} bytes")
            text, early = split_head(data)
            head = parse_head(text)
            check_upgrade(head, None)
        except HandshakeRejected as refusal:
            await answer_and_hang_up(stream, refusal.to_bytes())
            return
        link = reactor.register(stream, "peer", RULES, build_response(head, None))
        link.set_handler(Echo(link))
        if early:
            link.feed_early(early)


async def serve(host: str, port: int) -> None:
    """Echo until cancelled; says where it listens once it does."""
    listeners = await trio.open_tcp_listeners(port, host=host)
    async with open_reactor() as reactor:
        print(f"listening ws://{host}:{listeners[0].socket.getsockname()[1]}", flush=True)
        await trio.serve_listeners(partial(welcome, reactor), listeners)


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
