"""The fields of messages to the GPU server, and what is said of those that are missing or wrong."""

from typing import Any

from relayd.talk.dialects.json_messages import parse_object, shown

MAX_AVATAR_CHARS = 128

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
