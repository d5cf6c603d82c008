"""All conversations: found by principal, user and session, kept for a while, and continued after a restart."""

import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal, TokenRegistry, reject_readonly
from relayd.core.admission import Admission
from relayd.store.base import StoreError
from relayd.store.records import DeleteTalk, Loaded, PutTalk, TalkRecord, TurnRecord
from relayd.talk.call import Call
from relayd.talk.call_listener import CallListener
from relayd.talk.calls import TALK, Calls, key_of
from relayd.talk.conversation import Conversation, TurnState
from relayd.talk.events import ReplyEnded
from relayd.talk.index import TalkIndex
from relayd.talk.place import Place
from relayd.talk.reply import Reply
from relayd.talk.session import DELETED, Session, not_stored
from relayd.talk.session import MAX_INSTRUCTIONS_CHARS as MAX_INSTRUCTIONS_CHARS
from relayd.talk.talk_row import talk_row

log = structlog.get_logger("relayd.talk")

#: Conversations of one principal that are stored, or kept in memory; the one in which nothing was said for longest goes
#: first. Those that are listed are the latest.
MAX_TALKS, MAX_IN_MEMORY, MAX_LISTED = 10_000, 500, 1_000
#: Of all conversations of one principal: they are in memory, whether somebody uses them or not.
MAX_ALL_INSTRUCTIONS_CHARS = 4_000_000
MAX_USER_CHARS = MAX_SESSION_CHARS = 128
USER_RULE = f"may have {MAX_USER_CHARS} printable characters"
#: How often old conversations are looked for.
PURGE_INTERVAL_S = 3_600.0
DAY_S = 86_400.0


@attrs.define(eq=False)
class Talk:
    """A conversation, as one principal has opened it."""

    session: Session
    principal: Principal

    def __attrs_post_init__(self) -> None:
        self.session.openers.add(self)

    @property
    def talk_id(self) -> str:
        """The id that relayd has given to it."""
        return self.record.talk_id

    @property
    def record(self) -> TalkRecord:
        """Whose it is, and since when."""
        return self.session.record

    @property
    def turns(self) -> Sequence[TurnRecord]:
        """What was said and replied, in order; a reply that is being made with what has come so far."""
        return self.session.turns

    def turn(self, number: int) -> TurnRecord | None:
        """Return one of them; None if there is none."""
        return self.session.turn(number)

    @property
    def replies(self) -> Mapping[int, Reply]:
        """The replies that wait or are being made, by the number of their turn; also those that others asked for."""
        return self.session.replies

    def say(
        self,
        text: str | None,
        *,
        interrupt: bool = False,
        speak: bool = True,
        params: Mapping[str, Value] | None = None,
        speech_params: Mapping[str, Value] | None = None,
        instructions: str | None = None,
        space: str | None = None,
        call: Call | None = None,
    ) -> Reply | Rejected:
        """Say something, and have it answered when what was said before is answered.

        Args:
            text: what the user says; None to have a reply to what is there.
            interrupt: end the reply that is being made.
            speak: whether the reply is spoken, too, where there is a space for it.
            params: more params of the request to the language model, such as `temperature`.
            speech_params: params of the request that speaks, such as `voice`.
            instructions: for this reply, instead of the conversation's.
            space: of the language model, instead of that of the settings.
            call: on which it is played, instead of that of the conversation.

        Returns:
            The reply, whose listeners hear of it when what was said is stored; or why it is not answered.
        """
        return self.session.say(
            self.principal,
            text,
            interrupt=interrupt,
            speak=speak,
            params=params or {},
            speech_params=speech_params or {},
            instructions=instructions,
            space=space,
            call=call,
        )

    def cancel(self, reply: Reply, reason: str = "cancelled") -> bool:
        """End one reply, and keep what was heard of it; False if it has ended."""
        return not self.principal.readonly and self.session.cancel(reply, reason)

    def interrupt(self, reason: str = "interrupted") -> bool:
        """End the reply that is being made or played, and keep what was heard of it; False if there is none."""
        return not self.principal.readonly and self.session.interrupt(reason)

    async def interrupt_for_good(self, reason: str = "interrupted", played: int | None = None) -> bool:
        """Do the same, and wait until it is stored: it holds whatever happens to the relay.

        Args:
            reason: why.
            played: samples of its speech that were played, if it is on no call; None if all that had come were.

        Returns:
            Whether it was in time.
        """
        reply = next(iter(self.replies.values()), None)  # they are made one after the other
        if not self.interrupt(reason):
            return False
        if reply is None:  # it was only played
            await self.session.wait_silent()
            return True
        if played is not None and reply.playback is None:
            self.note_played(reply.number, played)
        ended = await reply.wait_ended()
        return isinstance(ended, ReplyEnded) and ended.turn.state == TurnState.INTERRUPTED

    def note_played(self, number: int, samples: int) -> bool:
        """Say how many samples of the speech of a reply were played; whether that changes one that has ended."""
        return not self.principal.readonly and self.session.note_played(number, samples)

    async def add(self, role: str, content: str) -> TurnRecord | Rejected:
        """Add a turn that is not answered: of the `user`, the `assistant` or the `system`."""
        return reject_readonly() if self.principal.readonly else await self.session.add(role, content)

    def delete_turn(self, number: int) -> bool:
        """Delete a turn that has ended; False if there is none."""
        return not self.principal.readonly and self.session.delete_turn(number)


