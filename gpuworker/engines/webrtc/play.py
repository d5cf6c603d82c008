"""What is played on a peer: sound, encoded once, and the pictures that belong to it.

Two threads fill a play, at most `AHEAD_S` ahead of what is heard; the peer's loop empties it, slot by slot.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator

import av

from gpuworker.engines.base import EngineError, RunStopped
from protocol.wire.ivf import PTS_HZ, Picture
from protocol.wire.structs import AudioFormat

OPUS_HZ = 48_000
#: One packet of sound, and the unit in which peers are served.
SLOT_S = 0.02
SLOT_SAMPLES = round(OPUS_HZ * SLOT_S)
SLOT_TICKS = round(PTS_HZ * SLOT_S)
BITS_S = 32_000
#: A play waits with what has come until there is so much of it, at its beginning; where it had to stop, until there is
#: twice as much as the time before: whoever makes sound no faster than it is heard must not make it stutter.
READY_PACKETS = 5
MOST_READY_PACKETS = 40
#: At its beginning, it also waits for its first picture, for so long at most: pictures are made from the sound.
FIRST_PICTURE_S = 0.3
AHEAD_S = 2.0
AHEAD_PACKETS = round(AHEAD_S / SLOT_S)
#: Pictures may be more than the sound that is there, by as much again.
AHEAD_PICTURES = 256
#: `played` is told after so many packets.
TELL_PACKETS = 10


class SpeechEncoder:
    """Makes Opus packets of PCM, whatever its rate.

    Args:
        sound: the format of the PCM, 16 bits little-endian.
    """

    def __init__(self, sound: AudioFormat) -> None:
        self._format = sound
        self._layout = "mono" if sound.channels == 1 else "stereo"
        self._rest = b""
        self._resampler = av.AudioResampler(format="s16", layout=self._layout, rate=OPUS_HZ, frame_size=SLOT_SAMPLES)
        encoder = av.CodecContext.create("libopus", "w")
        assert isinstance(encoder, av.AudioCodecContext)
        encoder.sample_rate, encoder.layout, encoder.format = OPUS_HZ, self._layout, "s16"
        encoder.bit_rate = BITS_S * sound.channels
        encoder.options = {"application": "voip", "frame_duration": "20"}
        self._encoder = encoder
        #: Samples of the input so far.
        self.samples = 0

    def encode(self, pcm: bytes) -> list[bytes]:
        """The packets that are whole now."""
        pcm = self._rest + pcm
        count = len(pcm) // self._format.sample_bytes
        whole = count * self._format.sample_bytes
        pcm, self._rest = pcm[:whole], pcm[whole:]
        if not count:
            return []
        self.samples += count
        frame = av.AudioFrame(format="s16", layout=self._layout, samples=count)
        frame.sample_rate = self._format.sample_rate
        frame.planes[0].update(pcm)
        return self._packets(self._resampler.resample(frame))

    def finish(self) -> list[bytes]:
        """The last packets."""
        if not self.samples:
            return []
        return [*self._packets(self._resampler.resample(None)), *map(bytes, self._encoder.encode(None))]

    def _packets(self, frames: Iterable[av.AudioFrame]) -> list[bytes]:
        packets = []
        for frame in frames:
            frame.pts = None
            packets += [bytes(packet) for packet in self._encoder.encode(frame)]
        return packets


def silent_packet() -> bytes:
    """A packet of silence that may be sent any number of times."""
    encoder = SpeechEncoder(AudioFormat(sample_rate=OPUS_HZ))
    return encoder.encode(bytes(2 * OPUS_HZ))[-1]


class Play:
    """One play, from its first sound to its last.

    Args:
        sound: the format of its sound.
        has_video: whether pictures come with it.

    Attributes:
        events: for who plays: samples heard so far; None at the end, or the error that ended it.
    """

    def __init__(self, sound: AudioFormat, *, has_video: bool) -> None:
        self.has_video = has_video
        self.events: queue.SimpleQueue[int | EngineError | None] = queue.SimpleQueue()
        self._rate = sound.sample_rate
        self._changed = threading.Condition()
        self._packets: deque[bytes] = deque()
        self._pictures: deque[Picture] = deque()
        #: Samples of the whole input, once all have come.
        self._total: int | None = None
        self._video_ended = not has_video
        self._closed = False
        # of the peer's loop
        self._sent = 0
        self._sounds = False
        self._ready = READY_PACKETS
        self._waits_since: float | None = None

    # -- for the threads that fill it

    def add_packets(self, packets: Iterable[bytes]) -> None:
        """Take sound; blocks while there is enough of it.

        Raises:
            RunStopped: nobody wants it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._packets) < AHEAD_PACKETS)
            self._refuse_if_closed()
            self._packets.extend(packets)

    def end_audio(self, samples: int) -> None:
        """All sound has been added; it was made of so many samples."""
        with self._changed:
            self._total = samples

    def add_picture(self, picture: Picture) -> None:
        """Take a picture; blocks while there are enough of them.

        Raises:
            RunStopped: nobody wants it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._pictures) < AHEAD_PICTURES)
            self._refuse_if_closed()
            self._pictures.append(picture)

    def end_video(self) -> None:
        """No further picture comes."""
        with self._changed:
            self._video_ended = True

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RunStopped("the play has ended")

    def close(self, end: EngineError | None = None) -> None:
        """It plays nothing more; in any thread, any number of times."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self.events.put(end)

    # -- for the peer's loop

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._closed

    @property
    def position_ticks(self) -> int:
        """Where the next packet of sound begins."""
        return self._sent * SLOT_TICKS

    @property
    def samples_played(self) -> int:
        """Samples of the input that were sent."""
        played = self._sent * SLOT_SAMPLES * self._rate // OPUS_HZ
        if self._total is None:
            return played
        return self._total if self.finished else min(played, self._total)

    def starts_slot(self, now: float) -> bytes | None:
        """The packet of sound for the next slot, which begins at `now` seconds; None if there is none.

        Call `ends_slot` after the pictures of the slot were taken, if there was one.
        """
        with self._changed:
            if self._closed or not self._packets:
                if self._sounds:
                    self._ready = min(2 * self._ready, MOST_READY_PACKETS)
                self._sounds, self._waits_since = False, None
                return None
            if not self._sounds and not self._may_sound(now):
                return None
            self._sounds = True
            packet = self._packets.popleft()
            self._changed.notify_all()
            return packet

    def _may_sound(self, now: float) -> bool:
        if len(self._packets) < self._ready and self._total is None:
            return False
        if self._waits_since is None:
            self._waits_since = now
        if self._sent or self._pictures or self._video_ended:
            return True
        return now - self._waits_since >= FIRST_PICTURE_S

    def ends_slot(self) -> None:
        """The packet was sent."""
        self._sent += 1
        if self._sent % TELL_PACKETS == 0:
            self.events.put(self.samples_played)

    @property
    def finished(self) -> bool:
        """Whether all sound was sent."""
        with self._changed:
            return self._total is not None and not self._packets

    def pop_pictures(self, before: int) -> Iterator[Picture]:
        """Take the pictures up to a time of the play, in 1/90000 s; none while it does not sound."""
        while True:
            with self._changed:
                if not self._sounds or not self._pictures or self._pictures[0].pts >= before:
                    return
                picture = self._pictures.popleft()
                self._changed.notify_all()
            yield picture
