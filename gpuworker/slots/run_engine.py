"""Runs one request on an engine; the same code serves a slot's process and a slot's thread."""

import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import attrs

from gpuworker.engines.base import (
    AudioChunk,
    Chunk,
    Engine,
    EngineError,
    FormatChunk,
    MarkChunk,
    OutputChunk,
    ProgressChunk,
    RequestContext,
    VideoChunk,
    error_text,
    wire_text,
)
from gpuworker.engines.device_fault import DeviceFault, find_device_fault
from gpuworker.engines.plain_values import plain
from gpuworker.slots import ipc
from gpuworker.slots.pictures import Pictures
from gpuworker.speaking.speaking import TEXT, is_live_text, speak
from protocol.wire import codec
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import MAX_TEXT_CHARS, PROGRESS_STATES
from protocol.wire.media_types import media_type_rule, recognize
from protocol.wire.messages import MAX_REPORT_CHARS
from protocol.wire.structs import KIB
from protocol.wire.validators import Value, integer

#: Limit for `details`, which share a control message with the message text.
MAX_DETAILS = 32
#: Binary of one chunk: what a message from a slot has left after its envelope.
MAX_BINARY_BYTES = ipc.MAX_BYTES - 64 * KIB
_MARK_RULE = integer(0)
#: The longest possible envelope: what fits with it fits with any. Its id has 32 digits.
_ENVELOPE: dict[str, Value] = {"request_id": "f" * 32, "attempt": 1_000_000, "seq": 2**31}


@attrs.frozen(kw_only=True)
class RunResult:
    """How a run ended. `code` to `retryable` are sent in `failed`.

    `restart`: the engine must be started again; `process_broken`: in another process. `report`: for operators, what a
    failed run printed.
    """

    outcome: Literal["completed", "failed", "cancelled"]
    code: str = ""
    message: str = ""
    details: dict[str, Value] = attrs.field(factory=dict)
    retryable: bool = False
    restart: bool = False
    process_broken: bool = False
    report: str = ""

    @classmethod
    def failed(cls, code: ErrorCode, message: str, *, retryable: bool = False) -> "RunResult":
        """A failure without details."""
        message = wire_text(message)[:MAX_TEXT_CHARS]
        return cls(outcome="failed", code=code.value, message=message, retryable=retryable)

    @classmethod
    def from_error(cls, fault: BaseException) -> "RunResult":
        """The failure that an engine's exception stands for."""
        device_fault = find_device_fault(fault)
        restart, process_broken = device_fault is not None, device_fault is DeviceFault.FAILED
        if not isinstance(fault, EngineError):
            end = cls.failed(ErrorCode.ENGINE_FAILED, f"{type(fault).__name__}: {error_text(fault)}", retryable=restart)
            return attrs.evolve(end, restart=restart, process_broken=process_broken)
        end = cls(
            outcome="failed",
            code=str(fault.code)[:64],
            message=wire_text(str(fault.message))[:MAX_TEXT_CHARS],
            details={wire_text(str(name))[:64]: value for name, value in list(fault.details.items())[:MAX_DETAILS]},
            retryable=bool(fault.retryable) or restart,
            restart=bool(fault.restart) or restart,
            process_broken=process_broken,
        )
        try:
            end = attrs.evolve(end, details=plain(end.details))
            codec.pack({"type": "failed", **_ENVELOPE, "message": end.message, "details": end.details})
        except Exception as refusal:  # noqa: BLE001 - EncodeError, and whatever the engine's own objects raise
            return end.without_details(refusal)
        return end

    def without_details(self, refusal: Exception) -> "RunResult":
        """This result without details, if the wire rejected it; only details made by an engine can be the cause."""
        message = wire_text(f"{self.message[:500]} (its details are left out: {refusal})")[:MAX_TEXT_CHARS]
        return attrs.evolve(self, message=message, details={})


def run_engine(
    engine: Engine,
    params: dict[str, Value],
    inputs: Mapping[str, Any],
    cancelled: Callable[[], bool],
    emit: Callable[[Chunk], None],
    context: RequestContext | None = None,
) -> RunResult:
    """Run one request to its end; never raises because of what the engine does.

    The first chunk emitted is always a `FormatChunk`. `cancelled` is checked before and after each chunk is made,
    and before each report, so that nothing is emitted once it is true.

    Args:
        engine: a loaded, idle engine.
        params: the checked params of the request.
        inputs: the whole and the live inputs, by name.
        cancelled: returns whether to stop; any thread may make it true.
        emit: receives each chunk; it may block.
        context: for an engine whose `generate` has a parameter of that name.
    """
    engine.cancelled = cancelled
    outlet = _Output(cancelled, emit)
    engine.report = outlet.report
    try:
        late = engine.capabilities.late_format
        wanted = "context" in inspect.signature(engine.generate).parameters
        more: dict[str, Any] = {"context": context or RequestContext()} if wanted else {}
        if is_live_text(engine, inputs):
            params = {**params, TEXT: ""}
            chunks = speak(engine, params, inputs, more)
        else:
            chunks = engine.generate(params, inputs, **more)
        try:
            if not late:
                outlet.put(FormatChunk(engine.format_for(params), engine.video_for(params)))
            return _drain(chunks, outlet, cancelled)
        finally:
            if (close := getattr(chunks, "close", None)) is not None:
                close()
    except (Exception, SystemExit) as fault:  # noqa: BLE001 - the one broad catch for a request: engines raise anything
        end = RunResult.from_error(fault)
        if not isinstance(fault, EngineError):
            report = wire_text("".join(traceback.format_exception(fault)))
            print(report, end="", file=sys.stderr)
        else:  # a shared process cannot tell what this run printed
            report = wire_text("\n".join(getattr(fault, "__notes__", ())))
        end = attrs.evolve(end, report=report[-MAX_REPORT_CHARS:])
        return RunResult(outcome="cancelled") if cancelled() and not end.restart else end
    finally:
        engine.report = Engine.report  # a report between two runs belongs to neither


