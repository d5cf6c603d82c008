"""Defines what an engine is: the abstract class, the chunks it yields, its options and its errors.

To add an engine, write a module with a subclass of `Engine`, and register it under the entry-point group
`gpuworker.engines`. Import anything heavy in `load`, never at the top: `gpuworker engines` imports every engine.
"""

import codecs
import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.structs import AudioFormat, InputRule, VideoFormat
from protocol.wire.validators import Value

OptionValue = str | int | float | bool | None
#: Longest `Capabilities.fingerprint` that the wire accepts.
MAX_FINGERPRINT_CHARS = 200
#: Longest error detail on the wire: a fault of a field is described in a sentence, not a traceback.
MAX_DETAIL_CHARS = 2_000


# -- chunks ------------------------------------------------------------------------------------------------------


@attrs.frozen
class AudioChunk:
    """Audio in the request's format.

    Args:
        pcm: signed 16-bit little-endian samples, channels interleaved; whole samples, any number of them.
    """

    pcm: bytes


@attrs.frozen
class VideoChunk:
    """One picture in the request's video format.

    Args:
        data: as the codec encodes it, at most 1 MiB - 1 KiB; the first one of a request is a key frame.
        pts: when it is shown, in units of 1/90,000 s; greater than that of the picture before.
        key: it can be decoded without any picture before it.
    """

    data: bytes
    pts: int
    key: bool


@attrs.frozen
class ProgressChunk:
    """Progress of a run: `state` is one of `loading generating encoding`, `fraction` lies in 0..1."""

    state: str = "generating"
    fraction: float = 0.0
    message: str = ""


@attrs.frozen
class OutputChunk:
    """A value that is not speech: anything that msgpack can encode.

    The limit applies to the whole message, so keep 1 KiB for the envelope: 64 KiB - 1 KiB for maps and arrays,
    1 MiB - 1 KiB for strings. A larger value makes its request fail. Binary may be as large as a result: it is sent in
    parts.

    Args:
        data: the value.
        media_type: what it is, such as `image/png`; for binary, None leaves that to its first bytes.
    """

    data: Value
    media_type: str | None = None


@attrs.frozen
class FormatChunk:
    """The formats of the audio and the video to come, None for what there will be none of.

    An engine with `late_format` yields it first.
    """

    format: AudioFormat | None
    video: VideoFormat | None = None


@attrs.frozen
class MarkChunk:
    """How far a text that is still being written has been spoken, sent to listeners between two chunks of audio.

    Args:
        text_end: characters of the text (code points) that the audio up to here has spoken.
        sample: samples of audio up to here.
    """

    text_end: int
    sample: int


Chunk = AudioChunk | VideoChunk | ProgressChunk | OutputChunk | FormatChunk | MarkChunk


# -- what goes in ------------------------------------------------------------------------------------------------


@attrs.frozen
class EngineInput:
    """One uploaded input, complete and verified.

    It holds bytes rather than a file: the worker has them already, a slot that is killed leaves nothing behind, and
    decoders (soundfile, PIL) read `io.BytesIO`. An engine that needs a path writes its own temporary file.
    It can be iterated over as a `LiveInput` can, so that an engine reads both in one way.
    """

    data: bytes
    media_type: str = "application/octet-stream"

    def __iter__(self) -> Iterator[bytes]:
        """Yield its bytes, in one piece."""
        return iter([self.data] if self.data else [])

    def text(self) -> Iterator[str]:
        """Yield its text, as `LiveInput.text` does."""
        return _decoded(self)


