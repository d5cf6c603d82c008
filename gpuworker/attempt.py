"""One attempt of a request: an engine's chunks become numbered frames, kept until the relay has received them all."""

import logging
from collections.abc import Callable

import attrs
import trio

from gpuworker.engines.base import AudioChunk, Chunk, FormatChunk, MarkChunk, OutputChunk, ProgressChunk, VideoChunk
from gpuworker.received_inputs import ReceivedInputs
from gpuworker.slots.run_engine import RunResult
from protocol.wire.audio_envelope import audio_prefix, pack_audio
from protocol.wire.codec import encode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import (
    MAX_BINARY_BYTES,
    Audio,
    Cancelled,
    Completed,
    Failed,
    Frame,
    Output,
    Progress,
    Started,
    Video,
)
from protocol.wire.messages import Assign
from protocol.wire.structs import (
    KIB,
    AudioFormat,
    Running,
)
from protocol.wire.validators import Value

#: Largest `pcm` of one frame: half a second at 48 kHz stereo and less than a second of any usual format, so that a
#: cancel or the audio of another request never waits long behind it. A whole number of samples in every format.
FRAME_PCM_BYTES = 64 * KIB
#: The relay's own default; a relay sends its actual limit in `welcome.limits`.
MAX_RESULT_BYTES = 64 * KIB * KIB

log = logging.getLogger("gpuworker")