@attrs.define(eq=False)
class Talks:
    """All conversations; made by `open_talks`."""

    place: Place
    _index: TalkIndex = attrs.field(factory=TalkIndex)
    #: By their ids: those that are in use, whether kept or not; and all of those that are only in memory.
    _sessions: WeakValueDictionary[str, Session] = attrs.field(factory=WeakValueDictionary)
    _kept: dict[str, Session] = attrs.field(factory=dict)

    # -- for operators

    def in_use(self) -> list[str]:
        """Return the ids of those that somebody has opened, or that are being answered."""
        return [talk_id for talk_id, session in self._sessions.items() if session.is_in_use]

    def row(self, talk_id: str) -> dict[str, Value] | None:
        """Return the row of one; None if it is not in use."""
        session = self._sessions.get(talk_id)
        return talk_row(session) if session is not None and session.is_in_use else None

    async def end_replies(self, talk_id: str, reason: str) -> int | None:
        """See `TalksPort.end_replies`."""
        session = self._sessions.get(talk_id)
        return await session.end_replies(reason) if session is not None and session.is_in_use else None

    # -- finding one

    async def open(
        self,
        principal: Principal,
        session_id: str | None,
        user: str = "",
        *,
        create: bool = True,
        instructions: str | None = None,
    ) -> Talk | Rejected:
        """Open the conversation of a session, and begin it if there is none.

        Args:
            principal: whose it is.
            session_id: the id that the client has given to it; None to begin one with an id of the relay's.
            user: which of the principal's users it is with.
            create: whether to begin it if there is none.
            instructions: what the model is told first; None leaves it as it is.

        Returns:
            The conversation; or why there is none: the id is not one, there is no conversation, or it cannot be read.
        """
        is_made, session_id = session_id is None, session_id or f"talk-{secrets.token_hex(12)}0"
        record = self._index.of(principal.name, user, session_id)
        if refusal := self._refuse_names(session_id, user, instructions, is_known=is_made or record is not None):
            return refusal
        if record is None:
            if not create:
                message = f"there is no conversation {session_id!r}; begin it first (POST /v1/talks)"
                return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, message, details={"session": "is not known"})
            if principal.readonly:
                return reject_readonly()
            record = self._begin(principal.name, user, session_id)
        session = await self._session_of(record)
        if isinstance(session, Session) and instructions is not None and not principal.readonly:
            session.change(instructions=instructions)
            self._make_room(session.record)
            self.place.post(PutTalk(session.record))
        return session if isinstance(session, Rejected) else Talk(session, principal)

    async def open_named(
        self, principal: Principal, name: str, user: str = "", *, create: bool = False
    ) -> Talk | Rejected:
        """Open the conversation of a session, or the one with this id; otherwise as `open`."""
        known = self.find(principal, name, user)
        session_id, user = (known.session, known.user) if known is not None else (name, user)
        return await self.open(principal, session_id, user, create=create)

    def open_unkept(self, principal: Principal) -> Talk | Rejected:
        """Begin a conversation that nobody else can find; whoever has begun it closes its session in the end."""
        if principal.readonly:
            return reject_readonly()
        record = _new_record(principal.name, "", "")
        place = attrs.evolve(self.place, kept=False)
        session = Session(place, record, Conversation(record.talk_id), lambda _record: None)
        self._sessions[record.talk_id] = session
        return Talk(session, principal)

    def _refuse_names(self, session_id: str, user: str, instructions: str | None, *, is_known: bool) -> Rejected | None:
        details: dict[str, Value] = {}
        is_usual = len(session_id) <= MAX_SESSION_CHARS and session_id.isprintable()
        if not is_known and not (is_usual and re.fullmatch(self.place.settings.session_id_pattern, session_id)):
            details["session"] = "is not an id of a session ([talk] session_id_pattern)"
        if not is_user(user):
            details["user"] = USER_RULE
        if instructions is not None and (len(instructions) > MAX_INSTRUCTIONS_CHARS or not _is_text(instructions)):
            details["instructions"] = f"may have {MAX_INSTRUCTIONS_CHARS} characters"
        if not details:
            return None
        message = "; ".join(f"{name} {what}" for name, what in details.items())
        return Rejected.because(ErrorCode.INVALID_PARAMS, message, details=details)

    def find(self, principal: Principal, name: str, user: str = "") -> TalkRecord | None:
        """Return one of a principal's conversations: by its session and user, or by its id."""
        return self._index.find(principal.name, name, user)

    async def settle(self) -> Rejected | None:
        """Wait until what was begun, changed or deleted is stored; returns why it is not."""
        try:
            await self.place.commit()
        except StoreError as fault:
            return Rejected.because(fault.code, not_stored(fault))
        return None

    def list(self, principal: Principal, user: str | None = None) -> list[TalkRecord]:
        """Return a principal's conversations, the one in which something was said last first."""
        return self._index.all_of(principal.name, user)[:MAX_LISTED]

    def _begin(self, principal: str, user: str, session_id: str) -> TalkRecord:
        record = _new_record(principal, user, session_id)
        self._remember(record)
        self._make_room(record)
        self.place.post(PutTalk(record))
        return record

    def _make_room(self, record: TalkRecord) -> None:
        """Forget the oldest others of a principal until it has no more than it may have."""
        index, principal = self._index, record.principal
        most = MAX_TALKS if self.place.is_durable else MAX_IN_MEMORY
        if index.count(principal) <= most and index.instructions_chars(principal) <= MAX_ALL_INSTRUCTIONS_CHARS:
            return
        for oldest in reversed(index.all_of(principal)):
            is_over = index.count(principal) > most
            if not is_over and index.instructions_chars(principal) <= MAX_ALL_INSTRUCTIONS_CHARS:
                return
            if (is_over or oldest.instructions) and oldest.talk_id != record.talk_id and self._is_idle(oldest):
                self._forget(oldest, "there are too many conversations")

    def _remember(self, record: TalkRecord) -> None:
        self._index.put(record)
        self.place.stats.talks = len(self._index)

    async def _session_of(self, record: TalkRecord) -> Session | Rejected:
        session = self._sessions.get(record.talk_id)
        if session is not None:
            return session
        try:
            turns = await self.place.relay.store.read_turns(record.talk_id) if self.place.is_durable else ()
        except StoreError as fault:
            log.error("conversation cannot be read", talk=record.talk_id, why=str(fault))
            return Rejected.because(fault.code, "the relay cannot read this conversation; see its log")
        session = self._sessions.get(record.talk_id)  # somebody else may have been faster
        if session is None and self._index.find(record.principal, record.talk_id, record.user) is None:
            return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, DELETED)
        if session is None:
            spoken = self.place.spoken_in(record.talk_id)
            conversation = Conversation(record.talk_id, {turn.number: turn for turn in turns}, spoken=spoken)
            session = self._sessions[record.talk_id] = Session(self.place, record, conversation, self._remember)
            if not self.place.is_durable:
                self._kept[record.talk_id] = session
        return session

    # -- deleting them

    async def delete(self, talk: Talk) -> Rejected | None:
        """Delete a conversation with all of its turns; returns why it cannot be."""
        if talk.principal.readonly:
            return reject_readonly()
        self._forget(talk.record, "the conversation was deleted")
        return await self.settle()

    def _forget(self, record: TalkRecord, why: str) -> None:
        self._index.remove(record)
        session = self._sessions.pop(record.talk_id, None)
        self._kept.pop(record.talk_id, None)
        self.place.spoken.pop(record.talk_id, None)
        if session is not None:
            session.close(why)
        self.place.post(DeleteTalk(record.talk_id))
        self.place.stats.talks = len(self._index)

    def _is_idle(self, record: TalkRecord) -> bool:
        session = self._sessions.get(record.talk_id)
        return session is None or session.is_idle

    def purge(self, now: float) -> int:
        """Delete those in which nothing was said for `retain_days`; returns how many."""
        oldest = now - self.place.settings.retain_days * DAY_S
        old = list(filter(self._is_idle, self._index.older_than(oldest)))
        for record in old:
            self._forget(record, "it was old")
        return len(old)

    async def serve(self) -> None:
        """Delete old conversations, until cancelled."""
        while True:
            try:
                if deleted := self.purge(time.time()):
                    log.info("old conversations deleted", talks=deleted)
            except Exception:
                log.exception("internal error in the retention of conversations")
            await trio.sleep(PURGE_INTERVAL_S)

    def listen(self, talk: Talk, call: Call) -> None:
        """Take what is said on the call of a conversation for what is said there, if somebody hears it."""
        if call.listens:
            self.place.nursery.start_soon(CallListener(talk, call).run)

    # -- after a restart

    async def restore(self, loaded: Loaded) -> None:
        """Know the stored conversations again, and go on with their calls, and their replies that have not ended."""
        self.place.calls.restore(self.place.principal_named)
        if not self.place.is_durable:  # what was stored before is kept as long as it would have been
            oldest = time.time() - self.place.settings.retain_days * DAY_S
            old = [DeleteTalk(record.talk_id) for record in loaded.talks if record.touched_at < oldest]
            self.place.relay.store.post(*old)
            return
        for record in loaded.talks:
            self._remember(record)
        unended = {turn.talk_id for turn in loaded.unended_turns}
        for record in loaded.talks:
            if record.talk_id in unended:
                await self._resume(record)
        await self._listen_again(loaded.talks)
        if loaded.talks:
            log.info("conversations restored", talks=len(loaded.talks), replies=len(loaded.unended_turns))

    async def _listen_again(self, records: Sequence[TalkRecord]) -> None:
        """Listen to the calls that have gone on."""
        calls = {(call.principal.name, call.key): call for call in self.place.calls.all_with(TALK) if call.listens}
        for record in records if calls else ():
            call = calls.get((record.principal, key_of(TALK, record.talk_id)))
            session = await self._session_of(record) if call is not None else None
            if call is not None and isinstance(session, Session):
                self.listen(Talk(session, call.principal), call)

    async def _resume(self, record: TalkRecord) -> None:
        try:
            session = await self._session_of(record)
            if isinstance(session, Session):
                session.resume(self.place.principal_named(record.principal))
        except Exception:
            log.exception("internal error in conversation", talk=record.talk_id)


def is_user(name: str) -> bool:
    """Whether this may be the id of a user."""
    return len(name) <= MAX_USER_CHARS and name.isprintable()


def _new_record(principal: str, user: str, session_id: str) -> TalkRecord:
    now = time.time()
    return TalkRecord(
        talk_id=secrets.token_hex(16),
        principal=principal,
        user=user,
        session=session_id,
        created_at=now,
        touched_at=now,
    )


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@asynccontextmanager
async def open_talks(admission: Admission, tokens: TokenRegistry) -> AsyncIterator[Talks]:
    """Serve conversations until the end of the block; at first, none is known.

    Cancellation: leaves the replies that are being made; they are continued after a restart.
    """
    async with trio.open_nursery() as nursery:
        talks = Talks(Place(admission, tokens, nursery, Calls(admission, nursery)))
        nursery.start_soon(talks.serve)
        admission.relay.talks = talks
        yield talks
        admission.relay.talks = None
        nursery.cancel_scope.cancel()
