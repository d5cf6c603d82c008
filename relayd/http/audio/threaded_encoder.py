"""Encoders in threads, so that no codec keeps the loop from its other connections.

100 ms of 24 kHz mono take 0.8 ms of CPU as mp3, 0.4 as Opus, 1.0 as AAC, 0.1 as FLAC, and some 0.2 ms for the way to
a thread and back; a worker's message may hold 20 s. libav and libsoxr let go of the interpreter's lock while they work,
so what runs in a thread costs the loop little. What only moves bytes (`wav`, `pcm` as it comes) stays in the loop.
"""

import os

import attrs
import trio

from protocol.wire.structs import AudioFormat
from relayd.http.audio.encoder import PCM, Encoder, check_encoder, open_encoder

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("audio encoders")


def _threads() -> trio.CapacityLimiter:
    """Threads that may encode at once: one core is the loop's. A single one makes 100 s of mp3 in a second."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(max(1, len(os.sched_getaffinity(0)) - 1))
        _limiter.set(limiter)
        return limiter


@attrs.define(eq=False)
class Transcoder:
    """An encoder whose work is done in threads, one piece after the other.

    Cancellation: a piece that is being encoded is finished first, 1 ms for each 100 ms of it; the transcoder is then
    of no use any more.
    """

    encoder: Encoder

    async def feed(self, pcm: bytes) -> bytes:
        """As `Encoder.feed`."""
        if self.encoder.cheap:
            await trio.lowlevel.checkpoint()
            return self.encoder.feed(pcm)
        return await trio.to_thread.run_sync(self.encoder.feed, pcm, limiter=_threads())

    async def finish(self) -> bytes:
        """As `Encoder.finish`."""
        if self.encoder.cheap:
            await trio.lowlevel.checkpoint()
            return self.encoder.finish()
        return await trio.to_thread.run_sync(self.encoder.finish, limiter=_threads())


async def open_transcoder(name: str, source: AudioFormat, speed: float = 1.0) -> Transcoder:
    """A transcoder from `source` to the coding of this name.

    Raises:
        KeyError: there is no such coding.
        ValueError: the speed is out of its range.
        AudioExtraMissing: the packages that this takes are not installed.
    """
    encoder = await trio.to_thread.run_sync(open_encoder, name, source, speed, limiter=_threads())
    return Transcoder(encoder)


async def check_coding(name: str, speed: float = 1.0, source: AudioFormat = PCM) -> None:
    """As `check_encoder`, which may import for half a second.

    Raises:
        AudioExtraMissing: not without the extra.
    """
    await trio.to_thread.run_sync(check_encoder, name, speed, source, limiter=_threads())
