"""Speech faster or slower at its own pitch. Needs the extra `[audio]`."""

from fractions import Fraction

import av
from av.audio.frame import AudioFrame
from av.filter import Graph

from protocol.wire.structs import AudioFormat
from relayd.http.audio.samples import samples_frame

#: What one `atempo` does: it goes no lower, and above it leaves samples out instead of blending them (FFmpeg's
#: documentation of the filter). What is further away is done by two in a row.
LOWEST, HIGHEST = 0.5, 2.0
#: Silence that follows the last sample: at its end the filter drops up to two windows, of 30 to 60 ms by the rate.
AFTER_S = 0.2


class TimeStretch:
    """Another speed, by FFmpeg's `atempo` (overlap-add of windows that match, so the pitch stays).

    It holds back some 50 ms of audio. What comes back is as long as what was fed, divided by the speed.

    Args:
        source: what is fed, and what comes back.
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
        """What `data` made ready."""
        if not data:
            return b""
        self._push(data)
        return self._ready()

    def finish(self) -> bytes:
        """What was held back."""
        if not self._fed:
            return b""  # a graph that was fed nothing does not know its format
        left = round(self._fed / self._speed) - self._given
        self._push(bytes(round(AFTER_S * self._source.sample_rate) * self._source.sample_bytes))
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
    """Factors within what one filter does well, whose product is `speed`."""
    return [speed] if LOWEST <= speed <= HIGHEST else [speed**0.5] * 2
