"""What is kept of how a request ended, besides its state, code and message. Pure."""

from typing import Self

import attrs
import msgpack

from protocol.wire.validators import Value

#: Largest `details` and largest `result` that are kept apart from the last frame, in bytes.
KEPT_BYTES = 4096


def _bounded(fields: dict[str, Value]) -> dict[str, Value]:
    """Leave out the values that do not fit; the last frame has them all."""
    kept: dict[str, Value] = {}
    size = 0
    for name, value in fields.items():
        size += len(msgpack.packb({name: value}))
        if size <= KEPT_BYTES:
            kept[name] = value
    return kept


@attrs.frozen(kw_only=True)
class Outcome:
    """How a request ended.

    Args:
        details: of a failure.
        retryable: whether the same request may succeed later; None if it has not failed.
        result: of a completed request; values that are too large to be kept are in the last frame only.
        run_s: how long its last attempt ran; None if there was none.
        audio_s: seconds of audio that it produced; None if it has no audio format.
        has_video: whether it has a video format.
        has_outputs: whether there are `output` frames among its frames.
        report: for operators only, what its attempts that did not complete printed.
    """

    details: dict[str, Value] = attrs.field(factory=dict, converter=_bounded)
    retryable: bool | None = None
    result: dict[str, Value] = attrs.field(factory=dict, converter=_bounded)
    run_s: float | None = None
    audio_s: float | None = None
    has_video: bool = False
    has_outputs: bool = False
    report: str = ""

    def pack(self) -> bytes:
        """Encode it for the store."""
        fields = attrs.asdict(self).items()
        packed: bytes = msgpack.packb({name: value for name, value in fields if value is not None})
        return packed

    @classmethod
    def unpack(cls, packed: bytes | None) -> Self:
        """Decode it; raises an exception if it is damaged. A record of an older relayd has none."""
        return cls(**msgpack.unpackb(packed)) if packed else cls()
