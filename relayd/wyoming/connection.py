"""One connection of the Wyoming protocol: reads its events, and answers one after the other.

Whatever goes wrong with it ends this connection alone, with an `error` event that says what to do: Home Assistant would
wait for ever for what does not come.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import attrs
import structlog
import trio

from relayd.auth.tokens import Principal
from relayd.config.schema import Wyoming
from relayd.http.context import Exchange, HttpContext
from relayd.http.errors import HttpError
from relayd.net.hang_up import answer_and_hang_up
from relayd.wyoming.events import Event, EventFault, EventParser, shown
from relayd.wyoming.info import Offer

log = structlog.get_logger("relayd.wyoming")

RECEIVE_BYTES = 64 * 1024
#: Events that wait for those before them; further ones are not read.
MAX_WAITING = 4
#: An open connection may be silent for so long while nothing is asked.
IDLE_S = 600.0
#: What an event takes of the event loop's time, and each byte of it.
EVENT_COST_S = 2e-4
BYTE_COST_S = 1e-8
#: Events that ask for what is done elsewhere, and would wait for an answer.
ELSEWHERE = frozenset({"detect", "recognize", "run-pipeline", "run-satellite", "mic-start", "play"})


@attrs.define(eq=False)
class Connection:
    """One connection.

    Args:
        stream: its bytes.
        exchange: counts it as one of its principal's.
        answers: type of an event -> what answers it.
    """

    context: HttpContext
    stream: trio.abc.Stream
    exchange: Exchange
    answers: Mapping[str, Callable[["Connection", Event], Awaitable[None]]]
    _events: trio.MemoryReceiveChannel[Event] = attrs.field(init=False)
    _parser: EventParser = attrs.field(factory=EventParser)
    _sending: trio.Lock = attrs.field(factory=trio.Lock)
    #: What the audio that comes next is to be transcribed with.
    hints: dict[str, str] = attrs.field(factory=dict)
    #: Whether an event is being answered; and whether one was sent in part.
    _is_busy: bool = False
    _is_cut: bool = False
    _refusal: Event | None = None

    @property
    def settings(self) -> Wyoming:
        """The settings, as they are now."""
        settings = self.context.relay.config.wyoming
        assert settings is not None, "without [wyoming], there are no connections"
        return settings

    @property
    def principal(self) -> Principal:
        """Whose requests it makes, with the rights that it has now."""
        return self.context.tokens.principal_named(self.settings.principal, time.time())

    @property
    def offer(self) -> Offer:
        """What there is for it."""
        relay = self.context.relay
        return Offer(relay.spaces.values(), self.principal, self.settings, relay.config.talk)

    async def serve(self) -> None:
        """Serve it until either side ends it."""
        with self.exchange.scope as scope:
            self.exchange.reading = scope
            send, self._events = trio.open_memory_channel[Event](MAX_WAITING)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run, self._read, send)
                nursery.start_soon(self._run, self._answer)
        if self.context.leaving and self._refusal is None:
            self._refusal = _error("shutting_down", "the relay is shutting down; connect again in some seconds")
        if self._refusal is not None and not self._is_cut:
            with trio.CancelScope(shield=True):
                await answer_and_hang_up(self.stream, self._refusal.encode())

    async def _run(self, part: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a part; at its end the connection ends."""
        await self.guard(part, *args)
        self.exchange.scope.cancel()

    async def guard(self, part: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a part; if it fails, the connection ends with an `error` that says why."""
        try:
            await part(*args)
        except (EventFault, HttpError) as refusal:
            self._refuse(refusal.code, refusal.message)
        except Exception:
            log.exception("internal error in connection", peer=self.exchange.slot.peer)
            self._refuse("internal", "internal error; see the relay's log")

    def _refuse(self, code: str, message: str) -> None:
        self.exchange.scope.cancel()
        if self._refusal is None:
            self._refusal = _error(code, message)
            errors = self.context.relay.stats.wyoming.errors
            errors[code] = errors.get(code, 0) + 1
            log.info("connection refused", peer=self.exchange.slot.peer, code=code, why=message)

    # -- receiving

    async def _read(self, send: trio.MemorySendChannel[Event]) -> None:
        """Read events until the peer has left."""
        relay, principal = self.context.relay, self.settings.principal
        while (data := await self._receive()) is not None:
            self._parser.feed(data)
            usage = relay.principals.usage_of(principal)
            usage.charge(BYTE_COST_S * len(data), trio.current_time())
            while (event := self._parser.next()) is not None:
                await relay.principals.wait_turn(usage, EVENT_COST_S)
                await send.send(event)

    async def _receive(self) -> bytes | None:
        """Return received bytes; None where no more will come."""
        while True:
            most_s = self.context.relay.config.limits.dead_after_s if self._parser.is_amid else IDLE_S
            with trio.move_on_after(most_s):
                try:
                    return bytes(await self.stream.receive_some(RECEIVE_BYTES)) or None
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return None
            if self._parser.is_amid:
                raise EventFault(f"an event was not whole after {most_s:g} s; connect again, and send it")
            if not self._is_busy:
                return None

    async def next(self) -> Event:
        """Return the next event, while something is answered that consists of several.

        Raises:
            EventFault: none has come for long.
        """
        most_s = self.context.relay.config.limits.feed_idle_timeout_s
        with trio.move_on_after(most_s):
            return await self._events.receive()
        raise EventFault(
            f"nothing more came for {most_s:g} s; connect again, and end with its stop event", "feed_timeout"
        )

    # -- answering

    async def _answer(self) -> None:
        asked = self.context.relay.stats.wyoming.asked
        while True:
            event = await self._events.receive()
            answer = self.answers.get(event.type)
            if answer is not None:
                asked[event.type] = asked.get(event.type, 0) + 1
                self._is_busy = True
                await answer(self, event)
                self._is_busy = False
            elif event.type in ELSEWHERE:
                known = ", ".join(self.answers)
                raise EventFault(f"relayd does not answer {shown(event.type)}; it answers {known}", "unsupported")
            else:  # of a later version of the protocol, perhaps
                log.debug("event ignored", peer=self.exchange.slot.peer, kind=event.type[:64])

    async def send(self, kind: str, data: dict[str, Any] | None = None, payload: bytes = b"") -> None:
        """Send an event; waits while the peer does not read. Where it is gone, this connection ends.

        Cancellation: the event may be sent in part, and the connection has to end.
        """
        encoded = Event(kind, data or {}, payload).encode()
        relay = self.context.relay
        async with self._sending:
            await trio.lowlevel.checkpoint_if_cancelled()  # what is not begun is not cut
            self._is_cut = True
            with trio.move_on_after(relay.config.limits.stall_timeout_s) as waiting:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self.stream.send_all(encoded)
                    self._is_cut = False
                    return
        if waiting.cancelled_caught:
            relay.slow_consumers += 1
            log.warning("connection closed: it reads nothing", peer=self.exchange.slot.peer)
        self.exchange.scope.cancel()
        await trio.sleep_forever()


def _error(code: str, message: str) -> Event:
    return Event("error", {"text": message, "code": code})
