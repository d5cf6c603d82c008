"""The fields of messages to the GPU server, and what is said of those that are missing or wrong."""

import base64
from typing import Any

from relayd.talk.conversation import played_content
from relayd.talk.dialects.json_messages import parse_object, shown
from relayd.talk.dialects.whole import WholeReply

MAX_AVATAR_CHARS = 128
MAX_CANDIDATE_CHARS = 1_000
_CANDIDATE = ("candidate", "sdpMid", "sdpMLineIndex", "usernameFragment")

Message = dict[str, Any]


class Refused(Exception):
    """A message is answered with an error of this text."""


def parse(data: str | bytes) -> Message:
    """Parse a message; raises `Refused`."""
    if isinstance(data, bytes):
        raise Refused("binary messages are not supported; send JSON as text")
    try:
        return parse_object(data)
    except ValueError as fault:
        raise Refused(f"the message is not a JSON object: {fault}") from None


def session_of(message: Message, session: str | None) -> str:
    """Return the id of the session that a message is for.

    Args:
        message: what came.
        session: that of the connection; None if it is that of a user.

    Raises:
        Refused: it names none, or another one than that of the connection.
    """
    given = message.get("engine_session_id")
    if given in (None, ""):
        if session is None:
            raise Refused("engine_session_id is required in user-based mode")
        return session
    if not isinstance(given, str) or (session is not None and given != session):
        raise Refused(f"Invalid engine_session_id: {shown(given)}")
    return given


def user_of(message: Message, user: str | None, *, required: bool) -> str:
    """Return the user that a message names; "" if it names none.

    Args:
        message: what came.
        user: that of the connection; None if it is that of a session.
        required: whether it must name one.

    Raises:
        Refused: it names none, or another one than that of the connection.
    """
    given = message.get("user_id")
    if given in (None, ""):
        if required:
            raise Refused("user_id is required for WebRTC streaming")
        return ""
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise Refused("user_id must be a number or text")
    if user is not None and str(given) != user:
        raise Refused(f"user_id {shown(given)} is not that of this connection (user_{user})")
    return shown(given)


def avatar_of(message: Message, *, required: bool) -> str:
    """Return the avatar that a message names; "" if it names none. Raises `Refused`."""
    given = message.get("avatar_id")
    if given in (None, ""):
        if required:
            raise Refused("avatar_id is required for WebRTC streaming")
        return ""
    if not isinstance(given, str) or len(given) > MAX_AVATAR_CHARS:
        raise Refused(f"avatar_id must be text of at most {MAX_AVATAR_CHARS} characters")
    return given


def candidate_of(message: Message) -> Message | None:
    """Return the candidate of a message, as browsers have it; None if it is nothing that could be one."""
    given = message.get("candidate")
    fields = given if isinstance(given, dict) else {"candidate": given}
    known = {name: fields[name] for name in _CANDIDATE if _is_short(fields.get(name))}
    return known if isinstance(known.get("candidate"), str) else None


def _is_short(value: object) -> bool:
    return isinstance(value, str | int) and len(str(value)) <= MAX_CANDIDATE_CHARS


def reply_json(whole: WholeReply, most: int) -> Message:
    """Return the answer to a text, with at most so many bytes of audio."""
    audio, fault = base64.b64encode(whole.audio).decode(), whole.speech.message if whole.speech else None
    if len(audio) > most:
        audio, where = "", f"/v1/requests/{whole.turn.speech_request}/audio"
        fault = f"the speech is too long for a message (limits.max_backlog_bytes); it is at {where}"
    answer: Message = {"type": "text", "content": played_content(whole.turn), "audio": audio, "role": "assistant"}
    if fault is not None:
        answer["audio_error"] = fault
    if whole.turn.state == "interrupted":
        answer["interrupted"] = True
    return answer
