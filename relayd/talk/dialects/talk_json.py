"""Conversations, turns and events as JSON."""

import base64
from typing import Any

from protocol.wire.structs import AudioFormat
from relayd.auth.tokens import iso_time
from relayd.http.json_encoding import jsonable
from relayd.store.records import TalkRecord, TurnRecord
from relayd.talk.dialects.whole import WholeReply
from relayd.talk.events import (
    Event,
    Extra,
    ReplyEnded,
    Speech,
    SpeechEnded,
    SpeechMark,
    SpeechStarted,
    TextDelta,
    TextEnded,
)

Json = dict[str, Any]


def talk_json(record: TalkRecord) -> Json:
    """Return a conversation."""
    return {
        "id": record.talk_id,
        "session": record.session,
        "user": record.user,
        "instructions": record.instructions,
        "created_at": iso_time(record.created_at),
        "touched_at": iso_time(record.touched_at),
    }


def turn_json(turn: TurnRecord) -> Json:
    """Return a turn; `heard` is what was heard of it, null for all."""
    return {
        "number": turn.number,
        "role": turn.role,
        "content": turn.content,
        "state": str(turn.state),
        "heard_chars": turn.heard_chars,
        "code": turn.code,
        "message": turn.message,
        "text_request": turn.text_request,
        "speech_request": turn.speech_request,
        "at": iso_time(turn.at),
    }


def whole_json(whole: WholeReply) -> Json:
    """Return a reply that has ended, with its speech in base64."""
    audio = None
    if whole.audio:
        audio = {
            "media_type": whole.media_type,
            "data": base64.b64encode(whole.audio).decode(),
            "url": f"/v1/requests/{whole.turn.speech_request}/audio",
        }
    return {
        "turn": turn_json(whole.turn),
        "text": whole.turn.content,
        "finish_reason": whole.finish.finish_reason if whole.finish else None,
        "usage": jsonable(whole.finish.usage) if whole.finish else {},
        "audio": audio,
        "speech": _speech_json(whole.speech) if whole.speech else None,
    }


def event_json(event: Event) -> tuple[str, Json]:
    """Return the name and the data of a server-sent event."""
    match event:
        case TextDelta(text=text):
            return "text", {"text": text}
        case TextEnded(finish_reason=reason, usage=usage):
            return "text_ended", {"finish_reason": reason, "usage": jsonable(usage)}
        case SpeechStarted(format=made):
            return "speech_started", _format_json(made)
        case Speech(pcm=pcm):
            return "speech", {"pcm": base64.b64encode(pcm).decode()}
        case SpeechMark(text_end=text_end, sample=sample):
            return "mark", {"text_end": text_end, "sample": sample}
        case Extra(data=data):
            return "extra", {"data": jsonable(data)}
        case SpeechEnded():
            return "speech_ended", _speech_json(event)
        case ReplyEnded(turn=turn):
            return "ended", turn_json(turn)
    return "failed", {"code": event.code, "message": event.message, "retryable": event.retryable}


def _format_json(made: AudioFormat) -> Json:
    return {"encoding": "pcm_s16le", "sample_rate": made.sample_rate, "channels": made.channels}


def _speech_json(ended: SpeechEnded) -> Json:
    return {"code": ended.code, "message": ended.message, "retryable": ended.retryable}
