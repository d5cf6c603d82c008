"""The port of the Wyoming protocol: who may connect, how often, and what answers their events."""

from collections import Counter

import attrs
import structlog
import trio

from relayd.auth.login_throttle import address_of, network_of
from relayd.config.schema import Wyoming
from relayd.http.connection import CLOSE_S
from relayd.http.context import Exchange, HttpContext, Slot
from relayd.net.hang_up import answer_and_hang_up
from relayd.net.proxies import is_within
from relayd.wyoming.connection import Connection
from relayd.wyoming.conversation import converse
from relayd.wyoming.describing import describe, ping
from relayd.wyoming.events import Event
from relayd.wyoming.speech import speak, speak_live
from relayd.wyoming.transcription import note_hints, transcribe

log = structlog.get_logger("relayd.wyoming")

#: Open connections of one address; of an IPv6 address, of its /64 network.
MAX_PER_ADDRESS = 64
LOOPBACK = ("127.0.0.0/8", "::1/128")
POLL_S = 0.02
ANSWERS = {
    "describe": describe,
    "ping": ping,
    "synthesize": speak,
    "synthesize-start": speak_live,
    "transcribe": note_hints,
    "audio-start": transcribe,
    "audio-chunk": transcribe,
    "transcript": converse,
}


@attrs.define(eq=False)
class WyomingServer:
    """Serves connections of the Wyoming protocol."""

    context: HttpContext
    _open: Counter[str] = attrs.field(factory=Counter)

    async def serve(self, stream: trio.abc.Stream, slot: Slot) -> None:
        """Serve one connection to its end; no fault of it gets out."""
        network = network_of(slot.peer)
        self._open[network] += 1
        stats = self.context.relay.stats.wyoming
        stats.connections += 1
        try:
            await self._serve(stream, slot, network)
        except Exception:
            log.exception("internal error in connection", peer=slot.peer)
        finally:
            stats.connections -= 1
            self._open[network] -= 1
            if not self._open[network]:
                del self._open[network]

    async def _serve(self, stream: trio.abc.Stream, slot: Slot, network: str) -> None:
        exchange = Exchange(slot)
        connection = Connection(self.context, stream, exchange, ANSWERS)
        if why := self._refuse(connection, network):
            log.info("connection refused", peer=slot.peer, why=why)
            await answer_and_hang_up(stream, Event("error", {"text": why, "code": "refused"}).encode())
            return
        exchange.principal = connection.principal
        self.context.exchanges.add(exchange)
        try:
            await connection.serve()
        finally:
            self.context.exchanges.discard(exchange)

    def _refuse(self, connection: Connection, network: str) -> str | None:
        """Why a peer may not connect; None if it may."""
        slot = connection.exchange.slot
        if self.context.leaving:
            return "the relay is shutting down; connect again in some seconds"
        if not is_allowed(slot.peer, connection.settings):
            return f"{address_of(slot.peer)} may not connect: name it in [wyoming] allow of relayd.toml"
        if self._open[network] > MAX_PER_ADDRESS:
            return f"{MAX_PER_ADDRESS} connections of this address are open; close one first"
        if full := self.context.full_message(connection.principal):
            return full
        return None if slot.log_in("client") else "the relay has all the connections it accepts; try again later"

    async def close(self) -> None:
        """Accept no more, and end all connections."""
        self.context.begin_shutdown()
        with trio.move_on_after(CLOSE_S):
            while self._open:  # noqa: ASYNC110  at most a hundred times, once per daemon
                await trio.sleep(POLL_S)


def is_allowed(peer: str, settings: Wyoming) -> bool:
    """Whether a peer may connect: it is on this machine, or [wyoming] allow names it."""
    return is_within(peer, (*LOOPBACK, *settings.allow))