class LiveInput:
    """An input that comes while the run goes on: iterate over it, once, or over its `text`.

    Each step blocks until more has come. The iteration ends with the input. Once the run is cancelled it raises
    `RunStopped`, also from within a step, so that an engine that lets it pass ends at once.

    Args:
        media_type: as submitted.
        on_ask: called in the reader's thread at each step, with the number of bytes that earlier steps have returned.
    """

    def __init__(self, media_type: str, on_ask: Callable[[int], None] = lambda _taken: None) -> None:
        self.media_type = media_type
        self._on_ask = on_ask
        #: None wakes a reader when the run is cancelled. What lies here is limited by the sender.
        self._pieces: queue.SimpleQueue[tuple[bytes, bool] | None] = queue.SimpleQueue()
        self._taken = 0
        self._ended = False
        self._stopped = False

    def __iter__(self) -> "LiveInput":
        return self

    def __next__(self) -> bytes:
        """Wait for more bytes, and return them.

        Raises:
            RunStopped: the run was cancelled.
        """
        while not self._stopped:
            self._on_ask(self._taken)
            if self._ended:
                raise StopIteration
            piece = self._pieces.get()
            if piece is not None and not self._stopped:
                data, self._ended = piece
                self._taken += len(data)
                if data:
                    return data
        raise RunStopped("the run was cancelled")

    def text(self) -> Iterator[str]:
        """Yield its bytes as text, decoded from UTF-8; characters are never cut.

        Raises:
            EngineError: they are not UTF-8.
            RunStopped: the run was cancelled.
        """
        return _decoded(self)

    # -- for the slot, in any thread

    def feed(self, data: bytes, *, last: bool = False) -> None:
        """Append bytes for the reader; never blocks."""
        self._pieces.put((data, last))

    def stop(self) -> None:
        """Wake the reader, if it waits: the run is cancelled."""
        self._stopped = True
        self._pieces.put(None)


