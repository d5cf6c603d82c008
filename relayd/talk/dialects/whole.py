"""A whole reply: for clients that get its text and its speech in one message."""

import attrs

from protocol.wire.structs import AudioFormat
from relayd.http.audio.threaded_encoder import Transcoder, open_transcoder
from relayd.store.records import TurnRecord
from relayd.talk.events import ReplyEnded, Speech, SpeechEnded, SpeechStarted, TextEnded, TurnFailed
from relayd.talk.reply import Reply

#: Of the speech of one reply in one piece; more of it is left out, and said so.
MAX_AUDIO_BYTES = 64 * 1024 * 1024
MEDIA_TYPES = {"wav": "audio/wav", "mp3": "audio/mpeg"}


@attrs.frozen
class WholeReply:
    """A reply that has ended.

    Args:
        turn: with its text.
        audio: its speech as a file; empty if there is none.
        finish: how the text ended; None if it was interrupted before.
        speech: how the speech ended; None if it was not to be spoken, or was interrupted.
    """

    turn: TurnRecord
    audio: bytes = attrs.field(default=b"", repr=False)
    media_type: str = ""
    format: AudioFormat | None = None
    finish: TextEnded | None = None
    speech: SpeechEnded | None = None


async def whole_reply(reply: Reply, coding: str) -> WholeReply | TurnFailed:
    """Listen to a reply to its end, with its speech encoded as `wav` or `mp3`.

    Raises:
        AudioExtraMissing: the coding needs packages that are not installed.
    """
    transcoder: Transcoder | None = None
    audio, finish, speech = bytearray(), None, None
    async for event in reply.events():
        match event:
            case SpeechStarted(format=made):
                transcoder = await open_transcoder(coding, made)
            case Speech(pcm=pcm) if transcoder is not None and len(audio) < MAX_AUDIO_BYTES:
                audio += await transcoder.feed(pcm)
            case TextEnded():
                finish = event
            case SpeechEnded():
                speech = event
            case TurnFailed():
                return event
            case ReplyEnded(turn=turn):
                if transcoder is None or not transcoder.encoder.fed_s:
                    return WholeReply(turn, finish=finish, speech=speech)
                audio += await transcoder.finish()
                encoder = transcoder.encoder
                file = encoder.with_sizes(audio)
                return WholeReply(turn, file, MEDIA_TYPES[coding], encoder.source, finish, speech)
    raise AssertionError("a reply ends")
