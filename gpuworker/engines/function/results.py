"""Converts what a served function returns to chunks. numpy is imported only when an array is returned."""

import importlib
from collections.abc import Iterator
from numbers import Integral
from typing import Any

from gpuworker.engines.base import (
    AudioChunk,
    Chunk,
    EngineError,
    FormatChunk,
    MarkChunk,
    OutputChunk,
    ProgressChunk,
    VideoChunk,
)
from gpuworker.engines.plain_values import is_array
from protocol.wire.structs import AudioFormat

#: IPython's methods of objects that are pictures, and what they return.
_PICTURES = {"_repr_png_": "image/png", "_repr_jpeg_": "image/jpeg"}


class Results:
    """Converts the values of one run to chunks.

    Args:
        format: of its audio if it is known in advance; then no `FormatChunk` is made.

    Attributes:
        has_format: the format is settled, in advance or by a chunk.
    """

    def __init__(self, format: AudioFormat | None) -> None:  # noqa: A002 - the name used on the wire
        self._ahead = format is not None
        self._format = format
        self._rest = b""
        self.has_format = self._ahead

    def chunks(self, value: Any) -> Iterator[Chunk]:
        """The chunks of one value.

        Raises:
            EngineError: it cannot be output, or it is audio whose format is unknown or differs from earlier audio.
        """
        if value is None:
            return
        if isinstance(value, FormatChunk):
            if not self.has_format:
                self._format, self.has_format = value.format, True
                yield value
        elif isinstance(value, AudioChunk | VideoChunk | OutputChunk | ProgressChunk | MarkChunk):
            if isinstance(value, AudioChunk) and self._format is None:
                raise EngineError("an AudioChunk came before a FormatChunk; give -o sample_rate=… or yield one first")
            yield from self._after_format(None, value)
        elif isinstance(value, tuple) and len(value) == 2 and _is_rate(value[0]) and is_array(value[1]):
            yield from self._array(value[1], int(value[0]))
        elif is_array(value) and value.shape:
            yield from self._array(value, None)
        elif isinstance(value, bytes | bytearray | memoryview) and self._ahead:
            yield from self._audio(bytes(value))
        else:
            yield from self._after_format(None, declared_output(value) or OutputChunk(value))

    def _after_format(self, format: AudioFormat | None, chunk: Chunk) -> Iterator[Chunk]:  # noqa: A002
        if not self.has_format:
            self._format, self.has_format = format, True
            yield FormatChunk(format)
        yield chunk

    def _array(self, array: Any, sample_rate: int | None) -> Iterator[Chunk]:
        if sample_rate is None and self._format is None:
            raise EngineError(
                "the function returned an array without its rate: return (sample_rate, array), or give "
                "-o sample_rate=…; if it is no audio, return array.tolist()"
            )
        pcm, channels = array_pcm(array)
        try:
            format_ = AudioFormat(sample_rate=sample_rate or self._format.sample_rate, channels=channels)  # type: ignore[union-attr]
        except ValueError as fault:
            raise EngineError(f"the function's audio: {fault}") from None
        if self.has_format and format_ != self._format:
            raise EngineError(
                f"the function's audio is {_describe(format_)}; the request's format is {_describe(self._format)}"
            )
        yield from self._after_format(format_, AudioChunk(pcm))

    def _audio(self, pcm: bytes) -> Iterator[Chunk]:
        """Yield bytes of audio; an incomplete sample waits for the rest."""
        assert self._format is not None
        pcm = self._rest + pcm
        whole = len(pcm) - len(pcm) % self._format.sample_bytes
        self._rest = pcm[whole:]
        if whole:
            yield AudioChunk(pcm[:whole])


def declared_output(value: Any) -> OutputChunk | None:
    """The output for an object that declares what it is; None for any other value.

    It has bytes or text in `data` and a `media_type`, as an `EngineInput` has, or it can show itself to a notebook as a
    PNG or JPEG, as images of PIL can.
    """
    if isinstance(value, type):
        return None
    data, media_type = getattr(value, "data", None), getattr(value, "media_type", None)
    if isinstance(media_type, str) and isinstance(data, bytes | bytearray | memoryview | str):
        return OutputChunk(data, media_type)
    for name, kind in _PICTURES.items():
        picture = getattr(value, name, None)
        if callable(picture) and isinstance(drawn := picture(), bytes):
            return OutputChunk(drawn, kind)
    return None


def _describe(format_: AudioFormat | None) -> str:
    return "none" if format_ is None else f"{format_.sample_rate} Hz, {format_.channels} channel(s)"


def _is_rate(value: Any) -> bool:
    """Whether it is a whole number, perhaps of numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def array_pcm(array: Any) -> tuple[bytes, int]:
    """Convert an array of samples to (pcm, channels).

    Args:
        array: numpy array or torch tensor; float -1..1 (more is clipped), int16 or int32; shape (n,), (n, 1), (n, 2),
            (1, n) or (2, n).

    Raises:
        EngineError: it has another dtype or shape, or contains NaN.
    """
    numpy = importlib.import_module("numpy")
    if hasattr(array, "detach"):  # torch, perhaps on the GPU, perhaps bfloat16, which numpy lacks
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    samples = numpy.asarray(array)
    if samples.ndim == 2 and samples.shape[0] <= 2 < samples.shape[1]:
        samples = samples.T
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.shape[1] not in (1, 2):
        raise EngineError(f"an array of shape {samples.shape} is not audio; return (n,), (n, 2) or (2, n)")
    if samples.dtype.kind == "f":
        if numpy.isnan(samples).any():
            raise EngineError("the audio array contains NaN")
        samples = numpy.round(numpy.clip(samples, -1.0, 1.0) * 32767.0)
    elif samples.dtype == numpy.int32:
        samples = samples >> 16
    elif samples.dtype != numpy.int16:
        raise EngineError(f"an array of {samples.dtype} is not audio; return float, int16 or int32")
    return samples.astype("<i2").tobytes(), samples.shape[1]
