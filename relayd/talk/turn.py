"""One turn: a request that makes the text of a reply, and one that speaks it, which is piped from the first.

On a call, others play what is spoken (`playback`), and go on when the turn has ended.

All are ordinary requests of their principal: the fair queue, its limits and what a restart leaves of them are those
of every request. A turn holds both until they have ended; what fails of the speech does not take the text away.
"""

from collections.abc import Callable, Mapping

import attrs
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Frame, Output, Started
from protocol.wire.messages import Rejected, Submit
from protocol.wire.structs import InputInfo
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal
from relayd.scheduling.model import State
from relayd.stats.counters import count
from relayd.store.records import MAX_TURN_CHARS
from relayd.talk.conversation import Conversation, TurnState
from relayd.talk.events import SpeechEnded, TextEnded
from relayd.talk.held_request import PRIORITY, HeldRequest
from relayd.talk.place import Place
from relayd.talk.playback import Playback
from relayd.talk.reply import Reply

#: The live input of a space that speaks.
TEXT = "text"
#: The param by which a space that speaks is asked how the mouth stands.
VISEMES = "visemes"
#: Looks whether a worker has come are at least so far apart.
MIN_LOOK_S = 0.05


@attrs.frozen
class Outcome:
    """How a turn has ended; the code and message of a failure, or of that of its speech."""

    state: TurnState
    code: str | None = None
    message: str | None = None
    retryable: bool = False


