"""Uploaded audio: what voxcpm would read of it, and nothing worse than an AudioFault for any bytes."""

import io
import struct
import tracemalloc
import warnings

import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuworker.engines.voxcpm.audio_decode import AudioFault, decode
from tests.support.recordings import RECORDINGS, make_recording, tone

RATE = 16_000
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "wav-8": ("WAV", "PCM_U8"),
    "wav-24": ("WAV", "PCM_24"),
    "wav-32": ("WAV", "PCM_32"),
    "wav-float": ("WAV", "FLOAT"),
    "wav-double": ("WAV", "DOUBLE"),
    "wav-alaw": ("WAV", "ALAW"),
    "wav-ulaw": ("WAV", "ULAW"),
    "wav-adpcm": ("WAV", "MS_ADPCM"),
    "wavex": ("WAVEX", "PCM_24"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}


def encode(samples: NDArray[np.float32], rate: int = RATE, name: str = "wav") -> bytes:
    kind, subtype = FORMATS[name]
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def load(data: bytes, rate: int) -> NDArray[np.float32]:
    """What voxcpm reads of it."""
    with warnings.catch_warnings():
        # audioread, which librosa imports at its first file, asks for these of Python 3.11.
        warnings.filterwarnings("ignore", "'(aifc|audioop|sunau)' is deprecated", DeprecationWarning)
        samples, _ = librosa.load(io.BytesIO(data), sr=rate, mono=True)
    return np.asarray(samples)


def fault(data: bytes, max_seconds: float = 50.0) -> str:
    with pytest.raises(AudioFault) as caught:
        decode(data, rate=RATE, max_seconds=max_seconds)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("given_rate", "rate"), [(48_000, 16_000), (16_000, 16_000), (24_000, 44_100), (8_000, 48_000)]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_bit_for_bit_those_librosa_loads(name: str, given_rate: int, rate: int, channels: int) -> None:
    data = encode(tone(1.003, given_rate, channels), given_rate, name)
    samples = decode(data, rate=rate, max_seconds=50)
    wanted = load(data, rate)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    np.testing.assert_array_equal(samples, wanted)
    assert 0.1 < np.abs(samples).max() < 1


def test_six_channels_over_many_blocks_are_mixed_as_librosa_mixes_them() -> None:
    data = encode(tone(10, 44_100, 6), 44_100, "wav-float")
    wanted = load(data, 48_000)
    np.testing.assert_array_equal(decode(data, rate=48_000, max_seconds=50), wanted)


def test_a_file_at_the_models_rate_is_not_touched() -> None:
    samples = tone(1)[:, 0]
    np.testing.assert_array_equal(decode(encode(samples, name="wav-float"), rate=RATE, max_seconds=50), samples)


def test_an_mp3_may_begin_with_a_tag() -> None:
    tag = b"ID3\x03\x00\x00\x00\x00\x00\x0a" + b"\x00" * 10
    data = encode(tone(1), name="mp3")
    assert len(decode(tag + data, rate=RATE, max_seconds=50)) == len(decode(data, rate=RATE, max_seconds=50))


# -- limits ------------------------------------------------------------------------------------------------------


def test_too_long_says_how_long_and_how_long_it_may_be() -> None:
    assert fault(encode(tone(3)), max_seconds=2.5) == "is 3 s long; give at most 2.5 s"
    assert fault(encode(tone(2.51)), max_seconds=2.5) == "is 2.6 s long; give at most 2.5 s"
    assert len(decode(encode(tone(2.5)), rate=RATE, max_seconds=2.5)) == 40_000


def test_too_short_says_so() -> None:
    assert fault(encode(tone(0.1999))) == "is 0.19 s long; give at least 0.2 s"
    assert fault(encode(tone(0))) == "is 0 s long; give at least 0.2 s"
    assert len(decode(encode(tone(0.2)), rate=RATE, max_seconds=1)) == 3_200


def test_a_silent_recording_is_refused() -> None:
    assert fault(encode(tone(1, level=0))) == "is silent (all samples are 0); give a recording of speech"
    assert fault(encode(tone(1, level=0.0005))).startswith("is silent (its loudest sample is at -66 dB)")
    left = tone(1)
    assert fault(encode(np.concatenate([left, -left], 1))).startswith("is silent")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_samples_that_are_no_numbers_are_refused(bad: float) -> None:
    samples = tone(1).astype(np.float64)
    samples[77] = bad
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="DOUBLE")
    assert fault(file.getvalue()) == "contains samples that are NaN or infinite; save it again, as 16-bit WAV"


def test_float_samples_on_another_scale_are_refused_and_a_little_over_full_scale_is_taken() -> None:
    assert fault(encode(tone(1, level=32_768), name="wav-float")) == (
        "has samples up to 32768, where full scale is 1; divide them by that"
    )
    assert decode(encode(tone(1, level=1.5), name="wav-float"), rate=RATE, max_seconds=2).max() == pytest.approx(1.5)


