"""One attempt of a request on this worker: chunks become numbered frames, kept until the relay holds them all."""

import logging
from collections.abc import Callable

import trio

from gpuworker.engines.base import AudioChunk, Chunk, FormatChunk, OutputChunk, ProgressChunk
from gpuworker.received_inputs import ReceivedInputs
from gpuworker.slots.run_engine import RunResult
from protocol.wire.audio_envelope import audio_prefix, pack_audio
from protocol.wire.codec import encode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Frame,
    Output,
    Progress,
    Started,
)
from protocol.wire.messages import Assign
from protocol.wire.structs import (
    KIB,
    AudioFormat,
    Running,
)
from protocol.wire.validators import Value

#: `pcm` of one frame: half a second at 48 kHz stereo and less than a second of anything usual, so that a cancel
#: or another request's audio never waits long behind it. A whole number of samples in every format.
FRAME_PCM_BYTES = 64 * KIB
#: As the relay's own default; the relay names its own in `welcome.limits`.
MAX_RESULT_BYTES = 64 * KIB * KIB

log = logging.getLogger("gpuworker")


class Attempt:
    """Frames of one attempt, appended by the slot that runs it and read by the link's feeder.

    All of them are kept until the relay has acknowledged the last: a relay that is started again may have lost some.
    So `max_bytes` is what an attempt costs the worker at most; over it, the attempt fails.

    Args:
        assign: what the relay asked for.
        reproducible: the engine's; then frames below `assign.from_seq`, which the relay holds, are not sent. They
            are kept all the same: a relay that is started again has none and asks from 0.
        max_bytes: of its frames.
        on_frames: called after each change that gives the feeder something to send.

    Attributes:
        from_seq: of the frame that the relay lacked when it handed the attempt out.
        next_seq: of the frame made next.
        cursor: `seq` of the frame that the link at hand is to get next.
        ended: its last frame is made.
        dropped: nobody wants its frames any more.
        uploads: its inputs as they come in.
        stop_engine: asks the engine to stop; only while it runs, as its slot then belongs to another attempt.
    """

    def __init__(
        self,
        assign: Assign,
        *,
        reproducible: bool,
        max_bytes: int = MAX_RESULT_BYTES,
        on_frames: Callable[["Attempt"], None] = lambda _attempt: None,
    ) -> None:
        self.assign = assign
        self.request_id = assign.request_id
        self.number = assign.attempt
        self.from_seq = assign.from_seq if reproducible else 0
        self.next_seq = 0
        self.cursor = self.from_seq
        self.ended = False
        self.dropped = False
        self.outcome = ""
        self.uploads = ReceivedInputs(assign.inputs)
        self.cancel_reason: str | None = None
        self.scope = trio.CancelScope()
        self.stop_engine: Callable[[], None] | None = None
        self._frames: list[bytes] = []
        #: `seq` of the first of `_frames`; above 0 once `_end` stands alone in place of frames that were never made.
        self._base = 0
        self._end: RunResult | None = None
        self._bytes = 0
        self._max_bytes = max_bytes
        #: How it ends whatever the engine does: its frames cannot be kept, or the wire cannot take one.
        self._fault: RunResult | None = None
        self._on_frames = on_frames
        self._format: AudioFormat | None = None
        self._began: float | None = None
        self._first_output_at: float | None = None
        self._pcm_bytes = 0
        self._chunks = 0

    # -- for the feeder and the relay

    @property
    def running(self) -> Running:
        """Where it stands, as `register` tells it."""
        return Running(request_id=self.request_id, attempt=self.number, next_seq=self.next_seq)

    @property
    def has_frames(self) -> bool:
        """Whether the link at hand lacks a frame that is made."""
        return self.cursor < self.next_seq and not self.dropped

    def next_frame(self) -> bytes:
        """The frame at `cursor`, which moves on. Only while `has_frames`."""
        data = self._frames[self.cursor - self._base]
        self.cursor += 1
        return data

    def resume_from(self, seq: int) -> None:
        """A new link is to get the frames from `seq` on."""
        if seq < self._base and self._end is not None:  # that relay has none of the frames that made the others void
            self._end_at(seq, self._end)
        self.cursor = max(seq, self._base)

    # -- for whoever runs it

    def begin(self, now: float) -> None:
        """The engine starts, at Trio time `now`."""
        self._began = now

    def cancel(self, reason: str) -> None:
        """Stop it: before it has a slot at once, in its slot before the engine's next chunk."""
        if self.cancel_reason is None and not self.ended:
            self.cancel_reason = reason
            if self.stop_engine is not None:
                self.stop_engine()
            else:
                self.scope.cancel()

    def add_chunk(self, chunk: Chunk) -> None:
        """Make the frames of a chunk. Nothing is made of what comes after a cancel or an overflow.

        Never raises: a chunk that the wire cannot take ends the attempt as failed, and stops its engine.
        """
        if self.ended or self.dropped or self._fault is not None or self.cancel_reason is not None:
            return
        try:
            self._add_chunk(chunk)
        except (ValueError, TypeError) as refusal:  # EncodeError and FieldError among them
            words = f"the wire cannot carry what the engine made: {refusal}"
            self.fail(RunResult.failed(ErrorCode.ENGINE_FAILED, words))

    def fail(self, fault: RunResult) -> None:
        """Stop it in its slot, and let it end as `fault`, unless it was cancelled or failed before."""
        self._fault = self._fault or fault
        if self.stop_engine is not None:
            self.stop_engine()

    def _add_chunk(self, chunk: Chunk) -> None:
        if isinstance(chunk, AudioChunk):
            self._on_output()
            self._pcm_bytes += len(chunk.pcm)
            for start in range(0, len(chunk.pcm), FRAME_PCM_BYTES):
                pcm = chunk.pcm[start : start + FRAME_PCM_BYTES]
                self._append_audio(pcm)
        elif isinstance(chunk, OutputChunk):
            self._on_output()
            self._append(Output(request_id=self.request_id, attempt=self.number, seq=self.next_seq, data=chunk.data))
        elif isinstance(chunk, ProgressChunk):
            self._append(
                Progress(
                    request_id=self.request_id,
                    attempt=self.number,
                    seq=self.next_seq,
                    state=chunk.state,
                    fraction=chunk.fraction,
                    message=chunk.message,
                )
            )
        elif isinstance(chunk, FormatChunk):
            self._format = chunk.format
            self._append(
                Started(request_id=self.request_id, attempt=self.number, seq=self.next_seq, format=chunk.format)
            )

    def _on_output(self) -> None:
        self._chunks += 1
        if self._first_output_at is None:
            self._first_output_at = trio.current_time()

    def finish(self, end: RunResult) -> RunResult:
        """Make the last frame; the first call counts.

        Returns:
            the end that it came to, which a cancel or a fault of its frames may have made another.
        """
        if self.ended or self.dropped:
            return end
        if self.cancel_reason is not None:
            end = RunResult(
                outcome="cancelled"
            )  # even if it came to its end just now: chunks since the cancel are lost
        if self._fault is not None:
            end = self._fault
        short = self.next_seq < self.from_seq  # the relay holds more frames of an earlier attempt than this one made
        if short and end.outcome == "completed":
            end = RunResult.failed(ErrorCode.ENGINE_FAILED, "the engine is not reproducible: it made less than before")
        self.outcome = end.outcome
        self.ended = True
        if short:
            self._end_at(self.from_seq, end)
        else:
            self._append_last(end)
        return end

    def _end_at(self, seq: int, end: RunResult) -> None:
        """Let the last frame be number `seq`, and the only one."""
        self._end, self._base, self.next_seq, self._bytes = end, seq, seq, 0
        self._frames.clear()
        self._append_last(end)

    def _append_last(self, end: RunResult) -> None:
        try:
            self._append(self._last_frame(end))
        except ValueError as refusal:  # EncodeError and FieldError
            self._append(self._last_frame(end.without_details(refusal)))

    def _last_frame(self, end: RunResult) -> Frame:
        if end.outcome == "completed":
            return Completed(
                request_id=self.request_id,
                attempt=self.number,
                seq=self.next_seq,
                result=self.result(trio.current_time()),
            )
        if end.outcome == "cancelled":
            reason = self.cancel_reason or "the worker stopped it"
            return Cancelled(request_id=self.request_id, attempt=self.number, seq=self.next_seq, reason=reason)
        return Failed(
            request_id=self.request_id,
            attempt=self.number,
            seq=self.next_seq,
            code=end.code,
            message=end.message,
            details=end.details,
            retryable=end.retryable,
        )

    def result(self, now: float) -> dict[str, Value]:
        """The figures of `completed`, at Trio time `now`."""
        began = now if self._began is None else self._began
        figures: dict[str, Value] = {"chunks": self._chunks, "run_s": round(now - began, 6)}
        if self._first_output_at is not None:
            figures["first_frame_s"] = round(self._first_output_at - began, 6)
        if self._format is not None:
            samples = self._pcm_bytes // self._format.sample_bytes
            figures |= {
                "duration_s": round(samples / self._format.sample_rate, 6),
                "samples": samples,
                "sample_rate": self._format.sample_rate,
            }
        return figures

    def _append_audio(self, pcm: bytes) -> None:
        if seat := audio_prefix(self.request_id, self.number):
            self._append_data(pack_audio(seat, self.next_seq, pcm))
        else:
            self._append(Audio(request_id=self.request_id, attempt=self.number, seq=self.next_seq, pcm=pcm))

    def _append(self, frame: Frame) -> None:
        self._append_data(encode(frame))

    def _append_data(self, data: bytes) -> None:
        self.next_seq += 1
        self._frames.append(data)
        self._bytes += len(data)
        if self._bytes > self._max_bytes and not self.ended and self._fault is None:
            words = f"its result is over {self._max_bytes} bytes; ask for less, or raise the relay's max_result_bytes"
            self.fail(RunResult.failed(ErrorCode.RESULT_TOO_LARGE, words))
        self._on_frames(self)