class Attempt:
    """The frames of one attempt, appended by the slot that runs it and read by the sender of the link.

    All frames are kept until the relay has acknowledged the last one, because a relay that restarts may have lost some.
    `max_bytes` is therefore the most memory an attempt can use; beyond it, the attempt fails.

    Args:
        assign: the relay's assignment.
        reproducible: whether the engine is; if so, frames below `assign.from_seq`, which the relay has, are not sent.
            They are kept all the same: a relay that restarts has none of them and asks from 0.
        max_bytes: limit for the frames.
        on_frames: called after each change that gives the sender something to send.
        on_taken: called when the engine has taken more of a live input, with its name, and how many bytes.

    Attributes:
        params: of the request, as the engine gets them.
        from_seq: the first frame that the relay lacked when it assigned the attempt.
        next_seq: number of the next frame to be made.
        cursor: number of the next frame to send over the current link.
        ended: the last frame has been made.
        dropped: the frames are no longer wanted.
        uploads: the inputs as they arrive.
        stop_engine: asks the engine to stop; set only while it runs, because afterwards its slot is another attempt's.
    """

    def __init__(
        self,
        assign: Assign,
        *,
        reproducible: bool,
        max_bytes: int = MAX_RESULT_BYTES,
        on_frames: Callable[["Attempt"], None] = lambda _attempt: None,
        on_taken: Callable[["Attempt", str, int], None] = lambda _attempt, _name, _taken: None,
    ) -> None:
        self.assign = assign
        self.request_id = assign.request_id
        self.params: dict[str, Value] = assign.params
        self.number = assign.attempt
        self.from_seq = assign.from_seq if reproducible else 0
        self.next_seq = 0
        self.cursor = self.from_seq
        self.ended = False
        self.dropped = False
        self.outcome = ""
        #: For operators, sent before the last frame of an attempt that has not completed.
        self.report = ""
        self.uploads = ReceivedInputs(assign.inputs, lambda name, taken: on_taken(self, name, taken))
        self.cancel_reason: str | None = None
        self.scope = trio.CancelScope()
        self.stop_engine: Callable[[], None] | None = None
        self._frames: list[bytes] = []
        #: Number of the first of `_frames`; above 0 once `_end` alone replaces frames that were never made.
        self._base = 0
        self._end: RunResult | None = None
        self._bytes = 0
        self._max_bytes = max_bytes
        #: An end that overrides the engine's: the frames exceed the limit, or one cannot be encoded.
        self._fault: RunResult | None = None
        self._on_frames = on_frames
        self._format: AudioFormat | None = None
        self._began: float | None = None
        self._first_output_at: float | None = None
        self._pcm_bytes = 0
        self._pictures = 0
        self._chunks = 0

    # -- for the feeder and the relay

    @property
    def running(self) -> Running:
        """The attempt and its progress, as sent in `register`."""
        received = {name: feed.received for name, feed in self.uploads.feeds.items()}
        return Running(request_id=self.request_id, attempt=self.number, next_seq=self.next_seq, inputs=received)

    @property
    def has_frames(self) -> bool:
        """Whether there are frames that have not been sent over the current link."""
        return self.cursor < self.next_seq and not self.dropped

    @property
    def at_last_frame(self) -> bool:
        """Whether `next_frame` is the last one."""
        return self.ended and self.cursor == self.next_seq - 1

    def next_frame(self) -> bytes:
        """The frame at `cursor`, which advances. Call it only while `has_frames`."""
        data = self._frames[self.cursor - self._base]
        self.cursor += 1
        return data

    def resume_from(self, seq: int) -> None:
        """Start sending from `seq`, over a new link."""
        if seq < self._base and self._end is not None:  # this relay has none of the frames that the others would follow
            self._end_at(seq, self._end)
        self.cursor = seq

    # -- for whoever runs it

    def begin(self, now: float) -> None:
        """Note that the engine starts, at Trio time `now`."""
        self._began = now

    def cancel(self, reason: str) -> None:
        """Cancel: immediately if it has no slot yet, otherwise before the engine's next chunk."""
        if self.cancel_reason is None and not self.ended:
            self.cancel_reason = reason
            if self.stop_engine is not None:
                self.stop_engine()
            else:
                self.scope.cancel()

    def add_chunk(self, chunk: Chunk) -> None:
        """Make the frames of a chunk; ignored after a cancel or an overflow.

        Never raises: a chunk that cannot be encoded makes the attempt fail, and stops its engine.
        """
        if self.ended or self.dropped or self._fault is not None or self.cancel_reason is not None:
            return
        try:
            self._add_chunk(chunk)
        except (ValueError, TypeError) as refusal:  # includes EncodeError and FieldError
            message = f"the engine's output cannot be sent: {refusal}"
            self.fail(RunResult.failed(ErrorCode.ENGINE_FAILED, message))

    def fail(self, fault: RunResult) -> None:
        """Stop it and let it end as `fault`, unless it was cancelled or has failed already."""
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
        elif isinstance(chunk, VideoChunk):
            self._on_output()
            self._pictures += 1
            self._append(
                Video(
                    request_id=self.request_id,
                    attempt=self.number,
                    seq=self.next_seq,
                    data=chunk.data,
                    pts=chunk.pts,
                    key=chunk.key,
                )
            )
        elif isinstance(chunk, OutputChunk):
            self._on_output()
            self._append_output(chunk)
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
        elif isinstance(chunk, MarkChunk):
            mark = {"text_end": chunk.text_end, "sample": chunk.sample}
            self._append(Output(request_id=self.request_id, attempt=self.number, seq=self.next_seq, mark=mark))
        elif isinstance(chunk, FormatChunk):
            self._format = chunk.format
            self._append(
                Started(
                    request_id=self.request_id,
                    attempt=self.number,
                    seq=self.next_seq,
                    format=chunk.format,
                    video=chunk.video,
                )
            )

    def _on_output(self) -> None:
        self._chunks += 1
        if self._first_output_at is None:
            self._first_output_at = trio.current_time()

    def finish(self, end: RunResult) -> RunResult:
        """Make the last frame; only the first call counts.

        Returns:
            the actual end; a cancel or a fault of the frames may have replaced the given one.
        """
        if self.ended or self.dropped:
            return end
        if self.cancel_reason is not None:
            # Even if the engine has just finished: chunks since the cancel are lost.
            end = RunResult(outcome="cancelled", report=end.report)
        if self._fault is not None:
            end = attrs.evolve(self._fault, report=self._fault.report or end.report)
        short = self.next_seq < self.from_seq  # the relay holds more frames of an earlier attempt than this one made
        if short and end.outcome == "completed":
            end = RunResult.failed(ErrorCode.ENGINE_FAILED, "the engine is not reproducible: it made less than before")
        self.outcome, self.report = end.outcome, end.report
        self.ended = True
        if short:
            self._end_at(self.from_seq, end)
        else:
            self._append_last(end)
        return end

    def _end_at(self, seq: int, end: RunResult) -> None:
        """Make `end` the only frame, with number `seq`."""
        self._end, self._base, self.next_seq = end, seq, seq
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
        """The figures sent in `completed`, at Trio time `now`."""
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
        if self._pictures:
            figures["pictures"] = self._pictures
        return figures

    def _append_audio(self, pcm: bytes) -> None:
        if prefix := audio_prefix(self.request_id, self.number):
            self._append_data(pack_audio(prefix, self.next_seq, pcm))
        else:
            self._append(Audio(request_id=self.request_id, attempt=self.number, seq=self.next_seq, pcm=pcm))

    def _append_output(self, chunk: OutputChunk) -> None:
        """Make one frame of a value; of binary that is larger than a message, several."""
        data = chunk.data
        parts = [data]
        if isinstance(data, bytes) and len(data) > MAX_BINARY_BYTES:
            parts = [data[start : start + MAX_BINARY_BYTES] for start in range(0, len(data), MAX_BINARY_BYTES)]
        for left, part in zip(range(len(parts) - 1, -1, -1), parts, strict=True):
            self._append(
                Output(
                    request_id=self.request_id,
                    attempt=self.number,
                    seq=self.next_seq,
                    data=part,
                    media_type=chunk.media_type,
                    more=True if left else None,
                )
            )

    def _append(self, frame: Frame) -> None:
        self._append_data(encode(frame))

    def _append_data(self, data: bytes) -> None:
        self.next_seq += 1
        self._frames.append(data)
        self._bytes += len(data)
        if self._bytes > self._max_bytes and not self.ended and self._fault is None:
            message = f"the result exceeds {self._max_bytes} bytes; ask for less, or raise the relay's max_result_bytes"
            self.fail(RunResult.failed(ErrorCode.RESULT_TOO_LARGE, message))
        self._on_frames(self)