def test_a_rate_or_a_number_of_channels_that_no_recording_has_is_refused() -> None:
    assert fault(encode(tone(1, 1_000), 1_000)) == "has a sample rate of 1000 Hz; give 4000 to 384000 Hz"
    assert fault(encode(tone(0.01, 999_999), 999_999)).startswith("has a sample rate of 999999 Hz")
    assert fault(encode(tone(0.3, channels=9))) == "has 9 channels; give at most 8, preferably mono"
    data = encode(tone(1))
    for rate in (0, 2**31, 2**32 - 1):
        assert fault(data[:24] + struct.pack("<I", rate) + data[28:])


# -- bytes that are no audio --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"RIFF",
        b"hello, this is text",
        b"\0" * 1_000,
        b"%PDF-1.7",
        b"FORM\0\0\0\0AIFF",
    ],
)
def test_what_does_not_begin_as_audio_is_not_audio(data: bytes) -> None:
    assert fault(data) == "is not audio that can be read (WAV, FLAC, MP3, OGG)"


def test_another_format_that_libsndfile_knows_is_refused() -> None:
    file = io.BytesIO()
    soundfile.write(file, tone(1), RATE, format="AIFF")
    assert fault(file.getvalue()) == "is not audio that can be read (WAV, FLAC, MP3, OGG)"
    tag = b"ID3\x03\x00\x00\x00\x00\x00\x00"
    assert "read (WAV, FLAC, MP3, OGG)" in fault(tag + file.getvalue()) or "AIFF" in fault(tag + file.getvalue())


def test_a_damaged_file_says_what_to_do() -> None:
    words = fault(encode(tone(1))[:30])
    assert words.startswith(
        "is not audio that can be read (WAV, FLAC, MP3, OGG); save it again, for example as 16-bit WAV (libsndfile: "
    )


def flac_frames_told(data: bytes, frames: int) -> bytes:
    """With another number of samples in its STREAMINFO (36 bits at byte 21.5; RFC 9639, 8.2)."""
    return data[:21] + bytes([data[21] & 0xF0 | frames >> 32]) + (frames & 0xFFFFFFFF).to_bytes(4, "big") + data[26:]


def test_a_header_that_tells_too_little_does_not_let_more_through() -> None:
    data = flac_frames_told(encode(tone(30), name="flac"), 0)  # 0: not known
    assert fault(data, max_seconds=2) == "is too long; give at most 2 s"
    assert len(decode(data, rate=RATE, max_seconds=50)) == 30 * RATE


def test_a_header_that_tells_too_much_is_believed() -> None:
    data = flac_frames_told(encode(tone(1), name="flac"), 2**35)
    assert fault(data).endswith(" s long; give at most 50 s")


def test_a_wav_written_to_a_pipe_has_no_size_and_is_read() -> None:
    data = encode(tone(1))
    at = data.index(b"data")
    endless = data[:4] + b"\xff" * 4 + data[8 : at + 4] + b"\xff" * 4 + data[at + 8 :]
    np.testing.assert_array_equal(decode(endless, rate=RATE, max_seconds=50), decode(data, rate=RATE, max_seconds=50))


def test_an_hour_packed_into_little_is_cut_off_in_little_memory() -> None:
    hour = io.BytesIO()
    with soundfile.SoundFile(hour, "w", 48_000, 8, format="FLAC", subtype="PCM_16") as file:
        silence = np.zeros((48_000, 8), np.int16)
        for _ in range(600):
            file.write(silence)
    data = flac_frames_told(hour.getvalue(), 0)
    assert len(data) < 600_000
    tracemalloc.start()
    try:
        assert fault(data) == "is too long; give at most 50 s"
        assert tracemalloc.get_traced_memory()[1] < 50 * 48_000 * 4 + 2**23
    finally:
        tracemalloc.stop()


def test_a_million_empty_chunks_are_not_walked() -> None:
    data = encode(tone(1))
    assert fault(data[:12] + b"junk\0\0\0\0" * 1_000_000 + data[12:])


SEEDS = [
    encode(tone(0.5, 48_000 if name == "opus" else RATE), 48_000 if name == "opus" else RATE, name) for name in FORMATS
]


def fault_or_samples(data: bytes) -> str | NDArray[np.float32]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return decode(data, rate=24_000, max_seconds=2)
        except AudioFault as words:
            return str(words)


def check(found: str | NDArray[np.float32]) -> None:
    if isinstance(found, str):
        assert 0 < len(found) < 250
        assert "BytesIO" not in found
    else:
        assert 0.19 * 24_000 <= len(found) <= 2 * 24_000 + 1
        assert np.isfinite(found).all()


