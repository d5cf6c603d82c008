"""A call: one peer, reached through a request of the space of calls that lasts as long as the call does.

The request is an ordinary one of its principal, so it is limited, seen and ended as any other, and goes on while the
relay is restarted. What is played on it are other requests (`playback`).
"""

import json
import secrets
from collections.abc import Callable
from typing import Any

import attrs
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Completed, Failed, Frame, Output
from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, MAX_UNACKED_BYTES, Input, Rejected, Submit
from protocol.wire.structs import InputInfo
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal
from relayd.config.schema import Talk as TalkSettings
from relayd.core.admission import Admission
from relayd.core.relay import Relay
from relayd.requests.request import Request
from relayd.scheduling.model import State
from relayd.talk.held_request import PRIORITY, FedRequest, HeldRequest

COMMANDS, IDLE = "commands", "idle"
#: Commands that may wait until the peer has answered, or for the store.
MAX_WAITING_BYTES = 256 * 1024
#: How long a browser waits for its answer; and of that, for the picture of a face that nobody needs to hear.
ANSWER_S, IDLE_S = 15.0, 5.0
#: Code of a call that was ended here.
ENDED = "cancelled"
#: How long it is waited to hear how much was played of what was cut off; of so many it is kept.
STOPPED_S, MAX_STOPPED = 0.5, 100
FULL = "all lines of the space of calls are taken; call again later"


