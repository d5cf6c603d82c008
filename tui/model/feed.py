"""Feeds the model from a relay, over a link that is restored for ever, and sends the operator's actions. Under Trio."""

import math
import time
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

import attrs
import trio

from protocol.client.client import RelayClient, open_relay
from protocol.client.contexts import choose_login
from protocol.link.backoff import Backoff
from protocol.wire.errors import ErrorCode, LinkError, ProtocolError, RequestError, RequestRejected
from protocol.wire.frames import Audio
from protocol.wire.messages import Delta, Done, Rejected, Snapshot, Welcome
from protocol.wire.validators import Value
from tui.model.relay_model import RelayModel

#: How long to wait for the answer to an action; the relay itself allows it 10 s.
STEER_S = 12.0
#: Actions that may wait to be sent; more than a person can ask for.
MAX_WAITING = 200
#: The level of audio is measured on every n-th sample.
EVERY_SAMPLE = 8
LEVEL_S = 1.0
#: The message shown in place of an answer that cannot come.
NOT_LINKED = "the relay is not reachable; nothing was done"


@attrs.frozen
class Connected:
    """The link to the relay is up."""

    server: str = ""
    principal: str = ""


@attrs.frozen
class Disconnected:
    """The link was lost, or could not be made; it will be tried again."""

    why: str
    retry_s: float


SourceEvent = Snapshot | Delta | Connected | Disconnected
Tell = Callable[[SourceEvent], None]
Options = Mapping[str, Value]


class Source(Protocol):
    """What the feed follows: a relay, or a simulation of one."""

    async def follow(self, tell: Tell) -> None:
        """Report every event through `tell`, until cancelled."""

    async def steer(self, action: str, target: str, options: Options) -> Done | Rejected:
        """Carry out an action and return the relay's answer."""

    async def listen(self, request_id: str, after_seq: int, on_audio: Callable[[bytes], None]) -> None:
        """Pass the audio of a request to `on_audio` as it arrives, until it ends."""


class RelaySource:
    """A real relay.

    Args:
        url: as for `choose_login`, as are `token_file` and `context`.
        readonly: have the relay refuse every steer.
    """

    def __init__(
        self, url: str | None, *, readonly: bool, token_file: str | None = None, context: str | None = None
    ) -> None:
        self._login = partial(choose_login, url, token_file, context)
        self._readonly = readonly
        self._relay: RelayClient | None = None

    async def follow(self, tell: Tell) -> None:
        """Follow the relay; if it cannot be reached or refuses, try again for ever."""
        backoff = Backoff()

        def up(welcome: Welcome) -> None:
            tell(Connected(welcome.server, welcome.principal))

        def down(fault: LinkError, retry_s: float) -> None:
            tell(Disconnected(str(fault), retry_s))

        while True:
            began = trio.current_time()
            try:
                login = self._login()  # each time, as the token's file may have changed
                async with (
                    open_relay(
                        login.url,
                        token=login.token,
                        role="operator",
                        agent="relay-tui",
                        on_reconnect=down,
                        on_up=up,
                        backoff=backoff,
                        readonly=self._readonly,
                    ) as relay,
                    relay.watch() as watch,
                ):
                    self._relay = relay
                    async for change in watch:
                        tell(change)
                why = "the relay ended the watch"
            except (LinkError, ProtocolError, RequestError, ValueError) as fault:
                why = str(fault)
            finally:
                self._relay = None
            backoff.note_uptime(trio.current_time() - began)
            retry_s = max(0.2, backoff.next_s())
            tell(Disconnected(why, retry_s))
            await trio.sleep(retry_s)

    async def steer(self, action: str, target: str, options: Options) -> Done | Rejected:
        """Send the action over the current link; refused at once while there is none."""
        if self._relay is None:
            return Rejected.because(ErrorCode.INTERNAL, NOT_LINKED)
        try:
            data = await self._relay.steer(action, target, **options)
        except RequestRejected as refusal:
            return Rejected(code=refusal.code, message=refusal.message)
        except (LinkError, RequestError) as fault:
            return Rejected.because(ErrorCode.INTERNAL, f"{fault}; whether it was done is not known")
        return Done(action=action, target=target, data=data)

    async def listen(self, request_id: str, after_seq: int, on_audio: Callable[[bytes], None]) -> None:
        """Subscribe to the frames of the request."""
        if self._relay is None:
            return
        try:
            async with self._relay.attach(request_id, after_seq) as stream:
                async for frame in stream:
                    if isinstance(frame, Audio):
                        on_audio(frame.pcm)
        except (LinkError, RequestError):
            return  # the row of the request shows how it ended


