"""Frames: the messages of a request's output, numbered within an attempt."""

from typing import ClassVar

import attrs

from protocol.wire.media_types import media_type_rule
from protocol.wire.structs import KIB, AudioFormat, VideoFormat, attempt_rule, request_id_rule, seq_rule
from protocol.wire.validators import (
    Message,
    Value,
    any_value,
    binary,
    boolean,
    choice,
    field,
    integer,
    map_field,
    map_of,
    number,
    optional,
    struct_field,
    text,
)

#: Size of a whole message of any type, including its envelope.
MAX_MESSAGE_BYTES = 1024 * KIB
#: Size of `pcm` in one `audio` message: what a message has left after its envelope (below 200 bytes).
MAX_PCM_BYTES = MAX_MESSAGE_BYTES - 1 * KIB
#: Size of binary `data` in one `output` or `video` message; larger binary of an `output` is sent in parts.
MAX_BINARY_BYTES = MAX_PCM_BYTES
MAX_TEXT_CHARS = 4096
#: What to do about `run_timeout`.
RUN_TIMEOUT_ADVICE = "split the text or ask for less, or raise run_timeout_s"
PROGRESS_STATES = ("loading", "generating", "encoding")

_code = text(64)
_words = text(MAX_TEXT_CHARS)


@attrs.frozen(kw_only=True)
class Frame(Message):
    """One message of a request's output, numbered `seq` 0, 1, 2... within `attempt`. `ENDS`: it is the last one."""

    ENDS: ClassVar[bool] = False
    request_id: str = field(request_id_rule)
    attempt: int = field(attempt_rule)
    seq: int = field(seq_rule)


@attrs.frozen(kw_only=True)
class Started(Frame):
    """The engine has begun; `format` of the audio and `video` of the pictures to come, None if there will be none."""

    TYPE: ClassVar[str] = "started"
    format: AudioFormat | None = struct_field(AudioFormat)
    video: VideoFormat | None = struct_field(VideoFormat)


@attrs.frozen(kw_only=True)
class Progress(Frame):
    """The progress of the run."""

    TYPE: ClassVar[str] = "progress"
    state: str = field(choice(*PROGRESS_STATES), "generating")
    fraction: float = field(number(0.0, 1.0), 0.0)
    message: str = field(_words, "")


@attrs.frozen(kw_only=True)
class Audio(Frame):
    """Audio: whole samples in the `started` format."""

    TYPE: ClassVar[str] = "audio"
    pcm: bytes = field(binary(MAX_PCM_BYTES))


@attrs.frozen(kw_only=True)
class Video(Frame):
    """One encoded picture in the `started` video format.

    `pts`: when it is shown, in units of 1/90,000 s; of each picture later than of the one before. `key`: it needs no
    picture before it.
    """

    TYPE: ClassVar[str] = "video"
    data: bytes = field(binary(MAX_BINARY_BYTES))
    pts: int = field(integer(0))
    key: bool = field(boolean)


@attrs.frozen(kw_only=True)
class Output(Frame):
    """A value that is not speech: any msgpack value up to 64 KiB, or binary up to a message's size.

    `media_type` says what kind of file it is, None where nobody said. With `more` the next `output` frame continues it.
    A frame with `mark` has no value: it says how many characters of the text (`text_end`) the audio up to its place has
    spoken, and how many samples (`sample`) that is.
    """

    TYPE: ClassVar[str] = "output"
    data: Value = field(any_value, None)
    media_type: str | None = field(optional(media_type_rule), None)
    more: bool | None = field(optional(boolean), None)
    mark: dict[str, int] | None = field(optional(map_of(text(32), integer(0))), None)


@attrs.frozen(kw_only=True)
class Completed(Frame):
    """The successful end, with the request's figures; `cached`: those of an equal request, whose frames these are."""

    TYPE: ClassVar[str] = "completed"
    ENDS: ClassVar[bool] = True
    result: dict[str, Value] = map_field()
    cached: bool | None = field(optional(boolean), None)


@attrs.frozen(kw_only=True)
class Failed(Frame):
    """The end of a request that failed."""

    TYPE: ClassVar[str] = "failed"
    ENDS: ClassVar[bool] = True
    code: str = field(_code)
    message: str = field(_words)
    details: dict[str, Value] = map_field()
    retryable: bool = field(boolean, False)


@attrs.frozen(kw_only=True)
class Cancelled(Frame):
    """The end of a request that was cancelled."""

    TYPE: ClassVar[str] = "cancelled"
    ENDS: ClassVar[bool] = True
    reason: str = field(_words, "")
