"""The speech of one reply, played on a call: by a request that shows a face, where there is one, and one that plays.

Both are piped from the speech, and go on after the reply is made. A face that fails, or is late, takes no speech away:
then it is played without.
"""

import hashlib
from collections.abc import Callable
from enum import StrEnum

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Completed, Failed, Output
from protocol.wire.messages import Rejected, Submit
from protocol.wire.structs import InputInfo
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal
from relayd.core.admission import Admission
from relayd.core.relay import Relay
from relayd.talk.call import Call, face_params
from relayd.talk.held_request import PRIORITY, HeldRequest

log = structlog.get_logger("relayd.talk")

AUDIO, VIDEO = "audio", "video"
#: How long speech waits for its face, which is looked for so often.
FACE_S, LOOK_S = 1.0, 0.1
#: How long it is waited for the last word on what was played: it comes within two packets.
CUT_S = 1.5


class PlaybackState(StrEnum):
    """The states of a playback."""

    PLAYING = "playing"
    PLAYED = "played"
    CUT = "cut"
    FAILED = "failed"


@attrs.define(eq=False)
class Playback:
    """Plays one reply; `run` follows it to its end.

    Args:
        call: on which it plays.
        speech: the id of the request that speaks.
        group: of the requests of the turn.
        on_end: called with it when it has ended.
    """

    call: Call
    principal: Principal
    speech: str
    group: str
    on_end: Callable[["Playback"], None]
    state: PlaybackState = PlaybackState.PLAYING
    #: Samples that were played.
    played: int = 0
    started: trio.Event = attrs.field(factory=trio.Event)
    ended: trio.Event = attrs.field(factory=trio.Event)
    _play: HeldRequest = attrs.field(init=False)
    _face: HeldRequest | None = None
    _waits_since: float | None = None
    _is_face_bad: bool = False
    #: Whether it is to end before all is played.
    is_cut: bool = False
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self._play = HeldRequest(self._wake)

    def _wake(self) -> None:
        self._changed.set()

    @property
    def _admission(self) -> Admission:
        return self.call.admission

    @property
    def _relay(self) -> Relay:
        return self._admission.relay

    @property
    def knows_what_was_heard(self) -> bool:
        """Whether no more was heard than what was played; otherwise, it is as if there was no call."""
        is_whole = self.state is PlaybackState.PLAYED
        return not is_whole and (self.state is not PlaybackState.FAILED or self.played > 0)

    def cut(self, reason: str) -> None:
        """End it; `settle` waits until it is known what was played."""
        self.is_cut = True
        for held in (self._play, self._face):
            if held is not None and held.request is not None and held.request.live:
                self._relay.cancel(held.request, reason)
        self._wake()

    async def settle(self) -> None:
        """Wait for its end, but not for long."""
        with trio.move_on_after(CUT_S):
            await self.ended.wait()

    async def run(self) -> None:
        """Submit the requests, or take them up again after a restart, and follow them to their end.

        Cancellation: leaves the requests, which go on.
        """
        try:
            if isinstance(await self.call.wait_answer(), Rejected):
                self.state = PlaybackState.FAILED
            elif self.is_cut:
                self.state = PlaybackState.CUT
            else:
                self._open_face()
                self._open_play()
            while not await self._read_all():
                with trio.move_on_after(LOOK_S if self._face is not None else float("inf")):
                    await self._changed.wait()
                self._changed = trio.Event()
                self._go_without_late_face()
            if self.state is not PlaybackState.PLAYED:
                await self._note_stopped()
            self._drop_face("the speech has ended")
            self.on_end(self)
        finally:
            self._play.release(trio.current_time())
            self.ended.set()

    # -- the requests

    def _open_face(self) -> None:
        settings = self._relay.config.talk
        space = settings.face if settings is not None else ""
        if not space or not self.call.has_picture or not self._relay.workers.serving(space):
            return
        self._face = HeldRequest(self._wake)
        params = face_params(self._relay, space, self.call.avatar)
        if self._submit(self._face, "face", space, params, {AUDIO: InputInfo(from_=self.speech)}) is not None:
            self._face = None

    def _open_play(self, start: int = 0) -> None:
        settings = self._relay.config.talk
        inputs = {AUDIO: InputInfo(from_=self.speech)}
        if self._face is not None and self._face.request is not None:
            inputs[VIDEO] = InputInfo(from_=self._face.request.request_id)
        params: dict[str, Value] = {"peer": self.call.request_id} | ({"start": start} if start else {})
        name = "play" if VIDEO in inputs else "play without a face"
        space = settings.calls if settings is not None else ""
        if self._submit(self._play, name, space, params, inputs) is not None:
            self.state = PlaybackState.FAILED

    def _submit(
        self, held: HeldRequest, what: str, space: str, params: dict[str, Value], inputs: dict[str, InputInfo]
    ) -> Rejected | None:
        """Submit a request with an id that follows from that of the speech, so that a restart finds it again."""
        submit = Submit(
            request_id=hashlib.sha256(f"{what} {self.speech}".encode()).hexdigest()[:32],
            space=space,
            params=params,
            inputs=inputs,
            priority=PRIORITY,
            detach=True,
            retry="never",
            group=self.group,
        )
        known = self._relay.requests.get(submit.request_id)
        if known is None:
            admitted = self._admission.submit(submit, self.principal, held)
            if isinstance(admitted, Rejected):
                return admitted
            known = admitted
        held.hold(known)
        return None

    def _drop_face(self, reason: str) -> None:
        if self._face is not None:
            if (request := self._face.request) is not None and request.live:
                self._relay.cancel(request, reason)
            self._face.release(trio.current_time())
            self._face = None

    # -- what comes

    def _read_frames(self) -> None:
        """Take what has come."""
        if self._play.refusal is not None:
            self.state = PlaybackState.FAILED
        while self.state is PlaybackState.PLAYING and (frame := self._play.next_frame()) is not None:
            match frame:
                case Output(data={"played": int() as samples}):
                    self.played = max(self.played, samples)
                    self.started.set()
                case Completed():
                    self.state = PlaybackState.PLAYED
                case Cancelled():
                    self.state = PlaybackState.CUT
                case Failed():
                    self._fail(frame)
        if self._face is not None:  # nobody else reads what it says
            while self._face.next_frame() is not None:
                pass

    def _fail(self, failed: Failed) -> None:
        face = self._face.request if self._face is not None else None
        is_of_face = failed.code == ErrorCode.SOURCE_FAILED and face is not None
        if is_of_face and face is not None and failed.details.get("request_id") == face.request_id:
            self._is_face_bad = True
        else:
            self.state = PlaybackState.CUT if self.is_cut else PlaybackState.FAILED

    async def _note_stopped(self) -> None:
        """Note how much was played of what was cut off: the call says it, and exactly."""
        request = self._play.request
        if request is not None and request.entry.attempt > 0:
            samples = await self.call.wait_stopped(request.request_id)
            self.played = self.played if samples is None else samples

    async def _read_all(self) -> bool:
        """Take what has come, and play what is left without the face if it has failed; returns whether it has ended."""
        self._read_frames()
        if self._is_face_bad:
            self._is_face_bad = False
            await self._note_stopped()
            self._go_without_face("it has failed")
            self._read_frames()
        return self.state is not PlaybackState.PLAYING

    def _go_without_late_face(self) -> None:
        """Play without the face if that keeps the speech waiting."""
        face = self._face.request if self._face is not None else None
        play = self._play.request
        if face is None or play is None or play.entry.silent_sources != {face.request_id}:
            self._waits_since = None
            return
        now = trio.current_time()
        self._waits_since = now if self._waits_since is None else self._waits_since
        if play.live and now >= self._waits_since + FACE_S:
            self._play.release(now)
            self._relay.cancel(play, "its face is late")
            self._go_without_face("it is late")

    def _go_without_face(self, why: str) -> None:
        self._play.release(trio.current_time())
        self._drop_face(f"the speech is played without its face: {why}")
        if self.is_cut:
            self.state = PlaybackState.CUT
            return
        self._play = HeldRequest(self._wake)
        self._open_play(self.played)


