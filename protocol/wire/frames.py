"""Frames: the messages of a request's output, numbered within an attempt."""

from typing import ClassVar

import attrs

from protocol.wire.structs import KIB, AudioFormat, attempt_rule, request_id_rule, seq_rule
from protocol.wire.validators import (
    Message,
    Value,
    any_value,
    binary,
    boolean,
    choice,
    field,
    map_field,
    number,
    struct_field,
    text,
)

#: A whole message of any type, its envelope included.
MAX_MESSAGE_BYTES = 1024 * KIB
#: `pcm` of one `audio` message: what is left of a message when its envelope (below 200 bytes) is paid for.
MAX_PCM_BYTES = MAX_MESSAGE_BYTES - 1 * KIB
MAX_TEXT_CHARS = 4096
PROGRESS_STATES = ("loading", "generating", "encoding")

_code = text(64)
_words = text(MAX_TEXT_CHARS)


@attrs.frozen(kw_only=True)
class Frame(Message):
    """One message of a request's output: numbered `seq` 0, 1, 2... within `attempt`. `ENDS`: it is the last one."""

    ENDS: ClassVar[bool] = False
    request_id: str = field(request_id_rule)
    attempt: int = field(attempt_rule)
    seq: int = field(seq_rule)


@attrs.frozen(kw_only=True)
class Started(Frame):
    """The engine began; `format` of the audio to come, None where there is none."""

    TYPE: ClassVar[str] = "started"
    format: AudioFormat | None = struct_field(AudioFormat)


@attrs.frozen(kw_only=True)
class Progress(Frame):
    """How far it is."""

    TYPE: ClassVar[str] = "progress"
    state: str = field(choice(*PROGRESS_STATES), "generating")
    fraction: float = field(number(0.0, 1.0), 0.0)
    message: str = field(_words, "")


@attrs.frozen(kw_only=True)
class Audio(Frame):
    """Whole samples of the `started` format."""

    TYPE: ClassVar[str] = "audio"
    pcm: bytes = field(binary(MAX_PCM_BYTES))


@attrs.frozen(kw_only=True)
class Output(Frame):
    """A value that is not speech: any msgpack value up to 64 KiB, or binary up to a message's size."""

    TYPE: ClassVar[str] = "output"
    data: Value = field(any_value, None)


@attrs.frozen(kw_only=True)
class Completed(Frame):
    """The end, with the request's figures."""

    TYPE: ClassVar[str] = "completed"
    ENDS: ClassVar[bool] = True
    result: dict[str, Value] = map_field()


@attrs.frozen(kw_only=True)
class Failed(Frame):
    """The end: it failed."""

    TYPE: ClassVar[str] = "failed"
    ENDS: ClassVar[bool] = True
    code: str = field(_code)
    message: str = field(_words)
    details: dict[str, Value] = map_field()
    retryable: bool = field(boolean, False)


@attrs.frozen(kw_only=True)
class Cancelled(Frame):
    """The end: it was cancelled."""

    TYPE: ClassVar[str] = "cancelled"
    ENDS: ClassVar[bool] = True
    reason: str = field(_words, "")
