"""What a listener of a reply gets, in order: text as it comes, speech as it comes, and one end."""

import attrs

from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value
from relayd.store.records import TurnRecord


@attrs.frozen
class TextDelta:
    """The next characters of the reply."""

    text: str


@attrs.frozen
class TextEnded:
    """The text is whole. The reply has not ended: its speech may go on, and nothing is stored yet."""

    finish_reason: str = "stop"
    usage: dict[str, Value] = attrs.field(factory=dict)


@attrs.frozen
class SpeechStarted:
    """Speech in this format follows: 16-bit samples, as the wire has them."""

    format: AudioFormat


@attrs.frozen
class Speech:
    """The next samples."""

    pcm: bytes = attrs.field(repr=False)


@attrs.frozen
class SpeechMark:
    """The samples so far, `sample`, have spoken the text up to the character `text_end`."""

    text_end: int
    sample: int


@attrs.frozen
class Extra:
    """Something else that the speech space has made, such as visemes."""

    data: Value


@attrs.frozen
class SpeechEnded:
    """No more speech comes. With a code, it is not whole, or there is none: the text still comes."""

    code: str | None = None
    message: str | None = None
    retryable: bool = False


@attrs.frozen
class ReplyEnded:
    """The reply is `done` or was `interrupted`, and is stored. Nothing follows."""

    turn: TurnRecord


@attrs.frozen
class TurnFailed:
    """There is no reply, or only a part of one. Nothing follows."""

    code: str
    message: str
    retryable: bool = False


Event = TextDelta | TextEnded | SpeechStarted | Speech | SpeechMark | Extra | SpeechEnded | ReplyEnded | TurnFailed
