"""Runs encoders in threads, so that codecs do not delay the event loop.

Encoding 100 ms of 24 kHz mono takes 0.8 ms of CPU time as mp3, 0.4 as Opus, 1.0 as AAC, 0.1 as FLAC, and some 0.2 ms
for the thread switch; a worker's message may hold 20 s. libav and libsoxr release the GIL while they work, so the event
loop hardly notices. Encoders that only copy bytes (`wav`, `pcm` without conversion) run in the event loop.
"""

import os

import attrs
import trio

from protocol.audio.encoder import PCM, Encoder, check_encoder, open_encoder
from protocol.wire.structs import AudioFormat

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("audio encoders")


def _threads() -> trio.CapacityLimiter:
    """Return the limiter of encoder threads, which leaves one core to the event loop.

    One thread encodes 100 s of mp3 per second.
    """
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(max(1, len(os.sched_getaffinity(0)) - 1))
        _limiter.set(limiter)
        return limiter


@attrs.define(eq=False)
class Transcoder:
    """Runs an encoder in threads, one piece after the other.

    Cancellation: takes effect when the current piece is encoded, about 1 ms per 100 ms of audio; the transcoder is
    unusable afterwards.
    """

    encoder: Encoder

    async def feed(self, pcm: bytes) -> bytes:
        """See `Encoder.feed`."""
        if self.encoder.cheap:
            await trio.lowlevel.checkpoint()
            return self.encoder.feed(pcm)
        return await trio.to_thread.run_sync(self.encoder.feed, pcm, limiter=_threads())

    async def finish(self) -> bytes:
        """See `Encoder.finish`."""
        if self.encoder.cheap:
            await trio.lowlevel.checkpoint()
            return self.encoder.finish()
        return await trio.to_thread.run_sync(self.encoder.finish, limiter=_threads())


async def open_transcoder(name: str, source: AudioFormat, speed: float = 1.0) -> Transcoder:
    """Make a transcoder from `source` to a coding.

    Raises:
        KeyError: the coding does not exist.
        ValueError: the speed is out of range.
        AudioExtraMissing: the packages it needs are not installed.
    """
    encoder = await trio.to_thread.run_sync(open_encoder, name, source, speed, limiter=_threads())
    return Transcoder(encoder)


async def check_coding(name: str, speed: float = 1.0, source: AudioFormat = PCM) -> None:
    """Run `check_encoder` in a thread, because its imports may take half a second.

    Raises:
        AudioExtraMissing: the packages it needs are not installed.
    """
    await trio.to_thread.run_sync(check_encoder, name, speed, source, limiter=_threads())
