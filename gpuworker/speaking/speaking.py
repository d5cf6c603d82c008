"""Lets any engine with a param `text` speak a text that is still being written, as the live input `text`.

The text is cut at the ends of sentences, and spoken piece after piece in the same slot: one request keeps one slot and
one place in the queue. The same text makes the same pieces however it comes, so a reproducible engine remains so.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    FormatChunk,
    InvalidParams,
    MarkChunk,
    ProgressChunk,
    VideoChunk,
)
from gpuworker.speaking.live_text import MOST_CHARS, pieces_of
from protocol.wire.ivf import PTS_HZ
from protocol.wire.params_schema import takes_text
from protocol.wire.structs import InputRule
from protocol.wire.validators import Value

TEXT = "text"


def _text_schema(capabilities: Capabilities) -> Value:
    """The schema of the param that a live text may take the place of; None if there is none."""
    schema = capabilities.params.get("properties", {}).get(TEXT)
    return schema if TEXT not in capabilities.inputs and takes_text(schema, "") else None


def with_live_text(capabilities: Capabilities) -> Capabilities:
    """The capabilities of an engine, with the live input `text` if it has a param `text`, and no input of that name."""
    if _text_schema(capabilities) is None:
        return capabilities
    rule = InputRule(media_types=["text/plain"], live=True)
    return attrs.evolve(capabilities, inputs={**capabilities.inputs, TEXT: rule})


def is_live_text(engine: Engine, inputs: Mapping[str, Any]) -> bool:
    """Whether the text of a request is its input, and not a param."""
    return TEXT in inputs and _text_schema(engine.capabilities) is not None


def speak(
    engine: Engine, params: dict[str, Value], inputs: Mapping[str, Any], context: Mapping[str, Any]
) -> Iterator[Chunk]:
    """Run a request whose text is an input: the engine's chunks, piece after piece, and a mark after each.

    Args:
        engine: one to which `with_live_text` gave the input.
        params: of the request, with an empty `text`.
        inputs: of the request.
        context: what the engine's `generate` takes besides.

    Raises:
        EngineError: the text is empty or not UTF-8, a piece failed, or pieces have different formats.
    """
    capabilities = engine.capabilities
    formats = FormatChunk(None)
    if not capabilities.late_format:
        formats = FormatChunk(engine.format_for(params), engine.video_for(params))
    joint = _Joint(engine, formats)
    others = {name: given for name, given in inputs.items() if name != TEXT}
    say = engine.piecewise({name: value for name, value in params.items() if name != TEXT}, others, **context)
    most = max(1, min(MOST_CHARS, (_text_schema(capabilities) or {}).get("maxLength", MOST_CHARS)))
    for piece in pieces_of(inputs[TEXT].text(), most):
        yield from joint.chunks(say(piece.text))
        yield MarkChunk(piece.text_end, joint.samples)
    if not joint.pieces:
        raise InvalidParams({TEXT: "contains nothing to speak"})


class _Joint:
    """Makes one run of the chunks of several pieces.

    Attributes:
        pieces: that have been begun.
        samples: of audio so far.
    """

    def __init__(self, engine: Engine, formats: FormatChunk) -> None:
        self.pieces = 0
        self.samples = 0
        self._bytes = 0
        self._format = formats
        #: Time of the latest picture, and of the first one of this piece, in units of 1/90,000 s.
        self._last_pts, self._first_pts = -1, 0
        self._has_format = not engine.capabilities.late_format
        self._report = engine.report
        engine.report = lambda progress: self._report(self._progress(progress))

    def chunks(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks of the next piece.

        Raises:
            EngineError: its format is not that of the pieces before.
        """
        self.pieces += 1
        self._first_pts = self._next_pts()
        try:
            for chunk in chunks:
                if isinstance(chunk, FormatChunk) and self._has_format:
                    if chunk != self._format:
                        raise EngineError(
                            "the engine made pieces of one text in different formats; send the text as a param"
                        )
                    continue
                yield self._noted(chunk)
        finally:
            if (close := getattr(chunks, "close", None)) is not None:
                close()

    def _noted(self, chunk: Chunk) -> Chunk:
        if isinstance(chunk, ProgressChunk):
            return self._progress(chunk)
        if isinstance(chunk, FormatChunk):
            self._format, self._has_format = chunk, True
        elif isinstance(chunk, AudioChunk) and self._format.format is not None:
            self._bytes += len(chunk.pcm)
            self.samples = self._bytes // self._format.format.sample_bytes
        elif isinstance(chunk, VideoChunk):
            self._last_pts = self._first_pts + chunk.pts
            return attrs.evolve(chunk, pts=self._last_pts)
        return chunk

    def _next_pts(self) -> int:
        """When a picture behind the pieces so far is shown: where their audio ends, if they have any."""
        audio, video = self._format.format, self._format.video
        if audio is not None:
            return max(self._last_pts + 1, self.samples * PTS_HZ // audio.sample_rate)
        return self._last_pts + round(PTS_HZ / video.fps) if video is not None and self._last_pts >= 0 else 0

    def _progress(self, progress: ProgressChunk) -> ProgressChunk:
        """The progress of the run, which nobody knows: it grows with each piece, and never reaches 1."""
        done = self.pieces - 1 + min(1.0, max(0.0, progress.fraction))
        return attrs.evolve(progress, fraction=done / (1 + done))
