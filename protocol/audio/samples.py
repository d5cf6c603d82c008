"""Converts samples to PyAV's frames. Needs the extra `[audio]`."""

from fractions import Fraction

from av.audio.frame import AudioFrame

from protocol.wire.structs import AudioFormat


def samples_frame(pcm: bytes, audio_format: AudioFormat, at: int) -> AudioFrame:
    """Make a frame of whole samples.

    Args:
        pcm: at least one sample, as `pcm_s16le`.
        audio_format: the format of `pcm`.
        at: index of the first sample in its stream.
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
