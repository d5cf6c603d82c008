"""A microphone: what it brings is heard in stretches, one request after the other, and told in order.

A client feeds it with samples, or it is that of a call.
"""

import math
import secrets
from collections.abc import Awaitable, Callable

import attrs
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.auth.tokens import Principal
from relayd.talk.call import Call
from relayd.talk.call_ear import CallEar
from relayd.talk.ear import LOOK_S, Ear, Heard, SpeechBegan, SpeechEnded
from relayd.talk.listening import Listening
from relayd.talk.place import Place

#: Samples a second of what a client feeds.
PCM_HZ = 24_000
#: A request hears as much, and the next goes on where nobody speaks; in mid-speech, at the latest after the second.
#: So it remains below a space's `run_timeout_s`, and its input below the relay's limit.
STRETCH_S, LONGEST_STRETCH_S = 60.0, 300.0
#: A microphone that sends nothing for so long gives back its slot; in mid-speech, what was said ends there.
MUTED_S, MUTED_SPEECH_S = 30.0, 3.0
#: After a failure, so long nothing is heard; on a call, twice as long each time, up to the second.
REST_S, MOST_REST_S = 1.0, 30.0


@attrs.define(eq=False)
class Stretch:
    """A stretch of sound that one request hears.

    Args:
        detects: whether it tells itself when somebody speaks.
        before: set when all that was heard before it was told.
        began_at: when the first of it came.
    """

    ear: Ear
    detects: bool
    before: trio.Event
    began_at: float
    #: Samples that came before it; known once something of it is told.
    base: int = 0
    is_done: trio.Event = attrs.field(factory=trio.Event)
    is_speech: bool = False
    is_cleared: bool = False

    @property
    def seconds(self) -> float:
        """How much was fed."""
        return self.ear.fed_bytes / 2 / self.ear.rate

    @property
    def muted_at(self) -> float:
        """When it ends by itself unless more sound comes."""
        if not self.detects or self.ear.is_ended or not self.ear.fed_bytes:
            return math.inf
        return self.ear.fed_at + (MUTED_SPEECH_S if self.is_speech else MUTED_S)

    @property
    def is_long(self) -> bool:
        """Whether the next one is to go on."""
        age_s = max(self.seconds, trio.current_time() - self.began_at)
        is_silent = self.ear.has_heard_all and not self.is_speech
        return self.detects and age_s >= (STRETCH_S if is_silent else LONGEST_STRETCH_S)

    def ms(self, sample: int) -> int:
        """When a sample of it was said: in ms of all that was heard."""
        return (self.base + sample) * 1000 // self.ear.rate


