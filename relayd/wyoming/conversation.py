"""`transcript`: says it in a conversation, and tells the reply while it is made. So relayd is a conversation agent."""

from typing import Any

from protocol.wire.messages import Rejected
from relayd.talk.events import ReplyEnded, TextDelta, TurnFailed
from relayd.talk.reply import Reply
from relayd.talk.talks import Talk, Talks
from relayd.wyoming.connection import Connection
from relayd.wyoming.events import Event, EventFault


async def converse(connection: Connection, event: Event) -> None:
    """Say something in the conversation that `context` names, or in a new one, and send the reply."""
    text, context = event.text(), event.table("context")
    talks, session = connection.context.talks, context.get("conversation_id")
    if not isinstance(talks, Talks):
        raise EventFault("no conversations are held here; they need a table [talk] in relayd.toml", "unsupported")
    if not isinstance(session, str | None):
        raise EventFault("conversation_id must be a string")
    principal = connection.principal
    talk = talks.place.refuse_too_fast(principal) or await talks.open(
        principal, session or None, create=talks.place.settings.sessions == "open"
    )
    reply = talk if isinstance(talk, Rejected) else talk.say(text, speak=False)
    if isinstance(talk, Rejected) or isinstance(reply, Rejected):
        refusal = reply if isinstance(reply, Rejected) else talk
        assert isinstance(refusal, Rejected)
        await connection.send("not-handled", {"text": refusal.message, "context": context})
        return
    await _send_reply(connection, talk, reply, context | {"conversation_id": talk.record.session})


async def _send_reply(connection: Connection, talk: Talk, reply: Reply, context: dict[str, Any]) -> None:
    is_begun = False
    try:
        async for event in reply.events():
            match event:
                case TextDelta(text=text):
                    if not is_begun:
                        await connection.send("handled-start", {"context": context})
                    is_begun = True
                    await connection.send("handled-chunk", {"text": text})
                case ReplyEnded(turn=turn):
                    await connection.send("handled", {"text": turn.content, "context": context})
                case TurnFailed(message=message):
                    await connection.send("not-handled", {"text": message, "context": context})
    finally:
        talk.cancel(reply, "the client has left")  # unless it has ended
    if is_begun:
        await connection.send("handled-stop")
