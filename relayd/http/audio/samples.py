"""Samples as PyAV takes them. Needs the extra `[audio]`."""

from fractions import Fraction

from av.audio.frame import AudioFrame

from protocol.wire.structs import AudioFormat


def samples_frame(pcm: bytes, audio_format: AudioFormat, at: int) -> AudioFrame:
    """A frame of whole samples.

    Args:
        pcm: `pcm_s16le`, at least one sample.
        audio_format: of it.
        at: number of the first sample in its stream.
    """
    frame = AudioFrame(
        format="s16",
        layout="stereo" if audio_format.channels == 2 else "mono",
        samples=len(pcm) // audio_format.sample_bytes,
    )
    frame.planes[0].update(pcm)
    frame.sample_rate = audio_format.sample_rate
    frame.time_base = Fraction(1, audio_format.sample_rate)
    frame.pts = at
    return frame