@attrs.define(eq=False)
class Playbacks:
    """What is played of one conversation.

    Args:
        nursery: in which it is followed.
        note_played: called with the number of a turn, and how much of it was played, where that is not all.
    """

    nursery: trio.Nursery
    note_played: Callable[[int, int], object]
    #: Number of the turn -> what plays it; its turn may have ended.
    _all: dict[int, Playback] = attrs.field(factory=dict)

    def __bool__(self) -> bool:
        return bool(self._all)

    def start(self, number: int, call: Call, principal: Principal, speech: str, group: str) -> Playback:
        """Play the speech of a turn on a call."""

        def on_end(playback: Playback) -> None:
            del self._all[number]
            if playback.knows_what_was_heard:
                self.note_played(number, playback.played)

        playback = self._all[number] = Playback(call, principal, speech, group, on_end)
        self.nursery.start_soon(self._run, playback)
        return playback

    async def _run(self, playback: Playback) -> None:
        try:
            await playback.run()
        except Exception:
            log.exception("internal error in what is played", request_id=playback.call.request_id)

    def cut(self, reason: str) -> bool:
        """End all of it; whether there was any."""
        for playback in self._all.values():
            playback.cut(reason)
        return bool(self._all)

    async def wait_cut(self) -> None:
        """Wait until nothing is played that is to end."""
        for playback in [each for each in self._all.values() if each.is_cut]:
            await playback.settle()
