"""Checks the pictures of a run: a fault of its engine is told in words, before anybody tries to show them."""

from gpuworker.engines.base import EngineError, VideoChunk
from gpuworker.engines.plain_values import plain
from protocol.wire.frames import MAX_BINARY_BYTES
from protocol.wire.ivf import is_key, key_size
from protocol.wire.structs import VideoFormat
from protocol.wire.validators import integer

_PTS_RULE = integer(0)


class Pictures:
    """The pictures of one run, in order.

    Args:
        video: their format, None if the engine has told none.
    """

    def __init__(self, video: VideoFormat | None) -> None:
        self._video = video
        self._last_pts = -1

    def fit(self, chunk: VideoChunk) -> VideoChunk:
        """The next one in a form that the wire accepts.

        Raises:
            EngineError: it cannot be sent, or not be shown after those before.
        """
        if self._video is None:
            raise EngineError("the engine made video before yielding its format: FormatChunk(format, video)")
        data, pts = plain(chunk.data), plain(chunk.pts)
        if not isinstance(data, bytes) or not data:
            raise self._fault("has no bytes; `data` is one encoded picture")
        if len(data) > MAX_BINARY_BYTES:
            raise self._fault(f"has {len(data)} bytes, and may have {MAX_BINARY_BYTES}; encode it smaller")
        try:
            _PTS_RULE(pts)
        except ValueError as refusal:
            raise self._fault(f"has a pts that {refusal}") from None
        if pts <= self._last_pts:
            raise self._fault(f"has pts {pts}, and the one before {self._last_pts}; it must grow")
        key, size = is_key(data), key_size(data)
        if bool(chunk.key) != key or key != (size is not None):
            raise self._fault(f"says key={bool(chunk.key)}, and its bytes are no such VP8; yield what its encoder says")
        if size is not None and size != (self._video.width, self._video.height):
            raise self._fault(f"is {size[0]}x{size[1]}, and the format says {self._video.width}x{self._video.height}")
        if self._last_pts < 0 and not key:
            raise self._fault("is no key frame, and nothing can be shown without one before it")
        self._last_pts = pts
        return VideoChunk(data, pts, key)

    def _fault(self, what: str) -> EngineError:
        which = "the engine's first picture" if self._last_pts < 0 else f"the picture after pts {self._last_pts}"
        return EngineError(f"{which} {what}")