class Simulated:
    """A source made from a generator of changes, such as the one in `tui.demo.source`."""

    def __init__(self, demo: Any) -> None:
        self._demo = demo

    async def follow(self, tell: Tell) -> None:
        """Report that the link is up, then every change of the generator."""
        tell(Connected("demo", "demo"))
        changes: AsyncIterator[Snapshot | Delta] = self._demo.changes()
        async with aclosing(changes):  # type: ignore[type-var]
            async for change in changes:
                tell(change)
        await trio.sleep_forever()

    async def steer(self, action: str, target: str, options: Options) -> Done | Rejected:
        """Ask the simulation."""
        answer: Done | Rejected = await self._demo.steer(action, target, options)
        return answer

    async def listen(self, request_id: str, after_seq: int, on_audio: Callable[[bytes], None]) -> None:
        """Play a tone that swells, at 24 kHz."""
        while True:
            loud = int(12_000 * (1.1 + math.sin(time.monotonic())))
            on_audio(array("h", [loud, -loud] * 1_200).tobytes())
            await trio.sleep(0.1)


@attrs.frozen
class Ask:
    """An action to send to the relay."""

    action: str
    target: str
    answered: Callable[[Done | Rejected], None]
    options: Options = attrs.field(factory=dict)


@attrs.frozen
class Listen:
    """Measure the level of a request's audio once a second; None stops it."""

    request_id: str | None
    after_seq: int = -1
    level: Callable[[float], None] = lambda _level: None


class Feed:
    """Keeps the model up to date and sends the operator's actions. `run` is its task.

    Args:
        source: a relay.
        model: the model that it updates.
        changed: called after each change, in the same thread.
        clock: monotonic seconds; the time base of the model.
    """

    def __init__(
        self,
        source: Source,
        model: RelayModel,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._model = model
        self._changed = changed
        self._clock = clock
        self._send, self._asked = trio.open_memory_channel[Ask | Listen](MAX_WAITING)
        self._listening = trio.CancelScope()

    def ask(self, ask: Ask | Listen) -> bool:
        """Queue a command without waiting; False if too many are waiting already."""
        try:
            self._send.send_nowait(ask)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return False
        return True

    async def run(self) -> None:
        """Follow the source and send the queued actions, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._source.follow, self._on_event)
            with self._asked:
                async for ask in self._asked:
                    if isinstance(ask, Ask):
                        nursery.start_soon(self._carry_out, ask)
                    else:
                        self._listening.cancel()
                        self._listening = trio.CancelScope()
                        if ask.request_id is not None:
                            nursery.start_soon(self._listen, ask, self._listening)

    def _on_event(self, news: SourceEvent) -> None:
        now = self._clock()
        if isinstance(news, Connected):
            self._model.on_connected(news.server, news.principal, now)
        elif isinstance(news, Disconnected):
            self._model.on_disconnected(news.why, news.retry_s, now)
        else:
            self._model.apply(news, now)
        self._changed()

    async def _carry_out(self, ask: Ask) -> None:
        # Do not wait for the relay to come back: by then the operator would no longer expect the action.
        answer: Done | Rejected = Rejected.because(ErrorCode.INTERNAL, NOT_LINKED)
        if self._model.link.up:
            answer = Rejected.because(
                ErrorCode.INTERNAL, f"no answer within {STEER_S:g} s; whether it was done is open"
            )
            with trio.move_on_after(STEER_S):
                answer = await self._source.steer(ask.action, ask.target, ask.options)
        ask.answered(answer)

    async def _listen(self, listen: Listen, scope: trio.CancelScope) -> None:
        meter = Meter()

        async def report_level() -> None:
            while True:
                await trio.sleep(LEVEL_S)
                listen.level(meter.read_level())

        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(report_level)
                assert listen.request_id is not None
                await self._source.listen(listen.request_id, listen.after_seq, meter.add)
                nursery.cancel_scope.cancel()


class Meter:
    """Measures `pcm_s16le` audio: its root mean square since the last reading, from 0 to 1."""

    def __init__(self) -> None:
        self._squares = 0.0
        self._samples = 0

    def add(self, pcm: bytes) -> None:
        """Add audio; a whole number of samples."""
        samples = array("h", pcm[: len(pcm) // 2 * 2])[::EVERY_SAMPLE]
        self._squares += sum(sample * sample for sample in samples)
        self._samples += len(samples)

    def read_level(self) -> float:
        """The level since the last call; 0 if no audio came."""
        level = math.sqrt(self._squares / self._samples) / 32_768 if self._samples else 0.0
        self._squares, self._samples = 0.0, 0
        return level
