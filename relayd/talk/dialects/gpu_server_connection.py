"""One connection of a client of the GPU server: reads its messages in order, and answers each once."""

import re
from collections.abc import Awaitable, Callable
from datetime import datetime

import attrs
import structlog
import trio

from protocol.audio.encoder import AudioExtraMissing
from protocol.wire.messages import Rejected
from relayd.auth.tokens import Principal
from relayd.http.audio.encoded_results import EncodedResults
from relayd.talk.call import Call
from relayd.talk.calls import USER, key_of
from relayd.talk.dialects.gpu_server_fields import (
    Message,
    Refused,
    avatar_of,
    candidate_of,
    parse,
    reply_json,
    session_of,
    user_of,
)
from relayd.talk.dialects.json_messages import shown
from relayd.talk.dialects.json_socket import JsonSocket
from relayd.talk.dialects.whole import whole_reply
from relayd.talk.events import TurnFailed
from relayd.talk.reply import Reply
from relayd.talk.talks import MAX_TALKS, Talk, Talks

log = structlog.get_logger("relayd.talk.gpu_server")

#: Its name in the metrics.
DIALECT = "gpu_server"
#: Messages of one connection that may wait for their answers, also if their replies have ended.
MAX_UNANSWERED = 1_000
NO_CALLS = "WebRTC calls are not supported by this server; text_webrtc is answered with text and audio all the same"
#: Of a message with audio, beside the audio.
OTHER_BYTES = 1024 * 1024


