"""A conversation that is in use, as one row of an operator's screen."""

import time

import trio

from protocol.wire.validators import Value
from relayd.talk.conversation import TurnState
from relayd.talk.session import Session


def talk_row(session: Session) -> dict[str, Value]:
    """Return the row of a conversation, with `state` `idle`, `waiting`, `thinking` or `speaking`."""
    record, conversation, now = session.record, session.conversation, trio.current_time()
    making = conversation.making
    reply = session.replies.get(making.number) if making is not None else None
    oldest = next(iter(session.replies.values()), None)
    replies = (turn for turn in reversed(conversation.turns.values()) if turn.role == "assistant" and turn.ended)
    last = next(replies, None)
    return {
        "talk_id": record.talk_id,
        "principal": record.principal,
        "user": record.user,
        "session": record.session,
        "state": str(making.state) if making is not None else "waiting" if oldest is not None else _quiet(session),
        "turns": len(conversation.turns),
        "waiting": conversation.waiting,
        "reply_s": round(now - oldest.said_at, 1) if oldest is not None else None,
        "said_s": round(max(0.0, time.time() - record.touched_at), 1),
        "text_request": reply.text_request if reply is not None else None,
        "speech_request": reply.speech_request if reply is not None else None,
        "code": last.code if last is not None else None,
        "message": last.message if last is not None else None,
    }


def _quiet(session: Session) -> str:
    return str(TurnState.SPEAKING) if session.is_playing else "idle"
