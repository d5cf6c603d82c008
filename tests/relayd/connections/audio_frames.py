"""Samples for workers to send, and the samples of the frames that a client received."""

from typing import Any

from protocol.wire.frames import (
    Audio,
)
from tests.support.fake_worker import samples

PCM = [samples(1200, seed) for seed in range(4)]


def heard(frames: list[Any]) -> bytes:
    return b"".join(frame.pcm for frame in frames if isinstance(frame, Audio))