@attrs.define(eq=False)
class GpuServerConnection:
    """One connection.

    Args:
        name: the id in its path.
        user: whose it is; None if it is that of a session.
        session: of which it is; None if it is that of a user.
    """

    socket: JsonSocket
    talks: Talks
    encoded: EncodedResults
    principal: Principal
    name: str
    user: str | None
    session: str | None
    #: Users and ids of sessions that were used here, for the log.
    _contexts: set[tuple[str, str]] = attrs.field(factory=set)
    #: Those that it keeps.
    _calls: set[Call] = attrs.field(factory=set)
    #: Messages that have a reply, and were not answered yet.
    _unanswered: int = 0
    #: One reply with its audio is in memory at a time; others stay in their logs until it is sent.
    _answering: trio.Lock = attrs.field(factory=trio.Lock)

    @property
    def _handlers(self) -> dict[str, Callable[[Message, trio.Nursery], Awaitable[None]]]:
        return {
            "text": self._say,
            "text_webrtc": self._say,
            "webrtc_offer": self._offer,
            "webrtc_ice_candidate": self._candidate,
            "interrupt": self._interrupt,
        }

    # -- its course

    def log_mode(self) -> None:
        """Log whose connection it is."""
        if self.user is not None:
            log.info("User-based connection mode:", user_id=self.user)
        else:
            log.info("Session-based connection mode:", session_id=self.session)

    async def run(self) -> None:
        """Serve it until it is closed; replies that are being made go on without it."""
        self._log_connected()
        self._call_of(self.user or "")  # it may have gone on without a connection
        try:
            with self.talks.place.stats.connected(DIALECT):
                async with trio.open_nursery() as nursery:
                    async for data in self.socket.messages():
                        await self._handle_message(data, nursery)
                    nursery.cancel_scope.cancel()
        finally:
            for call in self._calls:
                call.let_go(self)
            if self.user is not None:
                log.info("Connection cleaned up (user-based):", connection_id=self.name)
            else:
                log.info("Connection cleaned up (session-based):", session_id=self.session)

    def _log_connected(self) -> None:
        if self.user is not None:
            log.info("WebSocket connected (user-based):", connection_id=self.name, user_id=self.user)
        else:
            tutor = re.search(r"[0-9]+$", self.talks.place.settings.avatar)
            fields = {"tutor_id": int(tutor[0])} if tutor else {}
            log.info("WebSocket connected (session-based):", session_id=self.session, **fields)

    async def _handle_message(self, data: str | bytes, nursery: trio.Nursery) -> None:
        message: Message = {}
        try:
            message = parse(data)
            handler = self._handlers.get(kind) if isinstance(kind := message.get("type"), str) else None
            if handler is None:
                known = ", ".join(self._handlers)
                raise Refused("type is required" if kind is None else f"Unknown type: {shown(kind)}; known: {known}")
            await handler(message, nursery)
        except Refused as refusal:
            await self._refuse(message, str(refusal))

    async def _answer(self, message: Message, answer: Message) -> None:
        """Answer a message; with its `message_id`, if it has one."""
        known: Message = {"timestamp": f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S}"}
        if isinstance(number := message.get("message_id"), str | int):
            known["message_id"] = number
        await self.socket.send(answer | known)

    async def _refuse(self, message: Message, content: str) -> None:
        log.warning("message refused", connection_id=self.name, why=content)
        await self._answer(message, {"type": "error", "content": content})

    # -- the messages

    async def _say(self, message: Message, nursery: trio.Nursery) -> None:
        """Say something in a session; the reply is answered when it is whole, in the order of the session."""
        is_streaming = message["type"] == "text_webrtc"
        if self._unanswered >= MAX_UNANSWERED:
            raise Refused(f"{MAX_UNANSWERED} messages wait for their answers on this connection; read some of them")
        session = session_of(message, self.session)
        user, avatar = self._user_of(message, required=is_streaming), avatar_of(message, required=is_streaming)
        content = message.get("content")
        if not isinstance(content, str):
            raise Refused("content is required" if content is None else "content must be text")
        talk = await self._open(session, user, create=self.talks.place.settings.sessions == "open")
        if is_streaming:
            ids = {"engine_session_id": session, "session_id": session}
            log.info("Processing text with WebRTC streaming:", avatar_id=avatar, user_id=user, **ids)
        interrupts = message.get("interrupt") is True or self.talks.place.settings.barge_in == "always"
        call = self._call_of(user) if is_streaming else None
        reply = self.talks.place.refuse_too_fast(self.principal) or talk.say(content, interrupt=interrupts, call=call)
        if isinstance(reply, Rejected):
            raise Refused(reply.message)
        if interrupts:
            _note_nothing_played(talk)
        self._unanswered += 1
        nursery.start_soon(self._reply, message, reply, is_streaming)

    async def _reply(self, message: Message, reply: Reply, is_streaming: bool) -> None:
        await reply.wait_ended()
        async with self._answering:
            self._unanswered -= 1
            try:
                async with self.encoded.encoding(self.principal.name):
                    whole = await whole_reply(reply, self.talks.place.settings.audio_format)
            except AudioExtraMissing as fault:
                await self._refuse(message, str(fault))
                return
            if isinstance(whole, TurnFailed):
                await self._refuse(message, whole.message)
                return
            most = self.talks.place.relay.config.limits.max_backlog_bytes - OTHER_BYTES
            await self._answer(message, reply_json(whole, most))
            if is_streaming:
                log.info("WebRTC streaming response sent")

    def _key_of(self, user: str) -> str:
        return key_of(USER, *(("session", self.name) if self.user is None else ("user", user)))

    def _call_of(self, user: str) -> Call | None:
        """Return the call of a user, or of its session, and keep it; from another connection, too."""
        call = self.talks.place.calls.find(self.principal, self._key_of(user))
        if call is not None and call not in self._calls:
            self._calls = {call, *(each for each in self._calls if not each.ended.is_set())}
            call.hold(self)
        return call

    async def _offer(self, message: Message, nursery: trio.Nursery) -> None:
        user, avatar = self._user_of(message, required=True), avatar_of(message, required=True)
        if not isinstance(sdp := message.get("sdp"), str):
            raise Refused("sdp is required")
        log.info(f"Received WebRTC offer from session {self.name},", user_id=user)
        place = self.talks.place
        if not place.calls.space:
            raise Refused(NO_CALLS)
        call = place.refuse_too_fast(self.principal) or place.calls.open(
            self.principal, self._key_of(user), sdp, avatar
        )
        if isinstance(call, Rejected):
            raise Refused(call.message)
        self._call_of(user)
        nursery.start_soon(self._answer_offer, message, user, call)

    async def _answer_offer(self, message: Message, user: str, call: Call) -> None:
        answer = await call.wait_answer()
        if isinstance(answer, Rejected):
            await self._refuse(message, answer.message)
            return
        await self._answer(message, {"type": "webrtc_answer", "sdp": answer})
        log.info(f"WebRTC answer sent to user {user} with idle frames")

    async def _candidate(self, message: Message, nursery: trio.Nursery) -> None:
        """Nothing is answered to a candidate."""
        user = self._user_of(message, required=True)
        log.info(f"Received ICE candidate from session {self.name},", user_id=user)
        if (call := self._call_of(user)) is not None and (candidate := candidate_of(message)) is not None:
            call.command(candidate=candidate)

    async def _interrupt(self, message: Message, nursery: trio.Nursery) -> None:
        """End the reply that is being made in a session; what waits behind it is answered."""
        session = session_of(message, self.session)
        talk = await self._open(session, self._user_of(message, required=False), create=False)
        interrupted = await talk.interrupt_for_good("the client interrupted it", played=0)
        await self._answer(message, {"type": "interrupted", "interrupted": interrupted})

    def _user_of(self, message: Message, *, required: bool) -> str:
        """Return the user of a message: the connection's, or any that a proxy names. Raises `Refused`."""
        is_proxy = self.principal.name in self.talks.place.settings.proxies
        return user_of(message, None if is_proxy else self.user, required=required) or self.user or ""

    async def _open(self, session: str, user: str, *, create: bool) -> Talk:
        user = user if self.user is not None else ""  # the connection of a session has no user
        talk = await self.talks.open(self.principal, session, user, create=create)
        if isinstance(talk, Rejected):
            is_unknown = "session" in talk.details
            raise Refused(f"Invalid engine_session_id: {shown(session)}" if is_unknown else talk.message)
        if self.user is not None and (user, session) not in self._contexts:
            if len(self._contexts) >= MAX_TALKS:
                self._contexts.clear()
            self._contexts.add((user, session))
            log.info("Created session context for", engine_session_id=session)
        return talk


def _note_nothing_played(talk: Talk) -> None:
    """Note that nothing was heard of what has just been interrupted: off a call, a reply comes whole or not at all."""
    making = talk.session.conversation.making
    if making is not None and talk.replies[making.number].playback is None:
        talk.note_played(making.number, 0)
