"""What an engine is: the ABC, the chunks it yields, its options and its errors.

To add one: a module with a subclass of `Engine`, and a line under the entry-point group `gpuworker.engines`.
Import anything heavy in `load`, never at the top: `gpuworker engines` imports every engine module.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.structs import AudioFormat, InputRule
from protocol.wire.validators import Value

OptionValue = str | int | float | bool | None
#: Of `Capabilities.fingerprint`, as the wire takes it.
MAX_FINGERPRINT_CHARS = 200
#: Details of an error quoted on the wire: a field's fault is a sentence, not a traceback.
MAX_WORDS_CHARS = 2_000


# -- chunks ------------------------------------------------------------------------------------------------------


@attrs.frozen
class AudioChunk:
    """Audio in the request's format.

    Args:
        pcm: signed 16-bit little-endian samples, channels interleaved; whole samples, any number of them.
    """

    pcm: bytes


@attrs.frozen
class ProgressChunk:
    """How far it is: `state` one of `loading generating encoding`, `fraction` 0..1."""

    state: str = "generating"
    fraction: float = 0.0
    message: str = ""


@attrs.frozen
class OutputChunk:
    """A value that is not speech: anything msgpack has a word for.

    The bound is the whole message's, so keep 1 KiB for what is around the value: 64 KiB - 1 KiB for maps and arrays,
    1 MiB - 1 KiB for binary and strings. A larger one fails its request.
    """

    data: Value


@attrs.frozen
class FormatChunk:
    """The format of the audio to come, None where there will be none; an engine with `late_format` yields it first."""

    format: AudioFormat | None


Chunk = AudioChunk | ProgressChunk | OutputChunk | FormatChunk


# -- what goes in ------------------------------------------------------------------------------------------------


@attrs.frozen
class EngineInput:
    """One uploaded input, whole and verified.

    Bytes rather than a file: the worker holds them already, nothing is left behind by a slot that is killed, and
    decoders (soundfile, PIL) read `io.BytesIO`. An engine that needs a path writes its own temporary file.
    """

    data: bytes
    media_type: str = "application/octet-stream"


@attrs.frozen(kw_only=True)
class Capabilities:
    """What an engine announces once it is loaded; the worker registers it.

    Args:
        format: of its audio, None where it makes none or cannot tell yet.
        late_format: only a run tells the format, by a `FormatChunk` as its first chunk.
        reproducible: the same params and inputs make the same chunks, in any process on this kind of machine.
            A run is then repeated after a loss and goes on where it stopped, so announce it truthfully.
        fingerprint: whatever else its samples depend on (the model's files, the device, versions of libraries), at
            most 200 characters. Reproducible workers whose engine, format and fingerprint are the same stand in for
            each other in mid-stream; others never do.
        params: JSON Schema (2020-12) of the params. The relay checks it before queueing. Voices, models and the like
            belong here, as an `enum`.
        inputs: input name -> what is taken.
    """

    format: AudioFormat | None = None
    late_format: bool = False
    reproducible: bool = False
    fingerprint: str = attrs.field(default="", validator=attrs.validators.max_len(MAX_FINGERPRINT_CHARS))
    params: dict[str, Value] = attrs.field(factory=dict)
    inputs: dict[str, InputRule] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Option:
    """An engine's option, given as `-o key=value`.

    Args:
        kind: str, int, float or bool (`true` / `false`).
        default: its value when it is not given; None leaves the choice to the engine.
        help: one line for `gpuworker engines`.
        required: it must be given.
        choices: the only values taken; empty takes any.
    """

    kind: type[str] | type[int] | type[float] | type[bool] = str
    default: OptionValue = None
    help: str = ""
    required: bool = False
    choices: tuple[str, ...] = ()


@attrs.frozen
class Missing:
    """Something an engine needs that is not here, and the command that installs it; "" where no command does."""

    what: str
    install: str = ""


# -- errors ------------------------------------------------------------------------------------------------------


def wire_text(text: str) -> str:
    """`text` with "?" for each lone surrogate, as a file name that is not UTF-8 holds: UTF-8 has no bytes for one."""
    return text.encode("utf-8", "replace").decode()


def error_text(fault: BaseException) -> str:
    """What an exception says of itself, as the wire takes it; never raises."""
    try:
        words = str(fault)
    except Exception:  # noqa: BLE001 - an engine's own exception may have any __str__
        words = "(it cannot be put in words)"
    return wire_text(words)


class EngineError(Exception):
    """A run, or a load, that failed for a reason the engine can name; told to the client as `failed`.

    Args:
        message: what happened and what to do next.
        code: of the wire.
        details: more to it, by name.
        retryable: the same request may succeed when it is sent again.
        restart: the engine is no longer to be trusted (CUDA out of memory): its slot is started anew.
    """

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode = ErrorCode.ENGINE_FAILED,
        details: Mapping[str, Value] | None = None,
        retryable: bool = False,
        restart: bool = False,
    ) -> None:
        message = wire_text(message)
        super().__init__(message)
        self.message = message[:MAX_WORDS_CHARS]
        self.code = code
        self.details = dict(details or {})
        self.retryable = retryable
        self.restart = restart


class InvalidParams(EngineError):
    """The params break a rule that the JSON Schema cannot say; `details` is field -> what is wrong."""

    def __init__(self, details: Mapping[str, str]) -> None:
        words = "; ".join(f"{name} {fault}" for name, fault in details.items())
        super().__init__(words, code=ErrorCode.INVALID_PARAMS, details=details)


class OptionError(ValueError):
    """An option of the engine is unknown, missing or wrong; the text says which and what is taken."""


# -- the engine --------------------------------------------------------------------------------------------------


def _never() -> bool:
    return False


def _to_nobody(progress: ProgressChunk) -> None:
    del progress


class Engine(ABC):
    """Makes chunks from params. One instance serves one slot: `generate` is never entered twice at once.

    Called in this order, all from one thread: `__init__` (cheap), `load` (may take minutes), `generate` any number of
    times, `close`. A run is cancelled by closing the generator between two chunks (`GeneratorExit` at its `yield`).
    """

    #: Name -> option; `__init__` gets a value for each.
    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    #: One line for `gpuworker engines`.
    SUMMARY: ClassVar[str] = ""

    #: Whether the run at hand is to stop. The slot sets it. It is looked at between chunks anyway;
    #: an engine that works long before its next chunk may look itself, and return.
    cancelled: Callable[[], bool] = staticmethod(_never)

    #: Sends a `ProgressChunk` at once, from inside work that is long before its next chunk; from the thread of
    #: `generate` only. The slot sets it for the time of a run. Nothing is sent after a cancel, nor before an engine
    #: with `late_format` has told its format. A reproducible engine reports by its steps, never by the clock.
    #: In `load` it is a sign of life, by one thread at a time: a load that is silent for too long is killed.
    report: Callable[[ProgressChunk], None] = staticmethod(_to_nobody)

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        self.options: dict[str, OptionValue] = {name: option.default for name, option in self.OPTIONS.items()}
        self.options.update(options or {})

    @classmethod
    def missing(cls) -> list[Missing]:
        """What this machine lacks to run it; empty when it can run. Must not import anything heavy."""
        return []

    @classmethod
    def check(cls, options: Mapping[str, OptionValue], slots: int) -> list[Missing]:
        """What this machine lacks to run it in this way: what `missing` tells, and memory, say.

        Asked by `gpuworker run` before its slots start, and by `gpuworker doctor --engine`. Must not import
        anything heavy.

        Args:
            options: a value for each of `OPTIONS`.
            slots: how many engines are to run side by side.
        """
        del options, slots
        return cls.missing()

    @classmethod
    def outlook(cls, options: Mapping[str, OptionValue], slots: int) -> str:
        """What it will take of this machine to run it in this way, in words for `doctor`; as light as `check`."""
        del options, slots
        return ""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it announces; asked for after `load` only."""

    @abstractmethod
    def load(self) -> None:
        """Make it ready: import, read the model, warm up. What may take long beyond that, as a download, reports.

        Raises:
            EngineError: it cannot; the message says what to do.
        """

    def format_for(self, params: dict[str, Value]) -> AudioFormat | None:
        """Format of the audio these params make; not asked of an engine with `late_format`."""
        del params
        return self.capabilities.format

    @abstractmethod
    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput]) -> Iterator[Chunk]:
        """Run one request.

        Args:
            params: keep the JSON Schema of `capabilities`.
            inputs: by name; the required ones are there.

        Yields:
            chunks, as soon as each is made. Must be closeable at any `yield`, and fit for the next run after it.

        Raises:
            EngineError: the run failed. Any other exception is told as `engine_failed`, not retryable.
        """

    def close(self) -> None:  # noqa: B027 - most engines have nothing to give back
        """Give back what `load` took. The process ends after it."""
