"""Decodes uploaded audio to the samples that prompt a model: mixed to mono, resampled, and checked against limits.

The bytes may be anything: how much of them is read, and for how long, is bounded by the limits and never by what a
header claims. The samples equal those of `librosa.load(file, sr=rate)` bit for bit, which is what voxcpm itself reads.
"""

import io
import math
from collections.abc import Iterable
from itertools import repeat, takewhile
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from gpuworker.engines.voxcpm.recording_formats import (
    NotReadable,
    RecordingFormat,
    can_read,
    open_recording,
    recognize,
)

#: File signatures. libsndfile knows 20 more formats, most of them read by code that is rarely reviewed.
_STARTS = (b"fLaC", b"OggS", b"ID3")
#: libsndfile's names for the accepted formats; an ID3 tag may precede other formats.
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
READABLE = "WAV, FLAC, MP3, OGG"

#: From the lowest rate used in telephony to the highest used in studios.
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_CHANNELS = 8
#: Audio whose loudest sample is below this counts as silent: -60 dBFS, below the noise of a quiet room.
SILENT = 1e-3
#: Float samples and lossy decoders go slightly over full scale; a file 20 dB over it uses another scale.
MAX_PEAK = 10.0
#: Frames read at a time: 2 MiB with 8 channels.
BLOCK_FRAMES = 65_536


class AudioFault(ValueError):
    """The audio cannot be used; the message continues after the input's name and says what to do."""


class _Straight(soundfile.SoundFile):
    """A file that is read from its beginning to its end, without seeking.

    soundfile seeks after each read, to the current position. That fails at the end of a file of unknown length.
    """

    def seekable(self) -> bool:
        return False


def decode(data: bytes, *, rate: int, max_seconds: float, min_seconds: float = 0.2) -> NDArray[np.float32]:
    """Decode the samples of an audio file.

    Args:
        data: a WAV, FLAC, MP3 or OGG (Vorbis, Opus) file, whatever its name or media type;
            with PyAV also the formats of `recording_formats`.
        rate: Hz of the samples returned.
        max_seconds: longer audio is rejected; at most this much (and one block) is decoded.
        min_seconds: shorter audio is rejected.

    Returns:
        float32, shape (n,), mono, -1..1, or slightly beyond if a lossy or float file goes beyond.

    Raises:
        AudioFault: it is not audio in one of these formats, is too long, too short or silent, or contains NaN or
            infinity. Nothing else is raised, whatever the bytes are.
    """
    if (kind := recognize(data)) is not None:
        samples, given_rate = _read_recording(data, kind, max_seconds)
    elif not _may_be_audio(data):
        raise AudioFault(f"is not audio that can be read ({READABLE})")
    else:
        samples, given_rate = _read_file(_with_size(data), max_seconds)
    if (seconds := len(samples) / given_rate) < min_seconds:
        raise AudioFault(f"is {math.floor(seconds * 100) / 100:g} s long; give at least {min_seconds:g} s")
    peak = float(np.max(np.abs(samples)))
    if peak < SILENT:
        level = f"its loudest sample is at {20 * math.log10(peak):.0f} dB" if peak else "all samples are 0"
        raise AudioFault(f"is silent ({level}); give a recording of speech")
    return _resample(samples, given_rate, rate)


def _may_be_audio(data: bytes) -> bool:
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return True
    # A frame of MPEG audio begins with 11 bits that are set (ISO 11172-3, 2.4.2.3).
    return data.startswith(_STARTS) or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0)


def _with_size(data: bytes) -> bytes:
    """A WAV whose size is written only when it is closed, with the size that it has: recorders are killed, pipes end.

    A data chunk of size 0 goes on to the end of the file, unless what follows are the file's further chunks.
    """
    at = 12
    while data[:4] == b"RIFF" and at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"data":
            rest = len(data) - at - 8
            if size or not rest or _are_chunks(data, at + 8):
                break
            return data[: at + 4] + rest.to_bytes(4, "little") + data[at + 8 :]
        at += 8 + size + size % 2
    return data


def _are_chunks(data: bytes, at: int) -> bool:
    """Whether chunks with printable names fill the file from `at` to its end."""
    while at + 8 <= len(data) and all(32 <= byte < 127 for byte in data[at : at + 4]):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return at in (len(data), len(data) + 1)


def _read_file(data: bytes, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """All of the audio, mono, and its rate."""
    try:
        with _Straight(io.BytesIO(data)) as file:
            if file.format not in _FORMATS:
                raise AudioFault(f"is {file.format} audio; give {READABLE}")
            _check_format(file.samplerate, file.channels)
            # A stream written without knowing its length reports 2**63 - 1: then only reading it shows the length.
            if math.floor(max_seconds * file.samplerate) < file.frames < 2**62:
                seconds = math.ceil(file.frames / file.samplerate * 10) / 10
                raise AudioFault(f"is {seconds:.10g} s long; give at most {max_seconds:g} s")
            buffer = np.empty((BLOCK_FRAMES, file.channels), np.float32)
            blocks = takewhile(len, (file.read(out=buffer) for _ in repeat(None)))
            return _mixed(blocks, file.samplerate, max_seconds), file.samplerate
    except soundfile.LibsndfileError as fault:
        raise AudioFault(
            f"is not audio that can be read ({READABLE}); save it again, for example as 16-bit WAV "
            f"(libsndfile: {fault.error_string.strip()})"
        ) from None


def _read_recording(data: bytes, kind: RecordingFormat, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """As `_read_file`, of a format that only PyAV reads."""
    if not can_read():
        raise AudioFault(kind.advice)
    try:
        recording = open_recording(data, kind)
        _check_format(recording.rate, recording.channels)
        return _mixed(recording.samples, recording.rate, max_seconds), recording.rate
    except NotReadable as fault:
        raise AudioFault(f"{kind.advice} (FFmpeg: {fault})") from None


def _check_format(rate: int, channels: int) -> None:
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise AudioFault(f"has a sample rate of {rate} Hz; give {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioFault(f"has {channels} channels; give at most {MAX_CHANNELS}, preferably mono")


def _mixed(read: Iterable[NDArray[Any]], rate: int, max_seconds: float) -> NDArray[np.float32]:
    """Blocks of shape (n, channels) as one, mono."""
    blocks, frames = [np.zeros(0, np.float32)], 0
    for block in read:
        frames += len(block)
        if frames > math.floor(max_seconds * rate):
            raise AudioFault(f"is too long; give at most {max_seconds:g} s")
        if not len(block):
            continue
        peak = np.max(np.abs(block))
        if not np.isfinite(peak):
            raise AudioFault("contains samples that are NaN or infinite; save it again, as 16-bit WAV")
        if peak > MAX_PEAK:
            raise AudioFault(f"has samples up to {peak:g}, where full scale is 1; divide them by that")
        # Add in the order of librosa.to_mono: another order changes the last bits.
        blocks.append(np.mean(block.T, axis=0))
    return np.concatenate(blocks)


def _resample(samples: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Resample like librosa.resample with soxr_hq, which also adjusts the length."""
    if from_hz == to_hz:
        return samples
    resampled = np.asarray(soxr.resample(samples, from_hz, to_hz, quality="HQ"), np.float32)
    length = math.ceil(len(samples) * (to_hz / from_hz))
    return np.pad(resampled[:length], (0, max(0, length - len(resampled))))