@attrs.define(eq=False)
class Microphone:
    """Hears one client, or one caller.

    Args:
        nursery: in which it listens.
        report: called with what is heard in a stretch, and with None at the end of that.
        call: whose microphone it is; None if a client feeds it.
        listening: as the client has set it.
    """

    place: Place
    principal: Principal
    nursery: trio.Nursery
    report: Callable[[Stretch, Heard | None], Awaitable[None]]
    call: Call | None = None
    listening: Listening = attrs.field(factory=Listening)
    #: The stretch that hears what comes now.
    now: Stretch | None = None
    #: Samples of the stretches that have ended.
    _samples: int = 0
    _stretches: list[Stretch] = attrs.field(factory=list)
    _rests_until: float = 0.0
    _rest_s: float = 0.0

    # -- what comes

    async def feed(self, pcm: bytes) -> Rejected | None:
        """Hear more of what a client feeds; returns why nobody does."""
        if trio.current_time() < self._rests_until or not pcm:
            return None
        stretch = await self._stretch()
        if isinstance(stretch, Rejected):
            return stretch
        await stretch.ear.feed(pcm)
        return None

    async def listen(self, refuse: Callable[[Rejected], Awaitable[None]]) -> None:
        """Hear a call, until it ends.

        Args:
            refuse: told why nobody hears it; it is tried again.
        """
        assert self.call is not None
        await self.call.wait_answer()
        while not self.call.ended.is_set():
            if trio.current_time() >= self._rests_until:
                stretch = await self._stretch()
                if isinstance(stretch, Rejected):
                    await refuse(stretch)
                elif not stretch.ear.fed_bytes:
                    stretch.began_at = trio.current_time()
            with trio.move_on_after(LOOK_S):
                await self.call.ended.wait()

    async def finish(self) -> None:
        """Hear no more in this stretch: the next sound begins another."""
        if (stretch := self.now) is not None and not stretch.ear.fed_bytes:
            self.forget()
        elif stretch is not None:
            self.now = None
            await stretch.ear.end()

    def forget(self) -> None:
        """Forget what was heard in this stretch."""
        if (stretch := self.now) is not None:
            self.now, stretch.is_cleared = None, True
            stretch.ear.close("the client has cleared its sound")

    async def change(self, listening: Listening) -> None:
        """Listen in another way from now on."""
        if listening != self.listening:
            await self.finish()
            self.listening = listening

    def rest(self) -> None:
        """Hear nothing for a while, after a failure."""
        self._rest_s = REST_S if self.call is None else max(REST_S, min(2 * self._rest_s, MOST_REST_S))
        self._rests_until = trio.current_time() + self._rest_s

    def close(self) -> None:
        """Hear no more at all."""
        for stretch in self._stretches:
            stretch.ear.close()

    # -- stretches

    async def _stretch(self) -> Stretch | Rejected:
        """Return the one that hears what comes now; or why there is none."""
        if self.now is not None and self.now.is_long:
            await self.finish()
        if self.now is None or not self.now.ear.is_live:
            begun = self._begin()
            if isinstance(begun, Rejected):
                self.rest()
                return begun
            self.now = begun
        return self.now

    def _begin(self) -> Stretch | Rejected:
        space = self.place.settings.transcribe
        if not space:  # since a reload
            message = "nothing is heard here any more ([talk] transcribe in relayd.toml)"
            return Rejected.because(ErrorCode.SPACE_NOT_FOUND, message)
        if (refused := self.place.refuse_too_fast(self.principal)) is not None:
            return refused
        known = self.place.relay.spaces[space].params if space in self.place.relay.spaces else {}
        params, request_id = self.listening.params(known.get("properties", {})), secrets.token_hex(16)
        if self.call is None:
            ear = Ear(self.place, self.principal, request_id, space, params, PCM_HZ)
        else:
            ear = CallEar(self.place, self.principal, request_id, space, params, call=self.call)
        if (refused := ear.open()) is not None:
            return refused
        before = self._stretches[-1].is_done if self._stretches else trio.Event()
        if not self._stretches:
            before.set()
        stretch = Stretch(ear, self.listening.turn_detection is not None, before, trio.current_time())
        self._stretches.append(stretch)
        self.nursery.start_soon(self._follow, stretch)
        return stretch

    async def _follow(self, stretch: Stretch) -> None:
        """Tell what is heard, once all that was heard before was told."""
        try:
            await stretch.before.wait()
            stretch.base = self._samples
            while (heard := await self._next(stretch)) is not None and not stretch.is_cleared:
                if isinstance(heard, SpeechBegan | SpeechEnded):
                    stretch.is_speech, self._rest_s = isinstance(heard, SpeechBegan), 0.0
                await self.report(stretch, heard)
            await self.report(stretch, None)
        finally:
            stretch.ear.close()
            self._samples += stretch.ear.fed_bytes // 2
            stretch.is_done.set()
            self._stretches.remove(stretch)

    async def _next(self, stretch: Stretch) -> Heard | None:
        """Return what is heard next, and end a stretch in which nothing comes any more."""
        while True:
            with trio.move_on_at(min(stretch.muted_at, trio.current_time() + MUTED_SPEECH_S)):
                return await stretch.ear.next()
            if stretch is self.now and trio.current_time() >= stretch.muted_at:
                await self.finish()