@attrs.define(eq=False)
class Turn:
    """Makes one reply.

    Args:
        text_space: the space that makes the text.
        messages: the prompt.
        params: more params of the request that makes the text.
        speech_params: params of the one that speaks it.
        play: plays what is spoken; None if it is not on a call.
    """

    place: Place
    principal: Principal
    conversation: Conversation
    reply: Reply
    text_space: str
    messages: list[dict[str, str]]
    params: Mapping[str, Value]
    speech_params: Mapping[str, Value]
    play: Callable[[str], Playback] | None = None
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    #: Why it is interrupted.
    _interrupted: str | None = None
    _failure: Outcome | None = None
    _text: HeldRequest = attrs.field(init=False)
    _speech: HeldRequest = attrs.field(init=False)
    #: Size of one sample of its speech over all channels.
    _sample_bytes: int = 2
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self._text, self._speech = HeldRequest(self._wake), HeldRequest(self._wake)

    def _wake(self) -> None:
        self._changed.set()

    def interrupt(self, reason: str) -> None:
        """End it, and keep what was heard."""
        self._interrupted = self._interrupted or reason
        self._scope.cancel()

    def fail(self, code: str, message: str, *, retryable: bool = False) -> None:
        """End it as failed."""
        if self._interrupted is None and self._failure is None:
            self._failure = Outcome(TurnState.FAILED, str(code), message, retryable)
        self._scope.cancel()

    async def run(self) -> Outcome:
        """Make the reply, and return how it has ended; its requests have ended then, or are cancelled.

        Cancellation: leaves the requests, which go on; another turn may take them up.
        """
        try:
            with self._scope:
                await self._make()
            self._read_text()
            self._read_speech()
            outcome = self._outcome()
            if outcome.state is not TurnState.DONE:
                self._cancel(outcome.message or "the turn has ended")
                await self._note_played()
            return outcome
        finally:
            now = trio.current_time()
            self._text.release(now)
            self._speech.release(now)

    def _outcome(self) -> Outcome:
        if self._failure is not None:
            return self._failure
        if self._interrupted is not None:
            return Outcome(TurnState.INTERRUPTED, None, self._interrupted)
        speech = self.reply.speech_ended or SpeechEnded()
        return Outcome(TurnState.DONE, speech.code, speech.message)

    def _cancel(self, reason: str) -> None:
        for request in (self._text.request, self._speech.request):
            if request is not None and request.live:
                self.place.relay.cancel_group(request, reason)
        if self.reply.playback is not None:
            self.reply.playback.cut(reason)

    async def _note_played(self) -> None:
        """Note what was heard on a call of a reply that is cut off."""
        playback = self.reply.playback
        if playback is not None:
            await playback.settle()
            if playback.knows_what_was_heard:
                self.conversation.note_played(self.reply.number, playback.played)

    # -- the requests

    async def _make(self) -> None:
        reply, settings = self.reply, self.place.settings
        refused = self._open(self._text, self._text_submit(self.text_space))
        if refused is not None:
            self.fail(refused.code, refused.message, retryable=refused.retryable)
        elif reply.speech_request is not None and not settings.speech:  # since a restart or a reload
            self._end_speech(ErrorCode.SPACE_NOT_FOUND, "no space speaks any more ([talk] speech)")
        elif reply.speech_request is not None:
            refused = self._open(self._speech, self._speech_submit(settings.speech, reply.speech_request))
            if refused is not None:
                self._end_speech(refused.code, refused.message, retryable=refused.retryable)
            else:
                reply.speech = self._speech.request
                if self.play is not None:
                    reply.playback = self.play(reply.speech_request)
                reply.wake()
        patience_s = max(MIN_LOOK_S, self.place.relay.config.http.no_worker_wait_s)
        unserved_since: dict[str, float] = {}
        while True:
            self._changed = trio.Event()
            self._read_text()
            self._read_speech()
            due = self._look_for_workers(unserved_since, patience_s)
            if self._is_over:
                return
            with trio.move_on_at(due):
                await self._changed.wait()

    @property
    def _is_over(self) -> bool:
        reply = self.reply
        is_spoken = reply.speech_request is None or reply.speech_ended is not None
        return self._failure is not None or (reply.text_ended is not None and is_spoken)

    def _text_submit(self, space: str) -> Submit:
        messages: list[Value] = [dict(message) for message in self.messages]
        params = {**self.params, "messages": messages}
        return Submit(
            request_id=self.reply.text_request,
            space=space,
            params=params,
            priority=PRIORITY,
            group=self.reply.text_request,
        )

    def _speech_submit(self, space: str, request_id: str) -> Submit:
        return Submit(
            request_id=request_id,
            space=space,
            params=self._asked_speech(space),
            inputs={TEXT: InputInfo(from_=self.reply.text_request)},
            priority=PRIORITY,
            group=self.reply.text_request,
        )

    def _asked_speech(self, space: str) -> dict[str, Value]:
        """The params of the speech; where its engine can say how the mouth stands, it is asked to."""
        known = self.place.relay.spaces.get(space)
        has_visemes = known is not None and VISEMES in known.params.get("properties", {})
        return {**({VISEMES: True} if has_visemes else {}), **self.speech_params}

    def _open(self, held: HeldRequest, submit: Submit) -> Rejected | None:
        """Submit a request; or take it up again after a restart, when the store has it."""
        known = self.place.relay.requests.get(submit.request_id)
        if known is None:
            admitted = self.place.admission.submit(submit, self.principal, held)
            if isinstance(admitted, Rejected):
                return admitted
            known = admitted
        held.hold(known)
        return None

    def _look_for_workers(self, unserved_since: dict[str, float], patience_s: float) -> float:
        """End a request for which no worker has come for a while; returns when to look again."""
        relay, now = self.place.relay, trio.current_time()
        due = now + patience_s
        for held, is_over in (
            (self._text, self.reply.text_ended is not None),
            (self._speech, self.reply.speech_ended is not None),
        ):
            request = held.request
            if is_over or request is None or held.has_begun:
                continue
            space = request.submit.space
            if relay.workers.serving(space) or relay.scheduler.state.spaces[space].paused:
                unserved_since.pop(space, None)
                continue
            since = unserved_since.setdefault(space, now)
            if now < since + patience_s:
                due = min(due, since + patience_s)
                continue
            if request.entry.state is not State.QUEUED:  # it waits for the text: a worker may come until there is some
                continue
            message = f"no worker of space {space!r} is connected; say it again when there is one"
            if held is self._text:
                self.fail(ErrorCode.NO_WORKER, message, retryable=True)
            else:
                relay.cancel(request, message)
                self._end_speech(ErrorCode.NO_WORKER, message, retryable=True)
        return due

    # -- what comes

    def _read_text(self) -> None:
        """Take what has come of the text."""
        reply = self.reply
        if (refused := self._text.refusal) is not None:
            self.fail(refused.code, refused.message, retryable=refused.retryable)
        while self._failure is None and (frame := self._text.next_frame()) is not None:
            match frame:
                case Output(data=str() as text) if text:
                    if not self.conversation.delta(text):
                        message = f"the reply has more than {MAX_TURN_CHARS} characters"
                        self.fail(ErrorCode.RESULT_TOO_LARGE, message)
                        break
                    if not reply.text:
                        self.place.stats.first_word_s.add(trio.current_time() - reply.said_at)
                    reply.text = self._content
                    reply.wake()
                case Output(data=dict() as data) if "finish_reason" in data:
                    usage = data.get("usage")
                    reply.finish = TextEnded(str(data["finish_reason"])[:64], usage if isinstance(usage, dict) else {})
                case _ if frame.ENDS:
                    self._end_text(frame)

    @property
    def _content(self) -> str:
        making = self.conversation.making
        assert making is not None
        return making.content

    def _end_text(self, frame: Frame) -> None:
        if isinstance(frame, Failed):
            self.fail(frame.code, frame.message, retryable=frame.retryable)
        elif isinstance(frame, Cancelled):
            self.interrupt(frame.reason or "it was cancelled")
        elif not self.reply.text.strip():
            message = "the language model answered nothing; say it again, or see what its worker logs"
            self.fail(ErrorCode.ENGINE_FAILED, message, retryable=True)
        else:
            self.reply.text_ended = self.reply.finish
            self.reply.wake()

    def _read_speech(self) -> None:
        """Take what has come of the speech; its samples go to the listeners, which read it themselves."""
        conversation, reply = self.conversation, self.reply
        if (refused := self._speech.refusal) is not None and reply.speech_ended is None:
            reply.speech = None
            self._end_speech(refused.code, refused.message, retryable=refused.retryable)
        while reply.speech_ended is None and (frame := self._speech.next_frame()) is not None:
            match frame:
                case Started(format=made) if made is not None:
                    reply.format, self._sample_bytes = made, made.sample_bytes
                case Audio(pcm=pcm):
                    making = conversation.making
                    if making is not None and not making.samples:
                        self.place.stats.first_audio_s.add(trio.current_time() - reply.said_at)
                    conversation.speech(len(pcm) // self._sample_bytes)
                case Output(mark=dict() as mark):
                    conversation.mark(mark.get("text_end", 0), mark.get("sample", 0))
                case Completed():
                    self._end_speech()
                case Failed():
                    self._end_speech(frame.code, frame.message, retryable=frame.retryable)
                case Cancelled():
                    self._end_speech("cancelled", frame.reason or "its speech was cancelled")

    def _end_speech(self, code: str | None = None, message: str | None = None, *, retryable: bool = False) -> None:
        self.conversation.speech_ended(whole=code is None)
        if code is not None:
            count(self.place.stats.unspoken, code)
        self.reply.speech_ended = SpeechEnded(None if code is None else str(code), message, retryable)
        self.reply.wake()