@settings(max_examples=300)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
def test_a_garbled_or_cut_file_is_audio_or_a_fault(
    seed: bytes, anywhere: list[tuple[float, int]], early: list[tuple[int, int]], keep: float
) -> None:
    data = bytearray(seed)
    for place, byte in anywhere:
        data[int(place * (len(data) - 1))] = byte
    for at, byte in early:
        data[at] = byte
    check(fault_or_samples(bytes(data)))
    check(fault_or_samples(bytes(data[: int(keep * len(data))])))


@settings(max_examples=200)
@given(
    st.sampled_from([b"", b"RIFF\x24\0\0\0WAVEfmt ", b"fLaC", b"OggS", b"ID3", b"\xff\xfb"]), st.binary(max_size=400)
)
def test_any_bytes_are_audio_or_a_fault(start: bytes, rest: bytes) -> None:
    check(fault_or_samples(start + rest))


# -- recordings of phones and browsers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "codec"), RECORDINGS)
@pytest.mark.parametrize("channels", [1, 2])
def test_recordings_of_phones_and_browsers_are_read(kind: str, codec: str, channels: int) -> None:
    samples = decode(make_recording(kind, codec, channels=channels), rate=RATE, max_seconds=50)
    assert len(samples) == pytest.approx(RATE, rel=0.06)
    middle = samples[RATE // 4 : RATE // 2]
    expected = np.mean(tone(1, channels=channels)[RATE // 4 : RATE // 2], axis=1)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(np.sqrt(np.mean(expected**2)), rel=0.1)


def test_a_recording_is_held_to_the_limits_and_a_damaged_one_says_what_to_do() -> None:
    data = make_recording("ipod", "aac", seconds=3)
    assert fault(data, max_seconds=2) == "is too long; give at most 2 s"
    assert fault(make_recording("webm", "libopus", seconds=0.1)).endswith("give at least 0.2 s")
    for damaged in (data[: len(data) // 2], b"\0\0\0\x20ftypM4A ", b"\0\0\0\x20ftypM4A " + bytes(1_000)):
        assert "ffmpeg -i recording.m4a recording.wav" in fault(damaged)


def test_a_recording_in_a_codec_that_nobody_knows_is_a_fault() -> None:
    data = make_recording("webm", "libopus")
    assert b"A_OPUS" in data
    assert "a codec that FFmpeg does not know" in fault(data.replace(b"A_OPUS", b"A_OPUX"))


@given(st.sampled_from(RECORDINGS), st.integers(0, 4_000), st.binary(max_size=40))
@settings(max_examples=60)
def test_a_garbled_recording_is_audio_or_a_fault(which: tuple[str, str], at: int, rest: bytes) -> None:
    data = make_recording(*which, seconds=0.5)
    check(fault_or_samples(data[:at] + rest + data[at + len(rest) :]))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (
            b"\0\0\0\x20ftypM4A ",
            "is MP4/AAC audio (a phone's recording), which is not read here; convert it: ffmpeg ",
        ),
        (b"\0\0\0\x18ftyp3gp4", "is MP4/AAC audio"),
        (b"\x1a\x45\xdf\xa3", "is WebM audio (a browser's recording)"),
        (b"\xff\xf1\x50\x80", "is AAC audio"),
        (b"#!AMR\n", "is AMR audio"),
        (b"caff\0\1\0\0", "is CAF audio"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "is WMA audio"),
    ],
)
def test_without_pyav_a_recording_is_named_with_the_command_that_converts_it(
    start: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuworker.engines.voxcpm.audio_decode.can_read", lambda: False)
    told = fault(start + bytes(100))
    assert told.startswith(words)
    assert told.endswith(" recording.wav")


# -- WAV without its size --------------------------------------------------------------------------------------------


def without_size(data: bytes, riff: int = 0) -> bytes:
    at = data.index(b"data")
    return data[:4] + riff.to_bytes(4, "little") + data[8 : at + 4] + bytes(4) + data[at + 8 :]


@pytest.mark.parametrize("riff", [0, 36, 2**32 - 1])
def test_a_wav_whose_recorder_was_killed_goes_on_to_its_end(riff: int) -> None:
    data = encode(tone(1))
    found = decode(without_size(data, riff), rate=RATE, max_seconds=50)
    np.testing.assert_array_equal(found, decode(data, rate=RATE, max_seconds=50))


def test_a_wav_without_a_size_may_have_other_chunks_before_it_and_half_a_sample_at_its_end() -> None:
    data = encode(tone(1))
    note = b"LIST" + (5).to_bytes(4, "little") + b"hello\0"
    found = decode(without_size(data[:36] + note + data[36:] + b"\1"), rate=RATE, max_seconds=50)
    np.testing.assert_array_equal(found, decode(data, rate=RATE, max_seconds=50))


def test_an_empty_wav_stays_empty_whatever_chunks_follow() -> None:
    data = encode(tone(1))
    empty = without_size(data)[: data.index(b"data") + 8]
    note = b"LIST" + (4000).to_bytes(4, "little") + bytes(4000)
    for found in (fault(empty), fault(empty + note)):
        assert found.startswith("is 0 s long")
