"""A session: one conversation with its replies, and the task that makes them one after the other."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import attrs
import msgpack
import structlog
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal, reject_readonly
from relayd.core.principals import RETRY_S, is_limited, limits_of
from relayd.store.base import StoreError
from relayd.store.records import Change, DeleteTurns, PutHeard, PutTalk, PutTurn, TalkRecord, TurnRecord
from relayd.talk.call import Call
from relayd.talk.calls import TALK, key_of
from relayd.talk.conversation import MAX_WAITING, Conversation, TurnState
from relayd.talk.events import ReplyEnded, TurnFailed
from relayd.talk.place import Place
from relayd.talk.playback import Playback, Playbacks
from relayd.talk.reply import Reply
from relayd.talk.turn import Outcome, Turn

log = structlog.get_logger("relayd.talk")

#: Size of one text in UTF-8; with the instructions and what a prompt takes besides, it fits into a request.
MAX_TEXT_BYTES = 32_000
MAX_INSTRUCTIONS_CHARS = 4_000
#: Size of the params of both requests of a turn.
MAX_PARAMS_BYTES = 8_000
#: Of one conversation that is stored, or kept in memory; the oldest turns go first.
MAX_TALK_CHARS, MAX_CHARS_IN_MEMORY = 1_000_000, 100_000
#: Code of a reply that was cancelled while it waited.
CANCELLED = "cancelled"
DELETED = "this conversation was deleted; begin another one"
NOT_KEPT = 'nothing is kept of conversations here ([talk] history = "none"); give what is to be known with the text'
BROKEN = "internal error in this turn; see the relay's log"


@attrs.define(eq=False)
class Session:
    """A conversation and what is made of it, shared by all who have opened it.

    Args:
        record: as the store has it.
        remember: called with the record when it has changed.
    """

    place: Place
    record: TalkRecord
    conversation: Conversation
    remember: Callable[[TalkRecord], None]
    #: Number of the turn -> the reply, until it has ended.
    replies: dict[int, Reply] = attrs.field(factory=dict)
    is_deleted: bool = False
    #: Those who have opened it.
    openers: WeakSet[object] = attrs.field(factory=WeakSet)
    #: Number of the turn -> who asked for the reply.
    _principals: dict[int, Principal] = attrs.field(factory=dict)
    _turn: Turn | None = None
    _playing: Playbacks = attrs.field(init=False)
    _is_serving: bool = False
    #: Whether the task has not begun yet; and why the reply that it begins with is interrupted already.
    _is_beginning: bool = False
    _interrupted: str | None = None

    def __attrs_post_init__(self) -> None:
        self._playing = Playbacks(self.place.nursery, self.note_played)

    @property
    def is_idle(self) -> bool:
        """Whether no reply waits or is being made."""
        return not self.replies

    @property
    def is_in_use(self) -> bool:
        """Whether somebody has opened it, it is being answered, or what was replied is played."""
        return not self.is_deleted and bool(self.replies or self.openers or self._playing)

    @property
    def is_playing(self) -> bool:
        """Whether a reply is being played on a call."""
        return bool(self._playing)

    @property
    def call_key(self) -> str:
        """The key of the call that is one of this conversation."""
        return key_of(TALK, self.record.talk_id)

    def change(self, **fields: Any) -> None:
        """Change its record; the next commit stores it."""
        self.record = attrs.evolve(self.record, **fields)
        if not self.is_deleted:
            self.remember(self.record)

    @property
    def turns(self) -> list[TurnRecord]:
        """The turns, in order; a reply that is not stored as ended has what has come of it so far."""
        return [self._as_it_is(turn) for turn in self.conversation.turns.values()]

    def turn(self, number: int) -> TurnRecord | None:
        """Return one of the turns; None if there is none."""
        turn = self.conversation.turns.get(number)
        return None if turn is None else self._as_it_is(turn)

    def _as_it_is(self, turn: TurnRecord) -> TurnRecord:
        reply, making = self.replies.get(turn.number), self.conversation.making
        if reply is None:
            return turn
        if making is None or making.number != turn.number:
            return turn if not turn.ended else attrs.evolve(turn, state=TurnState.SPEAKING, code=None, message=None)
        return attrs.evolve(turn, state=making.state, content=making.content)

    # -- what is said

    def say(
        self,
        principal: Principal,
        text: str | None,
        *,
        interrupt: bool,
        speak: bool,
        params: Mapping[str, Value],
        speech_params: Mapping[str, Value],
        instructions: str | None,
        space: str | None,
        call: Call | None,
    ) -> Reply | Rejected:
        """See `Talk.say`."""
        call = self.place.calls.find(principal, self.call_key) if call is None else call
        asked = {
            "params": dict(params),
            "speech": dict(speech_params),
            "instructions": instructions,
            "space": space,
            "call": call.key if call is not None else None,
        }
        try:
            options = msgpack.packb(asked)
        except (ValueError, OverflowError, TypeError) as fault:
            return Rejected.because(ErrorCode.INVALID_PARAMS, f"the params of this turn cannot be sent: {fault}")
        params_bytes = len(options) - len((instructions or "").encode())
        if len(instructions or "") > MAX_INSTRUCTIONS_CHARS or params_bytes > MAX_PARAMS_BYTES:
            message = (
                f"a turn may have instructions of {MAX_INSTRUCTIONS_CHARS} characters, and {MAX_PARAMS_BYTES} bytes of "
                "params"
            )
            return Rejected.because(ErrorCode.INVALID_PARAMS, message)
        if refusal := self._refuse(principal, text):
            return refusal
        settings = self.place.settings
        goes_on = (interrupt or settings.barge_in == "always") and self.interrupt("the user goes on")
        interrupted = next(iter(self.replies.values()), None) if goes_on else None  # they are made one after the other
        now = time.time()
        turns = self.conversation.say(
            text,
            now,
            text_request=secrets.token_hex(16),
            speech_request=secrets.token_hex(16) if speak and settings.speech else None,
            options=options,
        )
        self.change(touched_at=now)
        reply = self._add_reply(turns[-1], principal, tuple(turn.number for turn in turns[:-1]))
        self.place.nursery.start_soon(self._store_said, turns, reply, interrupted)
        self._go_on()
        return reply

    def _refuse(self, principal: Principal, text: str | None) -> Rejected | None:
        if principal.readonly:
            return reject_readonly()
        if self.is_deleted:
            return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, DELETED)
        if text is not None and (refusal := _refuse_text(text)):
            return refusal
        if self.conversation.waiting >= MAX_WAITING:
            message = f"{MAX_WAITING} texts wait for their reply in this conversation; wait for one of them"
            return Rejected.because(ErrorCode.QUEUE_FULL, message, retry_after_s=RETRY_S)
        most = limits_of(principal, self.place.relay.config.limits.principal).max_queued
        if is_limited(principal) and self.place.unended[principal.name] >= most:
            message = f"{principal.name!r} may wait for {most} replies in all conversations; wait for one of them"
            return Rejected.because(ErrorCode.QUEUE_FULL, message, retry_after_s=RETRY_S)
        return None

    def _add_reply(self, turn: TurnRecord, principal: Principal, said: tuple[int, ...] = ()) -> Reply:
        assert turn.text_request is not None
        requests, now = (turn.text_request, turn.speech_request), trio.current_time()
        reply = Reply(turn.number, *requests, said_at=now, said=said, on_played=self.note_played)
        self.replies[turn.number] = reply
        self._principals[turn.number] = principal
        self.place.count(self.record.principal, 1)
        return reply

    async def _store_said(self, turns: Sequence[TurnRecord], reply: Reply, interrupted: Reply | None) -> None:
        """Store what was said, that it will be answered, and the end of the reply that it has interrupted.

        The reply may be on its way meanwhile.
        """
        try:
            await self._commit(*(PutTurn(self.conversation.turns.get(turn.number, turn)) for turn in turns))
        except StoreError as fault:
            self._fail_unstored(reply, fault)
        else:
            if interrupted is not None:
                await interrupted.wait_ended()
            reply.is_stored = True
            reply.wake()

    def _fail_unstored(self, reply: Reply, fault: StoreError) -> None:
        log.error("what was said is not stored", talk=self.record.talk_id, why=str(fault))
        message = not_stored(fault)
        if self._turn is not None and self._turn.reply is reply:
            self._turn.fail(fault.code, message, retryable=fault.code.retryable)
        elif self.conversation.refuse(reply.number, fault.code, message) is not None:
            self._forget(reply)
            self._drop(reply)
        reply.end(TurnFailed(fault.code, message, fault.code.retryable))

    async def add(self, role: str, content: str) -> TurnRecord | Rejected:
        """See `Talk.add`."""
        if refusal := _refuse_text(content):
            return refusal
        if self.is_deleted:
            return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, DELETED)
        if self.place.history == "none":
            return Rejected.because(ErrorCode.FORBIDDEN, NOT_KEPT)
        turn = self.conversation.add(role, content, time.time())
        try:
            await self._commit(PutTurn(turn), *self._trim())
        except StoreError as fault:
            self.conversation.delete(turn.number)
            return Rejected.because(fault.code, not_stored(fault))
        return turn

    def delete_turn(self, number: int) -> bool:
        """See `Talk.delete_turn`."""
        deleted = self.conversation.delete(number)
        if deleted:
            self.place.post(DeleteTurns(self.record.talk_id, number, number))
        return deleted

    def note_played(self, number: int, samples: int) -> bool:
        """See `Talk.note_played`."""
        turn = self.conversation.note_played(number, max(0, samples))
        if turn is not None:
            self.place.post(PutHeard(turn.talk_id, number, turn.heard_chars))
        return turn is not None

    def interrupt(self, reason: str) -> bool:
        """See `Talk.interrupt`."""
        is_playing = self._playing.cut(reason)
        if self._turn is not None:
            self._turn.interrupt(reason)
        elif self._is_beginning:
            self._interrupted = reason
        return self._turn is not None or self._is_beginning or is_playing

    async def wait_silent(self) -> None:
        """Wait until what was interrupted is not played any more, and it is stored what was heard of it."""
        await self._playing.wait_cut()
        await self.place.commit()

    def cancel(self, reply: Reply, reason: str) -> bool:
        """See `Talk.cancel`."""
        if self._turn is not None and self._turn.reply is reply:
            self._turn.interrupt(reason)
            return True
        waited = self._refuse_waiting(reply, CANCELLED, reason)
        if waited is not None:
            self.place.post(PutTurn(waited))
            if self.place.history == "none":
                self._drop(reply)
        return waited is not None

    async def end_replies(self, reason: str) -> int:
        """End the reply that is being made and those that wait, and wait until that is stored; returns how many."""
        replies = list(self.replies.values())
        for reply in replies:
            self.cancel(reply, reason)
        if not replies and self.interrupt(reason):  # it is only played
            await self.wait_silent()
            return 1
        for reply in replies:
            await reply.wait_ended()
        return len(replies)

    def close(self, message: str) -> None:
        """End all of its replies, because it is deleted."""
        self.is_deleted = True
        for reply in list(self.replies.values()):
            self._refuse_waiting(reply, ErrorCode.REQUEST_NOT_FOUND, message)
        self.interrupt(message)

    def _refuse_waiting(self, reply: Reply, code: str, message: str) -> TurnRecord | None:
        """End a reply that waits; None if it does not."""
        turn = self.conversation.refuse(reply.number, code, message)
        if turn is not None:
            self._forget(reply)
            reply.end(TurnFailed(code, message))
        return turn

    # -- the task

    def resume(self, principal: Principal) -> None:
        """Go on with the replies that the store has as waiting."""
        for turn in list(self.conversation.turns.values()):
            if not turn.ended:
                self._add_reply(turn, principal).is_stored = True
        self._go_on()

    def _go_on(self) -> None:
        if not self._is_serving:
            self._is_serving = self._is_beginning = True
            self.place.nursery.start_soon(self._serve, name=f"talk {self.record.talk_id}")

    async def _serve(self) -> None:
        """Make the replies that wait, one after the other."""
        self._is_beginning = False
        try:
            while not self._is_put_off and (turn := self.conversation.begin()) is not None:
                reply = self.replies[turn.number]
                try:
                    await self._make(turn, reply)
                except Exception:
                    log.exception("internal error in conversation", talk=self.record.talk_id)
                    reply.end(TurnFailed(ErrorCode.INTERNAL, BROKEN, retryable=True))
                finally:
                    self._forget(reply)
        finally:
            self._is_serving = False

    @property
    def _is_put_off(self) -> bool:
        """Whether what waits is answered after the restart that is about to come."""
        return self.place.relay.draining.is_set() and self.place.is_durable

    async def _make(self, turn: TurnRecord, reply: Reply) -> None:
        outcome = Outcome(TurnState.FAILED, ErrorCode.INTERNAL, BROKEN, retryable=True)
        try:
            self._is_beginning = True
            await self._playing.wait_cut()  # the prompt has what was heard
            self._is_beginning = False
            self._turn = self._begin(turn, reply)
            if self._interrupted is not None:
                self._turn.interrupt(self._interrupted)
            self._interrupted = None
            outcome = await self._turn.run()
        except Exception:
            log.exception("internal error in conversation", talk=self.record.talk_id)
        finally:
            self._turn = None
            ended = self.conversation.end(outcome.state, outcome.code, outcome.message)
        await reply.stored()
        if reply.ended is not None:  # what was said could not be stored
            self._drop(reply)
            return
        ended, failure = await self._store_end(ended, outcome)
        if self.place.history == "none":
            self._drop(reply)
        reply.end(failure or ReplyEnded(ended))

    def _begin(self, turn: TurnRecord, reply: Reply) -> Turn:
        settings = self.place.settings
        options = msgpack.unpackb(turn.options or b"\x80")
        instructions = options.get("instructions")
        if instructions is None:
            instructions = self.record.instructions or settings.instructions
        messages = self.conversation.prompt(turn.number, instructions, settings.max_context_chars)
        principal = self._principals[turn.number]
        params, speech_params = options.get("params", {}), options.get("speech", {})
        space = options.get("space") or settings.reply
        call = self.place.calls.find(principal, options.get("call") or "")

        def play(speech: str) -> Playback:
            assert call is not None
            return self._playing.start(turn.number, call, principal, speech, turn.text_request or speech)

        return Turn(
            self.place,
            principal,
            self.conversation,
            reply,
            space,
            messages,
            params,
            speech_params,
            play=play if call is not None else None,
        )

    async def _store_end(self, ended: TurnRecord, outcome: Outcome) -> tuple[TurnRecord, TurnFailed | None]:
        """Store how a reply has ended; returns it, and the failure that its listeners are told, if it is one."""
        ended = self.conversation.turns.get(ended.number, ended)  # meanwhile somebody may have said what was heard
        try:
            await self._commit(PutTurn(ended), *self._trim())
        except StoreError as fault:
            log.error("a reply is not stored", talk=self.record.talk_id, why=str(fault))
            message = not_stored(fault)
            ended = attrs.evolve(ended, state=TurnState.FAILED, code=fault.code, message=message)
            if ended.number in self.conversation.turns:
                self.conversation.turns[ended.number] = ended
            self.place.post(PutTurn(ended))
            outcome = Outcome(TurnState.FAILED, fault.code, message, fault.code.retryable)
        turns = self.place.stats.turns
        turns[str(ended.state)] = turns.get(str(ended.state), 0) + 1
        if outcome.state is not TurnState.FAILED:
            return ended, None
        return ended, TurnFailed(outcome.code or ErrorCode.INTERNAL, outcome.message or "", outcome.retryable)

    async def _commit(self, *changes: Change) -> None:
        if not self.is_deleted:
            await self.place.commit(PutTalk(self.record), *changes)

    def _trim(self) -> list[Change]:
        most_chars = MAX_TALK_CHARS if self.place.is_durable else MAX_CHARS_IN_MEMORY
        last = self.conversation.trim(self.place.settings.max_turns, most_chars)
        return [] if last is None else [DeleteTurns(self.record.talk_id, 0, last)]

    def _forget(self, reply: Reply) -> None:
        """Count a reply as ended."""
        if self.replies.pop(reply.number, None) is not None:
            self._principals.pop(reply.number, None)
            self.place.count(self.record.principal, -1)

    def _drop(self, reply: Reply) -> None:
        """Delete a reply that has ended, and what it is a reply to."""
        for number in (reply.number, *reply.said):
            self.conversation.delete(number)


def _refuse_text(text: str) -> Rejected | None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return Rejected.because(ErrorCode.INVALID_PARAMS, "the text has half a surrogate pair; send whole characters")
    if not text.strip():
        return Rejected.because(ErrorCode.INVALID_PARAMS, "the text is empty; say something")
    if size > MAX_TEXT_BYTES:
        message = f"the text has {size} bytes; a turn may have {MAX_TEXT_BYTES}: say it in parts"
        return Rejected.because(ErrorCode.INPUT_TOO_LARGE, message)
    return None


def not_stored(fault: StoreError) -> str:
    """Say to a client that a conversation cannot be stored, and what to do."""
    if fault.code is ErrorCode.STORAGE_FULL:
        return "the relay has no space left to store the conversation; say it again later"
    return "the relay could not store the conversation (its log says why); say it again later"