def _decoded(pieces: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    try:
        for data in pieces:
            if text := decoder.decode(data):
                yield text
            at += len(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as fault:
        message = f"the input is not UTF-8: {fault.reason} near byte {at}; send text as UTF-8"
        raise EngineError(message, code=ErrorCode.INPUT_MISMATCH) from None


@attrs.frozen(kw_only=True)
class RequestContext:
    """Who asked, and for what: for an engine whose `generate` has a parameter `context`, and for functions likewise.

    Args:
        request_id: the request's id, the same in each attempt.
        attempt: from 1; above it, earlier attempts were lost.
        space: where it was submitted.
        principal: whose token it was submitted with.
        started_unix: when this attempt began, Unix seconds.
        run_timeout_s: how long it may run; 0 where there is no limit.
    """

    request_id: str = ""
    attempt: int = 1
    space: str = ""
    principal: str = ""
    started_unix: float = attrs.field(factory=time.time)
    run_timeout_s: float = 0.0


@attrs.frozen(kw_only=True)
class Capabilities:
    """What an engine can do, known once it is loaded; the worker registers it.

    Args:
        format: of its audio, None if it makes none or does not know the format yet.
        video: the format of its pictures, likewise.
        late_format: the formats are known only during a run, from a `FormatChunk` as its first chunk.
        streams: a run yields or reports something every few seconds from its beginning to its end. The relay takes a
            run that is silent for its space's `idle_timeout_s` for a hung one then, stops it and tries it again. Any
            other engine may be silent for as long as `run_timeout_s` allows.
        reproducible: equal params and inputs give equal chunks, in any process on this kind of machine. After a loss
            such a run is repeated and continues where it stopped, so declare it truthfully.
        fingerprint: everything else that its samples and pictures depend on (model files, device, library versions,
            the video's format), in at most 200 characters. Reproducible workers with equal engine, format and
            fingerprint replace each other in mid-stream; others never do.
        params: JSON Schema (2020-12) of the params. The relay checks them before queueing. Put voices, models and
            the like here, as an `enum`.
        inputs: input name -> what is accepted.
    """

    format: AudioFormat | None = None
    video: VideoFormat | None = None
    late_format: bool = False
    streams: bool = False
    reproducible: bool = False
    fingerprint: str = attrs.field(default="", validator=attrs.validators.max_len(MAX_FINGERPRINT_CHARS))
    params: dict[str, Value] = attrs.field(factory=dict)
    inputs: dict[str, InputRule] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Option:
    """An option of an engine, given as `-o key=value`.

    Args:
        kind: str, int, float or bool (`true` / `false`).
        default: the value if it is not given; None leaves the choice to the engine.
        help: one line for `gpuworker engines`.
        required: whether it must be given.
        choices: the accepted values; empty accepts any.
    """

    kind: type[str] | type[int] | type[float] | type[bool] = str
    default: OptionValue = None
    help: str = ""
    required: bool = False
    choices: tuple[str, ...] = ()


@attrs.frozen
class Missing:
    """A missing prerequisite of an engine, and the command that installs it ("" if there is none)."""

    what: str
    install: str = ""


# -- errors ------------------------------------------------------------------------------------------------------


def wire_text(text: str) -> str:
    """`text` with "?" for each lone surrogate, which UTF-8 cannot encode (file names that are not UTF-8 have them)."""
    return text.encode("utf-8", "replace").decode()


def error_text(fault: BaseException) -> str:
    """The message of an exception in a form that the wire accepts; never raises."""
    try:
        message = str(fault)
    except Exception:  # noqa: BLE001 - an engine's own exception may have any __str__
        message = "(it has no readable message)"
    return wire_text(message)


class EngineError(Exception):
    """A run or a load failed for a reason that the engine knows; sent to the client as `failed`.

    Args:
        message: what happened and what to do next.
        code: the wire's error code.
        details: further facts by name.
        retryable: the same request may succeed if it is sent again.
        restart: the engine can no longer be trusted (CUDA out of memory): its process is started again.
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
        self.message = message[:MAX_DETAIL_CHARS]
        self.code = code
        self.details = dict(details or {})
        self.retryable = retryable
        self.restart = restart


class InvalidParams(EngineError):
    """The params break a rule that JSON Schema cannot express; `details` is field -> what is wrong."""

    def __init__(self, details: Mapping[str, str]) -> None:
        message = "; ".join(f"{name} {fault}" for name, fault in details.items())
        super().__init__(message, code=ErrorCode.INVALID_PARAMS, details=details)


class RunStopped(EngineError):
    """The run was cancelled while its engine read a live input; let it pass."""


class OptionError(ValueError):
    """An option of an engine is unknown, missing or wrong; the message says which, and what is accepted."""


# -- the engine --------------------------------------------------------------------------------------------------


def _never() -> bool:
    return False


def _to_nobody(progress: ProgressChunk) -> None:
    del progress


class Engine(ABC):
    """Makes chunks from params. One instance serves one slot: only one `generate` runs at a time.

    Called in this order, all from one thread: `__init__` (cheap), `load` (may take minutes), `generate` any number of
    times, `close`. A run is cancelled by closing the generator between two chunks (`GeneratorExit` at its `yield`).

    A shared engine is loaded once for all slots of a worker: `load`, then `seats`, which returns an engine for each
    slot; `generate` is called only on those, each in its own thread.
    """

    #: Option name -> option; `__init__` gets a value for each.
    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    #: One line for `gpuworker engines`.
    SUMMARY: ClassVar[str] = ""
    #: The live inputs that its spaces will take, for `doctor`: its own, and `text` for one with a param `text`.
    LIVE_INPUTS: ClassVar[tuple[str, ...]] = ()
    #: One load serves all slots of a worker: the engine's process asks `seats` for an engine for each slot.
    #: Of the class, or set by `__init__` where it depends on the options.
    SHARED: bool = False
    #: How many slots a worker has unless it is told; of the class, or set by `__init__` as well.
    default_slots: int = 1

    #: Whether the current run is to stop; set by the slot, which checks it between chunks.
    #: An engine that works long before its next chunk may check it too, and return.
    cancelled: Callable[[], bool] = staticmethod(_never)

    #: Sends a `ProgressChunk` immediately, during work that takes long before its next chunk; only from the thread
    #: of `generate`. The slot sets it for a run. Nothing is sent after a cancel, nor before an engine with
    #: `late_format` has yielded its format. A reproducible engine reports by steps, never by the clock.
    #: In `load` it is a sign of life, from one thread at a time: a load that is silent for too long is killed.
    report: Callable[[ProgressChunk], None] = staticmethod(_to_nobody)

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        self.options: dict[str, OptionValue] = {name: option.default for name, option in self.OPTIONS.items()}
        self.options.update(options or {})

    @classmethod
    def missing(cls) -> list[Missing]:
        """What this machine lacks to run the engine; empty if it can run. Must not import anything heavy."""
        return []

    @classmethod
    def check(cls, options: Mapping[str, OptionValue], slots: int) -> list[Missing]:
        """What this machine lacks to run the engine with these options: what `missing` reports, and e.g. memory.

        Called by `gpuworker run` before its slots start, and by `gpuworker doctor --engine`. Must not import
        anything heavy.

        Args:
            options: a value for each of `OPTIONS`.
            slots: how many engines will run side by side; of a `SHARED` one, how many seats it will have.
        """
        del options, slots
        return cls.missing()

    @classmethod
    def outlook(cls, options: Mapping[str, OptionValue], slots: int) -> str:
        """What the engine will need of this machine with these options, as text for `doctor`; as cheap as `check`.

        Called if nothing is missing. It may ask a server that the engine depends on.

        Raises:
            EngineError: what the engine depends on does not answer; `gpuworker run` starts all the same.
        """
        del options, slots
        return ""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the engine can do; called only after `load`."""

    @abstractmethod
    def load(self) -> None:
        """Prepare the engine: import, read the model, warm up. Report progress in anything longer, such as a download.

        Raises:
            EngineError: it cannot be loaded; the message says what to do.
        """

    def seats(self, count: int) -> Sequence["Engine"]:
        """Engines for `count` slots over what `load` made; called once after `load`, if the engine is `SHARED`.

        Each has its own thread, `cancelled` and `report`, and runs one request at a time. What they share must not let
        one request change another's chunks, nor put its words into another's error. If a seat fails with `restart`,
        or the process ends, the runs of all seats end: those that have made audio or output, or reported progress
        above 0, are tried again without counting it as their fault.
        """
        del count
        return [self]

    def format_for(self, params: dict[str, Value]) -> AudioFormat | None:
        """The format of the audio that these params make; not called if the engine has `late_format`."""
        del params
        return self.capabilities.format

    def video_for(self, params: dict[str, Value]) -> VideoFormat | None:
        """The format of the pictures that these params make; not called if the engine has `late_format`."""
        del params
        return self.capabilities.video

    @abstractmethod
    def generate(self, params: dict[str, Value], inputs: Mapping[str, Any]) -> Iterator[Chunk]:
        """Run one request.

        Args:
            params: valid for the JSON Schema in `capabilities`.
            inputs: by name; the required ones are present. One whose rule says `live` is an `EngineInput` or, if it is
                still being sent, a `LiveInput`; all others are whole. A live input need not be read to its end.

        An engine that wants to know who asks adds a parameter `context: RequestContext`; it is given by name.

        Yields:
            chunks, each as soon as it is made. It must be closeable at any `yield`, and ready for the next run then.

        Raises:
            EngineError: the run failed. Any other exception is reported as `engine_failed`, not retryable. An error of
                the GPU is recognized in either: it is retryable, and the slot starts a new engine.
        """

    def piecewise(
        self, params: dict[str, Value], inputs: Mapping[str, Any], **context: Any
    ) -> Callable[[str], Iterator[Chunk]]:
        """Begin a text that is still being written, and is spoken in pieces, in one run (`gpuworker.speaking`).

        Override it if the pieces are to have something in common, such as the voice that the first one was spoken with.
        Equal pieces must make equal chunks again if the engine is `reproducible`.

        Args:
            params: all but `text`.
            inputs: as for `generate`.
            context: `context`, if `generate` has a parameter of that name.

        Returns:
            a function that speaks the next piece: its chunks, with what belongs between it and the one before. It is
            called once the iterator before has ended or was closed.
        """
        return lambda text: self.generate({**params, "text": text}, inputs, **context)

    def close(self) -> None:  # noqa: B027 - most engines have nothing to release
        """Release what `load` acquired. The process ends after it."""
