"""Streaming encoders for Opus, AAC and FLAC, with the FFmpeg libraries in PyAV. Needs the extra `[audio]`.

Every recipe minimizes the delay of the first sound: small frames, an Ogg page every 40 ms, and no
buffering in the muxer. The streams need no seeking.
"""

import os
from collections.abc import Callable, Mapping

import attrs
import av
from av.audio.stream import AudioStream

from protocol.audio.samples import samples_frame
from protocol.wire.structs import AudioFormat

#: Output buffer of the muxer; `flush_packets` empties it after every packet.
BUFFER_BYTES = 4096
#: `AVFMT_FLAG_BITEXACT` of libavformat.
BITEXACT = 0x400


@attrs.frozen(kw_only=True)
class Recipe:
    """How to produce one coding.

    Args:
        container: FFmpeg's name of the muxer.
        codec: FFmpeg's name of the encoder.
        rates_hz: supported sample rates; empty for nearly any.
        bits_s: bits per second for a sample rate and a number of channels; None for lossless codecs.
        codec_options: encoder options for a sample rate.
        container_options: options of the muxer.
    """

    container: str
    codec: str
    rates_hz: tuple[int, ...] = ()
    bits_s: Callable[[int, int], int] | None = None
    codec_options: Callable[[int], Mapping[str, str]] = lambda _rate_hz: {}
    container_options: Mapping[str, str] = attrs.field(factory=dict)

    def rate_for(self, source_hz: int) -> int:
        """Return the sample rate to encode at: the worker's own, or the next higher one, so that no band is lost."""
        if not self.rates_hz:
            # A FLAC frame gives its rate in Hz up to 65,535, or in tens of Hz (RFC 9639 section 9.1.2).
            return source_hz if source_hz <= 65_535 or source_hz % 10 == 0 else 96_000
        return min((rate for rate in self.rates_hz if rate >= source_hz), default=max(self.rates_hz))


def _speech_bits(rate_hz: int, channels: int) -> int:
    return channels * (64_000 if rate_hz < 32_000 else 96_000)


#: Below 16 kHz a frame of AAC lasts 70 to 130 ms.
_AAC_HZ = (16_000, 22_050, 24_000, 32_000, 44_100, 48_000)

RECIPES = {
    "opus": Recipe(
        container="ogg",
        codec="libopus",
        rates_hz=(8_000, 12_000, 16_000, 24_000, 48_000),
        bits_s=lambda _rate_hz, channels: 48_000 * channels,
        # Complexity 5 needs half the CPU time of 10.
        codec_options=lambda _rate_hz: {
            "application": "audio",
            "vbr": "constrained",
            "compression_level": "5",
            "frame_duration": "20",
        },
        container_options={"page_duration": "40000"},  # µs; the default is a page per second, sent when full
    ),
    "aac": Recipe(container="adts", codec="aac", rates_hz=_AAC_HZ, bits_s=_speech_bits),
    "flac": Recipe(
        container="flac",
        codec="flac",
        codec_options=lambda rate_hz: {"frame_size": str(rate_hz // 20), "compression_level": "5"},
        # The default is 8 KiB of padding at the start, for tags.
        container_options={"metadata_header_padding": "0"},
    ),
}


class _Sink:
    """The output file of the muxer. What is written elsewhere than at the end comes too late for a stream."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._at = self._end = 0
        #: The data that was written elsewhere, and where.
        self.patches: list[tuple[int, bytes]] = []

    def write(self, data: bytes) -> int:
        if self._at == self._end:
            self._pieces.append(bytes(data))
            self._end += len(data)
        else:
            self.patches.append((self._at, bytes(data)))
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def pop(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


class Codec:
    """Encodes one stream.

    Args:
        recipe: the coding to produce.
        source: the format of the input; its rate comes from `recipe.rate_for`.
    """

    def __init__(self, recipe: Recipe, source: AudioFormat) -> None:
        self._source = source
        self._fed = 0
        self._sink = _Sink()
        self._container = av.open(
            self._sink,
            "w",
            format=recipe.container,
            options={"flush_packets": "1", **recipe.container_options},
            buffer_size=BUFFER_BYTES,
        )
        stream = self._container.add_stream(recipe.codec, rate=source.sample_rate)
        assert isinstance(stream, AudioStream)
        self._stream = stream
        context = stream.codec_context
        context.layout = "stereo" if source.channels == 2 else "mono"
        if recipe.bits_s is not None:
            context.bit_rate = recipe.bits_s(source.sample_rate, source.channels)
        context.options = dict(recipe.codec_options(source.sample_rate))

    def make_repeatable(self) -> None:
        """Have equal input give equal output: an Ogg stream otherwise has a random number."""
        self._container.flags |= BITEXACT

    @property
    def patches(self) -> list[tuple[int, bytes]]:
        """See `Stage.patches`: the number of samples and their MD5 in a FLAC's header."""
        return self._sink.patches

    def feed(self, data: bytes) -> bytes:
        """Encode more samples; the first output begins with the header."""
        if data:
            frame = samples_frame(data, self._source, self._fed)
            self._fed += frame.samples
            self._container.mux(self._stream.encode(frame))
        return self._sink.pop()

    def finish(self) -> bytes:
        """Return the last frames and the end of the stream."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._sink.pop()
