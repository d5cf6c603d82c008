"""The gateway: an event loop in a thread of its own, on which all peers of the worker live."""

import asyncio
import concurrent.futures
import contextlib
import errno
import random
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import aioice.ice

from gpuworker.engines.base import EngineError
from gpuworker.engines.webrtc.peer import SOCKETS, Peer, Settings

T = TypeVar("T")

#: Gathering candidates from a STUN or TURN server that is away takes 5 s.
ANSWER_S = 20.0
HANG_S = 2.0
CLOSE_S = 5.0


class PortLoop(asyncio.SelectorEventLoop):
    """An event loop that takes UDP ports from a range where any would do: aiortc knows no range of ports.

    Args:
        ports: the range.
    """

    def __init__(self, ports: range) -> None:
        super().__init__()
        self._ports = ports

    async def create_datagram_endpoint(  # type: ignore[override]
        self, protocol_factory: Callable[[], Any], local_addr: Any = None, **more: Any
    ) -> Any:
        """Open a socket; on a free port of the range if it has an address and port 0.

        Raises:
            OSError: no port of the range is free.
        """
        if local_addr is None or local_addr[1] != 0:
            return await super().create_datagram_endpoint(protocol_factory, local_addr=local_addr, **more)
        for port in random.sample(self._ports, len(self._ports)):
            try:
                endpoint = await super().create_datagram_endpoint(
                    protocol_factory, local_addr=(local_addr[0], port), **more
                )
            except OSError as fault:
                if fault.errno != errno.EADDRINUSE:
                    raise
            else:
                SOCKETS.get().append(endpoint[0])
                return endpoint
        raise OSError(errno.EADDRINUSE, "no port of the range is free")


def _log_fault(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log in one line what went wrong in a task of aiortc's: what strangers send leads to many."""
    print(f"webrtc: {context['message'][:100]}: {context.get('exception')!r}"[:300], file=sys.stderr, flush=True)


class Gateway:
    """All peers of a worker.

    Args:
        settings: of each peer.
        ports: the range of UDP ports.
        hosts: the addresses that peers are offered; all of this machine's if empty.

    Attributes:
        max_peers: how many there may be at once.
    """

    def __init__(self, settings: Settings, ports: range, hosts: list[str]) -> None:
        self.settings = settings
        self.max_peers = 1
        self.peers: dict[str, Peer] = {}
        self._hosts = hosts
        self._loop = PortLoop(ports)
        self._thread = threading.Thread(target=self._run, name="webrtc", daemon=True)

    def open(self) -> None:
        """Start the loop."""
        if self._hosts:
            aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: list(self._hosts)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(_log_fault)
        self._loop.run_forever()

    def close(self) -> None:
        """Hang up all peers, and end the loop."""
        with contextlib.suppress(EngineError):
            self.do(self._close_peers(), CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._loop.is_running():
            self._loop.close()

    async def _close_peers(self) -> None:
        await asyncio.gather(*(peer.close() for peer in list(self.peers.values())))
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    # -- for seats, in any thread

    def do(self, work: Coroutine[Any, Any, T], timeout_s: float = ANSWER_S) -> T:
        """Do something in the loop, and wait for its end.

        Raises:
            EngineError: it takes too long. If the loop does nothing at all, the process is started anew.
        """
        doing = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return doing.result(timeout_s)
        except concurrent.futures.TimeoutError:
            alive = threading.Event()
            self.soon(alive.set)
            hangs = not alive.wait(HANG_S)
            doing.cancel()
            message = "the worker's calls do not answer; try again later"
            raise EngineError(message, retryable=True, restart=hangs) from None

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        """Call something in the loop."""
        self._loop.call_soon_threadsafe(work, *arguments)

    async def open_peer(self, request_id: str, principal: str = "", *, microphone: bool = False) -> Peer:
        """Make a peer of a principal; `close_peer` ends it.

        Raises:
            EngineError: there are as many as there may be.
        """
        if len(self.peers) >= self.max_peers:
            message = f"all {self.max_peers} calls of this worker are taken; call later, or give it more --slots"
            raise EngineError(message, retryable=True)
        peer = self.peers[request_id] = Peer(self.settings, principal, microphone=microphone)
        return peer

    async def close_peer(self, request_id: str, peer: Peer) -> None:
        """End a peer."""
        if self.peers.get(request_id) is peer:
            del self.peers[request_id]
        await peer.close()

    def peer(self, request_id: str, principal: str) -> Peer:
        """A peer of a principal.

        Raises:
            EngineError: there is none of this name, it is another principal's, or it has ended.
        """
        if (peer := self.peers.get(request_id)) is None or peer.principal != principal:
            raise EngineError("there is no such call, or it has ended; call again, and play it there")
        return peer