@attrs.define(eq=False)
class Call:
    """One call; `run` sets it up and follows it to its end.

    Args:
        key: whose call it is: of those with the same, the newest counts.
        offer: the SDP of the peer.
        avatar: whose face it shows.
        on_end: called with it when it has ended.
        listens: whether its microphone is heard, by a `CallEar`.
    """

    admission: Admission
    principal: Principal
    key: str
    offer: str
    avatar: str
    on_end: Callable[["Call"], None]
    listens: bool = False
    answer: str | None = None
    #: Why it has ended, once it has; None if the peer hung up.
    failure: Rejected | None = None
    #: Gets what comes over the data channel.
    on_event: Callable[[str], None] = lambda _text: None
    ended: trio.Event = attrs.field(factory=trio.Event)
    #: Request that was cut off -> samples of it that were played; of the last ones.
    stopped: dict[str, int] = attrs.field(factory=dict)
    _stop_noted: trio.Event = attrs.field(factory=trio.Event)
    _answered: trio.Event = attrs.field(factory=trio.Event)
    _changed: trio.Event = attrs.field(factory=trio.Event)
    _line: FedRequest = attrs.field(init=False)
    #: The request that makes the picture for times of silence.
    _idle: HeldRequest | None = None
    #: Those on whom it depends; without any at first, it depends on nobody.
    _owners: set[object] = attrs.field(factory=set)
    _waiting: bytearray = attrs.field(factory=bytearray)
    #: Whether the peer has hung up.
    _is_over: bool = False

    def __attrs_post_init__(self) -> None:
        self._line = FedRequest(self._wake, principal=self.principal)

    def _wake(self) -> None:
        self._pump()
        self._changed.set()

    @property
    def relay(self) -> Relay:
        """The relay."""
        return self.admission.relay

    @property
    def request_id(self) -> str:
        """The id of its request; those who play on it name it."""
        return self._line.request.request_id if self._line.request is not None else ""

    @property
    def has_picture(self) -> bool:
        """Whether the peer wants to see something."""
        return "m=video" in self.offer

    @property
    def slots(self) -> int:
        """How many slots of the space of calls it takes: itself, what is played on it, and who listens."""
        return 3 if self.listens else 2

    # -- for those who call

    async def wait_answer(self) -> str | Rejected:
        """Wait for the SDP of the answer; returns why there is none."""
        await self._answered.wait()
        if self.answer is not None:
            return self.answer
        return self.failure or Rejected.because(ErrorCode.ENGINE_FAILED, "the call ended before it was answered")

    async def wait_stopped(self, play: str) -> int | None:
        """Return how much was played of what was cut off; None if nobody says so."""
        with trio.move_on_after(STOPPED_S):
            while play not in self.stopped and not self.ended.is_set():
                await self._stop_noted.wait()
        return self.stopped.get(play)

    def command(self, **command: Any) -> None:
        """Tell the peer something, once it has answered: a `candidate`, or what to `send` over its data channel."""
        line = json.dumps(command, ensure_ascii=False).encode(errors="replace") + b"\n"
        if len(self._waiting) + len(line) <= MAX_WAITING_BYTES:
            self._waiting += line
            self._pump()

    async def send(self, text: str) -> None:
        """Send over the data channel; waits while too much is on its way."""
        while len(self._waiting) > MAX_WAITING_BYTES // 2 and not self.ended.is_set():
            await self._changed.wait()
        self.command(send=text)

    def hang_up(self, reason: str) -> None:
        """End it."""
        self.failure = self.failure or _ended(reason)
        self._drop(reason)
        self._wake()

    def hold(self, owner: object) -> None:
        """Keep it as long as its owner does not let it go."""
        self._owners.add(owner)
        if (request := self._line.request) is not None and request.live:
            request.hold(self._line)

    def let_go(self, owner: object) -> None:
        """Without any owner, keep it only as long as a request lives that nobody holds."""
        self._owners.discard(owner)
        if not self._owners and (request := self._line.request) is not None:
            request.release(self._line, trio.current_time())

    # -- its course

    def resume(self, request: Request) -> None:
        """Go on with a request that is there since before the relay was restarted."""
        self._line.open(request)
        self._waiting += b"\n"  # a command may have been cut

    async def run(self) -> None:
        """Follow it to its end.

        Cancellation: leaves its request, which goes on.
        """
        try:
            if self._line.request is None and self.failure is None:
                await self._set_up()
            await self._follow(lambda: False)
            self._drop_idle("the call has ended")
            self.on_end(self)
        finally:
            self._line.release(trio.current_time())
            self._answered.set()
            self.ended.set()
            self._stop_noted.set()
            self._changed.set()

    async def _set_up(self) -> None:
        """Open the request and wait for its answer: with a picture for times of silence, or else without."""
        with trio.move_on_after(ANSWER_S) as patience:
            self._open_idle()
            self._open()
            with trio.move_on_after(IDLE_S if self._idle is not None else float("inf")):
                await self._follow(self._answered.is_set)
            if self._idle is not None and self._waits_for_face:
                self._drop("a call is answered without the face")
                self._line.release(trio.current_time())
                self._line, self._idle, self.failure = FedRequest(self._wake, principal=self.principal), None, None
                self._open()
            await self._follow(self._answered.is_set)
        if patience.cancelled_caught:
            message = f"the space of calls has not answered for {ANSWER_S:g} s; call again later"
            self.failure = Rejected.because(ErrorCode.QUEUE_TIMEOUT, message)
            self._drop("it was not answered in time")

    @property
    def _waits_for_face(self) -> bool:
        """Whether there is no answer because the face has failed, or is late."""
        request = self._line.request
        if self.answer is not None or request is None:
            return False
        if self.failure is not None:
            return self.failure.code == ErrorCode.SOURCE_FAILED
        return request.entry.state is State.UPLOADING

    async def _follow(self, is_enough: Callable[[], bool]) -> None:
        while not self._read_frames() and not is_enough():
            await self._changed.wait()
            self._changed = trio.Event()

    def _open(self) -> None:
        inputs = {COMMANDS: InputInfo(media_type="application/x-ndjson", live=True)}
        if self._idle is not None and self._idle.request is not None:
            inputs[IDLE] = InputInfo(from_=self._idle.request.request_id)
        params: dict[str, Value] = {"offer": self.offer} | ({"microphone": True} if self.listens else {})
        self._submit(self._line, self._settings.calls, params, inputs)

    def _open_idle(self) -> None:
        space = self._settings.face
        if not space or not self.has_picture or not self.relay.workers.serving(space):
            return
        self._idle = HeldRequest(lambda: None)
        if not self._submit(self._idle, space, face_params(self.relay, space, self.avatar, idle=True), {}):
            self._idle, self.failure = None, None

    def _submit(self, held: HeldRequest, space: str, params: dict[str, Value], inputs: dict[str, InputInfo]) -> bool:
        submit = Submit(
            request_id=secrets.token_hex(16),
            space=space,
            params=params,
            inputs=inputs,
            priority=PRIORITY,
            retry="never",
            group=self.key,
        )
        admitted = self.admission.submit(submit, self.principal, held)
        if isinstance(admitted, Rejected):
            self.failure = admitted
            return False
        held.hold(admitted)
        return True

    @property
    def _settings(self) -> TalkSettings:
        settings = self.relay.config.talk
        assert settings is not None, "without [talk], there are no calls"
        return settings

    # -- what comes

    def _read_frames(self) -> bool:
        """Take what has come; returns whether it has ended."""
        if self._line.refusal is not None:
            self.failure = self.failure or self._line.refusal
        while self.failure is None and (frame := self._line.next_frame()) is not None:
            match frame:
                case Output(data={"answer": str() as answer}):
                    self.answer = answer
                    self._answered.set()
                    self._pump()
                case Output(data={"stopped": {"play": str() as play, "played": int() as samples}}):
                    self.stopped = {**dict(list(self.stopped.items())[-MAX_STOPPED:]), play: samples}
                    self._stop_noted.set()
                    self._stop_noted = trio.Event()
                case Output(data={"event": str() as text}):
                    self.on_event(text)
                case Completed():
                    self._is_over = True
                case _ if frame.ENDS:
                    self.failure = _why(frame)
        return self._is_over or self.failure is not None

    def _pump(self) -> None:
        """Feed the commands that wait, as far as there is room for them."""
        request = self._line.request
        if self.answer is None or request is None:
            return
        while self._waiting and request.live and (fed := request.fed[COMMANDS]).pending_bytes < MAX_UNACKED_BYTES // 2:
            data, known = bytes(self._waiting[: MAX_INPUT_CHUNK_BYTES // 2]), fed.known
            piece = Input(request_id=request.request_id, name=COMMANDS, offset=known, data=data)
            self.admission.add_input(request, piece, self._line)
            if fed.known == known:  # there is no room; `on_input_stored` follows
                break
            del self._waiting[: fed.known - known]

    def _drop(self, reason: str) -> None:
        if (request := self._line.request) is not None and request.live:
            self.relay.cancel(request, reason)
        self._drop_idle(reason)

    def _drop_idle(self, reason: str) -> None:
        if self._idle is not None and (request := self._idle.request) is not None:
            if request.live:
                self.relay.cancel(request, reason)
            self._idle.release(trio.current_time())


def offers_microphone(offer: str) -> bool:
    """Whether the peer says that it sends sound."""
    _, _, audio = offer.partition("m=audio")
    lines = audio.partition("m=")[0].split()
    return "a=sendrecv" in lines or "a=sendonly" in lines


def face_params(relay: Relay, space: str, avatar: str, **params: Value) -> dict[str, Value]:
    """Return the params of a request that shows a face: with whose it is, where the space shows several."""
    known = relay.spaces[space].params.get("properties", {})
    return params | ({"avatar": avatar} if avatar and "avatar" in known else {})


def _why(frame: Frame) -> Rejected:
    if isinstance(frame, Failed):
        return Rejected(code=frame.code, message=frame.message, retryable=frame.retryable, details=frame.details)
    return _ended((frame.reason if isinstance(frame, Cancelled) else "") or "it was cancelled")


def _ended(reason: str) -> Rejected:
    return Rejected(code=ENDED, message=f"the call has ended: {reason}")