class _Output:
    """Emits the chunks of a run: its format first, and each in a form that the wire accepts."""

    def __init__(self, cancelled: Callable[[], bool], emit: Callable[[Chunk], None]) -> None:
        self.format_chunk: FormatChunk | None = None
        self._pictures = Pictures(None)
        self._cancelled = cancelled
        self._emit = emit

    def put(self, chunk: Chunk) -> None:
        """Emit what the engine yielded.

        Raises:
            EngineError: it cannot be sent, or it is a second format.
        """
        if isinstance(chunk, FormatChunk):
            if self.format_chunk is not None:
                raise EngineError("the engine yielded its format twice, or too late")
            self.format_chunk, self._pictures = chunk, Pictures(chunk.video)
        elif self.format_chunk is None:
            self.format_chunk = FormatChunk(None)
            self._emit(self.format_chunk)
        fit = self._pictures.fit(chunk) if isinstance(chunk, VideoChunk) else _validate_chunk(chunk, self.format_chunk)
        if fit is not None:
            self._emit(fit)

    def report(self, progress: ProgressChunk) -> None:
        """Emit a progress report; the run's `Engine.report`.

        Raises:
            EngineError: it is not a `ProgressChunk`.
        """
        if not isinstance(progress, ProgressChunk):
            raise EngineError(f"the engine reported {type(progress).__name__}, which is not a ProgressChunk")
        if self.format_chunk is not None and not self._cancelled():
            self.put(progress)


def _drain(chunks: Iterator[Chunk], outlet: _Output, cancelled: Callable[[], bool]) -> RunResult:
    while not cancelled():
        chunk = next(chunks, None)
        if chunk is None:
            break
        if cancelled():
            return RunResult(outcome="cancelled")
        outlet.put(chunk)
    if cancelled():
        return RunResult(outcome="cancelled")
    if outlet.format_chunk is None:
        outlet.put(FormatChunk(None))
    return RunResult(outcome="completed")


def _validate_chunk(chunk: Chunk, format_chunk: FormatChunk) -> Chunk | None:
    """The chunk in a form that the wire accepts; None if it is empty.

    Raises:
        EngineError: it cannot be sent.
    """
    if isinstance(chunk, AudioChunk):
        if format_chunk.format is None:
            raise EngineError("the engine made audio before yielding its format")
        if len(chunk.pcm) % format_chunk.format.sample_bytes:
            raise EngineError(
                f"the engine made {len(chunk.pcm)} bytes of audio, which is not a whole number of samples"
            )
        return chunk if chunk.pcm else None
    if isinstance(chunk, ProgressChunk):
        fraction = 0.0 if math.isnan(chunk.fraction) else min(1.0, max(0.0, float(chunk.fraction)))
        state = chunk.state if chunk.state in PROGRESS_STATES else "generating"
        return ProgressChunk(state, fraction, wire_text(str(chunk.message))[:MAX_TEXT_CHARS])
    if isinstance(chunk, MarkChunk):
        mark = plain([chunk.text_end, chunk.sample])
        for value in mark:
            try:
                _MARK_RULE(value)
            except ValueError as fault:
                raise EngineError(f"the engine yielded a mark with a number that {fault}") from None
        return MarkChunk(*mark)
    if isinstance(chunk, OutputChunk):
        try:
            return _validate_output(chunk)
        except ValueError as fault:
            raise EngineError(f"this {type(chunk.data).__name__} cannot be sent: {fault}") from None
    elif not isinstance(chunk, FormatChunk):
        raise EngineError(f"the engine yielded {type(chunk).__name__}, which is not a chunk")
    return chunk


def _validate_output(chunk: OutputChunk) -> OutputChunk:
    """The output in a form that the wire accepts, with the media type of binary if its first bytes say what it is.

    Raises:
        ValueError: it cannot be sent.
    """
    data = plain(chunk.data)
    media_type = chunk.media_type
    if media_type is not None:
        media_type_rule(media_type)
    if not isinstance(data, bytes):
        codec.pack({"type": "output", **_ENVELOPE, "data": data})
    elif len(data) > MAX_BINARY_BYTES:
        raise ValueError(f"it has {len(data)} bytes, and may have {MAX_BINARY_BYTES}; yield it in parts")
    else:
        media_type = media_type or recognize(data)
    return OutputChunk(data, media_type)
