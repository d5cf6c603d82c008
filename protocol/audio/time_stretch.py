"""Changes the speed of speech without changing its pitch. Needs the extra `[audio]`."""

from fractions import Fraction

import av
from av.audio.frame import AudioFrame
from av.filter import Graph

from protocol.audio.samples import samples_frame
from protocol.wire.structs import AudioFormat

#: Range of one `atempo` filter: lower factors are not allowed, and above 2 it skips samples instead of blending them
#: (FFmpeg's documentation of the filter). Other speeds use two filters in a row.
MIN_TEMPO, MAX_TEMPO = 0.5, 2.0
#: Silence appended to the input, because the filter drops up to two windows at the end; a window has 30 to 60 ms,
#: depending on the sample rate.
PADDING_S = 0.2


class TimeStretch:
    """Changes the speed with FFmpeg's `atempo` (overlap-add of matching windows, which keeps the pitch).

    Delays audio by some 50 ms. The output has the duration of the input divided by the speed.

    Args:
        source: the format of the input and the output.
        speed: 0.25..4.
    """

    def __init__(self, source: AudioFormat, speed: float) -> None:
        self._source = source
        self._speed = speed
        self._fed = self._given = 0
        self._graph = graph = Graph()
        nodes = [
            graph.add_abuffer(
                format="s16",
                sample_rate=source.sample_rate,
                layout="stereo" if source.channels == 2 else "mono",
                time_base=Fraction(1, source.sample_rate),
            )
        ]
        nodes += [graph.add("atempo", f"{factor:.6f}") for factor in tempos(speed)]
        nodes.append(graph.add("abuffersink"))
        graph.link_nodes(*nodes).configure()

    def feed(self, data: bytes) -> bytes:
        """Stretch more samples; returns what is ready."""
        if not data:
            return b""
        self._push(data)
        return self._ready()

    def finish(self) -> bytes:
        """Return the rest of the output."""
        if not self._fed:
            return b""  # a graph without input does not know its format
        left = round(self._fed / self._speed) - self._given
        self._push(bytes(round(PADDING_S * self._source.sample_rate) * self._source.sample_bytes))
        self._graph.push(None)
        return self._ready()[: max(0, left) * self._source.sample_bytes]

    def _push(self, data: bytes) -> None:
        frame = samples_frame(data, self._source, self._fed)
        self._fed += frame.samples
        self._graph.push(frame)

    def _ready(self) -> bytes:
        ready: list[bytes] = []
        while True:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return b"".join(ready)
            assert isinstance(frame, AudioFrame)
            self._given += frame.samples
            ready.append(bytes(frame.planes[0])[: frame.samples * self._source.sample_bytes])


def tempos(speed: float) -> list[float]:
    """Return factors within the range of one filter, whose product is `speed`."""
    return [speed] if MIN_TEMPO <= speed <= MAX_TEMPO else [speed**0.5] * 2
