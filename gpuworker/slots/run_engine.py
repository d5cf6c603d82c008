"""One run of an engine, from its params to its end; the same in a slot's process and in a slot's thread."""

import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import attrs

from gpuworker.engines.base import (
    AudioChunk,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    FormatChunk,
    OutputChunk,
    ProgressChunk,
    error_text,
    wire_text,
)
from protocol.wire import codec
from protocol.wire.errors import EncodeError, ErrorCode
from protocol.wire.frames import MAX_TEXT_CHARS, PROGRESS_STATES
from protocol.wire.validators import Value

#: `details` go on the wire in a control message, with the message beside them.
MAX_DETAILS = 32
#: The longest envelope there is: what the wire takes in it, it takes in any. Its id is 32 digits long.
_ENVELOPE: dict[str, Value] = {"request_id": "f" * 32, "attempt": 1_000_000, "seq": 2**31}


@attrs.frozen(kw_only=True)
class RunResult:
    """How a run ended. `code` to `retryable` are those of `failed`; `restart`: the engine must be started anew."""

    outcome: Literal["completed", "failed", "cancelled"]
    code: str = ""
    message: str = ""
    details: dict[str, Value] = attrs.field(factory=dict)
    retryable: bool = False
    restart: bool = False

    @classmethod
    def failed(cls, code: ErrorCode, message: str, *, retryable: bool = False) -> "RunResult":
        """A failure without details."""
        message = wire_text(message)[:MAX_TEXT_CHARS]
        return cls(outcome="failed", code=code.value, message=message, retryable=retryable)

    @classmethod
    def from_error(cls, fault: BaseException) -> "RunResult":
        """The failure that an exception of the engine stands for."""
        if not isinstance(fault, EngineError):
            return cls.failed(ErrorCode.ENGINE_FAILED, f"{type(fault).__name__}: {error_text(fault)}")
        end = cls(
            outcome="failed",
            code=str(fault.code)[:64],
            message=wire_text(str(fault.message))[:MAX_TEXT_CHARS],
            details={wire_text(str(name))[:64]: value for name, value in list(fault.details.items())[:MAX_DETAILS]},
            retryable=bool(fault.retryable),
            restart=bool(fault.restart),
        )
        try:
            codec.pack({"type": "failed", **_ENVELOPE, "message": end.message, "details": end.details})
        except EncodeError as refusal:
            return end.without_details(refusal)
        return end

    def without_details(self, refusal: Exception) -> "RunResult":
        """This end where the wire refused it; only details that an engine made up can be what it refused."""
        message = wire_text(f"{self.message[:500]} (its details are left out: {refusal})")[:MAX_TEXT_CHARS]
        return attrs.evolve(self, message=message, details={})


def run_engine(
    engine: Engine,
    params: dict[str, Value],
    inputs: Mapping[str, EngineInput],
    cancelled: Callable[[], bool],
    emit: Callable[[Chunk], None],
) -> RunResult:
    """Run one request to its end; never raises for what the engine does.

    The first chunk emitted is always a `FormatChunk`. `cancelled` is looked at before and after each chunk is made,
    and before each report, so that nothing is emitted once it is true.

    Args:
        engine: loaded, and idle.
        params: of the request, checked.
        inputs: by name, whole.
        cancelled: whether to stop; any thread may make it true.
        emit: takes each chunk; may block.
    """
    engine.cancelled = cancelled
    outlet = _Output(cancelled, emit)
    engine.report = outlet.report
    try:
        late = engine.capabilities.late_format
        chunks = engine.generate(params, inputs)
        try:
            if not late:
                outlet.put(FormatChunk(engine.format_for(params)))
            return _drain(chunks, outlet, cancelled)
        finally:
            if (close := getattr(chunks, "close", None)) is not None:
                close()
    except (Exception, SystemExit) as fault:  # noqa: BLE001 - the one broad catch a request: engines raise anything
        if not isinstance(fault, EngineError):
            traceback.print_exc(file=sys.stderr)
        if cancelled() and not (isinstance(fault, EngineError) and fault.restart):
            return RunResult(outcome="cancelled")
        return RunResult.from_error(fault)
    finally:
        engine.report = Engine.report  # what is reported between two runs belongs to neither


class _Output:
    """Where the chunks of a run go out: its format first, and each as the wire takes it."""

    def __init__(self, cancelled: Callable[[], bool], emit: Callable[[Chunk], None]) -> None:
        self.told: FormatChunk | None = None
        self._cancelled = cancelled
        self._emit = emit

    def put(self, chunk: Chunk) -> None:
        """What the engine yielded.

        Raises:
            EngineError: the wire cannot take it, or it is the second format.
        """
        if isinstance(chunk, FormatChunk):
            if self.told is not None:
                raise EngineError("the engine told its format twice, or too late")
            self.told = chunk
        elif self.told is None:
            self.told = FormatChunk(None)
            self._emit(self.told)
        if (fit := _validate_chunk(chunk, self.told)) is not None:
            self._emit(fit)

    def report(self, progress: ProgressChunk) -> None:
        """`Engine.report` of this run.

        Raises:
            EngineError: it is no `ProgressChunk`.
        """
        if not isinstance(progress, ProgressChunk):
            raise EngineError(f"the engine reported {type(progress).__name__}, which is no ProgressChunk")
        if self.told is not None and not self._cancelled():
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
    if outlet.told is None:
        outlet.put(FormatChunk(None))
    return RunResult(outcome="completed")


def _validate_chunk(chunk: Chunk, told: FormatChunk) -> Chunk | None:
    """`chunk` as the wire takes it; None where there is nothing in it.

    Raises:
        EngineError: the wire cannot take it.
    """
    if isinstance(chunk, AudioChunk):
        if told.format is None:
            raise EngineError("the engine made audio without telling its format")
        if len(chunk.pcm) % told.format.sample_bytes:
            raise EngineError(f"the engine made {len(chunk.pcm)} bytes of audio, which is no whole number of samples")
        return chunk if chunk.pcm else None
    if isinstance(chunk, ProgressChunk):
        fraction = 0.0 if math.isnan(chunk.fraction) else min(1.0, max(0.0, float(chunk.fraction)))
        state = chunk.state if chunk.state in PROGRESS_STATES else "generating"
        return ProgressChunk(state, fraction, wire_text(str(chunk.message))[:MAX_TEXT_CHARS])
    if isinstance(chunk, OutputChunk):
        try:
            codec.pack({"type": "output", **_ENVELOPE, "data": chunk.data})
        except EncodeError as fault:
            raise EngineError(f"the wire cannot carry this {type(chunk.data).__name__}: {fault}") from None
    elif not isinstance(chunk, FormatChunk):
        raise EngineError(f"the engine yielded {type(chunk).__name__}, which is no chunk")
    return chunk
