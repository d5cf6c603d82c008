"""What the relay weighs at rest, and what a connection adds that is logged in and idle."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing

from bench.figures import Row, alternate, paired
from bench.load import log_in
from bench.rawsocket import RawSocket
from bench.servers import Server, open_plain, open_relayd

#: The first connections also pay for what the process needs once; the slope behind them is a connection's own.
WARM_UP, CONNECTIONS = 50, 300
ROUNDS = 3


def measure() -> list[Row]:
    """Each round starts both relays anew: memory that was grown once does not shrink."""
    ours, plain = alternate(
        ROUNDS,
        lambda: _one(open_relayd, lambda server, _number: log_in(server, "client")),
        lambda: _one(open_plain, lambda server, number: RawSocket(server.port, f"/out/{number:032x}")),
    )
    peer = "plain trio-websocket"
    names = (("RSS at rest", "MiB"), ("RSS an idle connection", "KiB"), ("CPU to take a connection in", "ms"))
    return [
        paired("memory", name, unit, [r[i] for r in ours], [r[i] for r in plain], peer)
        for i, (name, unit) in enumerate(names)
    ]


def _one(
    open_server: Callable[[], AbstractContextManager[Server]], connect: Callable[[Server, int], RawSocket]
) -> tuple[float, float, float]:
    """MiB at rest, KiB a connection, and ms of CPU for each handshake and login."""
    with ExitStack() as stack:
        server = stack.enter_context(open_server())
        rest_kib = server.rss_kib()

        def more(begin: int, end: int) -> None:
            for number in range(begin, end):
                stack.enter_context(closing(connect(server, number)))

        more(0, WARM_UP)
        before_kib, before_s = server.rss_kib(), server.cpu_s()
        more(WARM_UP, WARM_UP + CONNECTIONS)
        grown_kib, took_s = server.rss_kib() - before_kib, server.cpu_s() - before_s
        return rest_kib / 1024, grown_kib / CONNECTIONS, 1000 * took_s / CONNECTIONS
