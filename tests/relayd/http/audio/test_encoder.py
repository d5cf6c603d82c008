"""What the encoders send is what was spoken, and is sent while it is spoken."""

import builtins
import io
import itertools
import subprocess
import sys
import wave
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import soundfile
import trio

from protocol.audio.encoder import (
    CODINGS,
    PCM,
    AudioExtraMissing,
    Encoder,
    check_encoder,
    open_encoder,
)
from protocol.wire.structs import AudioFormat
from relayd.http.audio.threaded_encoder import check_coding, open_transcoder
from tests.support.audio_compare import decoded, energy_likeness, of_pcm, spectral_likeness, speech_like

ALL = tuple(CODINGS)
LOSSLESS = ("flac", "wav")
CODECS = ("mp3", "opus", "aac", "flac")
#: Codecs pad at both ends, AAC by 1,024 samples each.
PADDING_S = 0.15


def pieces(pcm: bytes, audio_format: AudioFormat, ms: int = 100) -> Iterator[bytes]:
    size = audio_format.sample_rate * ms // 1000 * audio_format.sample_bytes
    for begin in range(0, len(pcm), size):
        yield pcm[begin : begin + size]


def encode(encoder: Encoder, parts: Sequence[bytes] | Iterator[bytes]) -> bytes:
    return b"".join([*map(encoder.feed, parts), encoder.finish()])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 24_000, 44_100, 48_000, 192_000, 12_345])
@pytest.mark.parametrize("coding", ALL)
def test_what_is_heard_is_what_was_spoken(coding: str, rate_hz: int, channels: int) -> None:
    source = AudioFormat(sample_rate=rate_hz, channels=channels)
    pcm = speech_like(rate_hz, 3.0, channels)
    heard = decoded(encode(open_encoder(coding, source), pieces(pcm, source)), coding)
    spoken = of_pcm(pcm, source)
    assert heard.duration_s == pytest.approx(3.0, abs=0.01 if coding in (*LOSSLESS, "opus", "pcm") else PADDING_S)
    assert energy_likeness(spoken, heard) > 0.97
    assert spectral_likeness(spoken, heard) > 0.95


@pytest.mark.parametrize("coding", LOSSLESS)
@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 96_000])
def test_a_lossless_coding_keeps_every_sample(coding: str, rate_hz: int) -> None:
    source = AudioFormat(sample_rate=rate_hz)
    pcm = speech_like(rate_hz, 1.0)
    heard = decoded(encode(open_encoder(coding, source), pieces(pcm, source, 70)), coding)
    assert heard.rate_hz == rate_hz
    assert np.array_equal(heard.samples, of_pcm(pcm, source).samples)


def test_pcm_of_24_khz_mono_is_sent_as_it_came() -> None:
    pcm = speech_like(24_000, 0.5)
    assert encode(open_encoder("pcm", PCM), pieces(pcm, PCM)) == pcm


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.8, 1.25, 2.0, 4.0])
@pytest.mark.parametrize("coding", ["pcm", "mp3", "wav"])
def test_speed_changes_the_duration_and_not_the_pitch(coding: str, speed: float) -> None:
    source = AudioFormat(sample_rate=22_050)
    pcm = speech_like(22_050, 6.0)
    heard = decoded(encode(open_encoder(coding, source, speed), pieces(pcm, source)), coding)
    spoken = of_pcm(pcm, source)
    assert heard.duration_s == pytest.approx(6.0 / speed, abs=PADDING_S if coding == "mp3" else 0.01)
    assert spectral_likeness(spoken, heard) > 0.9
    assert energy_likeness(spoken, heard, speed) > (0.9 if speed < 3 else 0.8)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("coding", ALL)
def test_audio_is_sent_while_it_is_made(coding: str, channels: int) -> None:
    """After each 100 ms, all but the last 250 ms of what was fed can be heard from what was sent."""
    source = AudioFormat(sample_rate=24_000, channels=channels)
    encoder = open_encoder(coding, source)
    sent, fed_s = b"", 0.0
    for piece in pieces(speech_like(24_000, 2.0, channels), source):
        sent += encoder.feed(piece)
        fed_s += 0.1
        if fed_s >= 0.3:
            assert decoded(sent, coding).duration_s >= fed_s - 0.25, f"{fed_s:.1f} s were fed"


@pytest.mark.parametrize("coding", CODECS)
def test_what_was_cut_off_is_heard_up_to_there(coding: str) -> None:
    body = encode(open_encoder(coding, PCM), pieces(speech_like(24_000, 4.0), PCM))
    assert 1.0 < decoded(body[: len(body) // 2], coding).duration_s < 3.0


@pytest.mark.parametrize("coding", ALL)
@pytest.mark.parametrize("speed", [1.0, 2.0])
def test_no_audio_at_all_ends_quietly(coding: str, speed: float) -> None:
    body = open_encoder(coding, AudioFormat(sample_rate=22_050), speed).finish()
    assert len(body) < 400


@pytest.mark.parametrize("coding", ALL)
def test_one_sample_is_enough(coding: str) -> None:
    encode(open_encoder(coding, AudioFormat(sample_rate=22_050)), [b"\1\0"])


@pytest.mark.parametrize("speed", [1.0, 1.5])
@pytest.mark.parametrize("coding", ["wav", "flac", "pcm"])
def test_how_the_samples_are_cut_makes_no_difference(coding: str, speed: float) -> None:
    source = AudioFormat(sample_rate=22_050, channels=2)
    pcm = speech_like(22_050, 1.0, 2)
    whole = encode(open_encoder(coding, source, speed), [pcm])
    cuts = [0, 1, 6, 7, 4_001, 4_002, 30_000, 30_003, len(pcm)]
    cut = encode(open_encoder(coding, source, speed), [pcm[a:b] for a, b in itertools.pairwise(cuts)])
    heard, other = decoded(whole, coding), decoded(cut, coding)
    assert len(heard.samples) == len(other.samples)
    assert np.abs(heard.samples - other.samples).max() <= 3  # libsoxr's dither is drawn for each piece


def test_a_streamed_wav_is_read_to_its_end() -> None:
    source = AudioFormat(sample_rate=22_050, channels=2)
    pcm = speech_like(22_050, 1.0, 2)
    body = encode(open_encoder("wav", source), pieces(pcm, source))
    samples, rate_hz = soundfile.read(io.BytesIO(body), dtype="int16")
    assert rate_hz == 22_050
    assert samples.tobytes() == pcm
    with wave.open(io.BytesIO(body)) as reader:
        assert reader.readframes(len(pcm)) == pcm


def test_a_whole_wav_says_its_size() -> None:
    source = AudioFormat(sample_rate=22_050)
    pcm = speech_like(22_050, 1.0)
    encoder = open_encoder("wav", source)
    body = encoder.with_sizes(bytearray(encode(encoder, [pcm])))
    with wave.open(io.BytesIO(body)) as reader:
        assert reader.getnframes() == 22_050
        assert reader.readframes(22_050) == pcm


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("speed", [1.0, 1.5])
@pytest.mark.parametrize("coding", ALL)
def test_a_whole_body_says_how_long_it_is(coding: str, channels: int, speed: float) -> None:
    source = AudioFormat(sample_rate=24_000, channels=channels)
    pcm = speech_like(24_000, 3.0, channels)
    encoder = open_encoder(coding, source, speed)
    streamed = encode(encoder, pieces(pcm, source))
    body = encoder.with_sizes(bytearray(streamed))
    assert len(body) == len(streamed)
    if coding in LOSSLESS:
        assert soundfile.info(io.BytesIO(body)).frames == pytest.approx(72_000 / speed, abs=1)
        heard, _rate_hz = soundfile.read(io.BytesIO(body), dtype="int16")
        assert (speed != 1) or heard.tobytes() == pcm
    else:
        assert body == streamed


@pytest.mark.parametrize("speed", [0.0, 0.2, 4.1, float("nan"), float("inf")])
def test_a_speed_out_of_range_is_refused(speed: float) -> None:
    with pytest.raises(ValueError, match=r"speed must be 0.25 to 4.0"):
        open_encoder("wav", PCM, speed)


@pytest.fixture
def _without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("av", "soxr", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("codecs", "resampler", "time_stretch", "samples"):
        monkeypatch.delitem(sys.modules, f"protocol.audio.{name}", raising=False)


@pytest.mark.usefixtures("_without_the_extra")
@pytest.mark.parametrize(
    ("coding", "rate_hz", "speed"),
    [(c, 24_000, 1.0) for c in CODECS[1:]] + [("pcm", 22_050, 1.0), ("wav", 24_000, 2.0)],
)
def test_without_the_extra_the_error_says_how_to_install_it(coding: str, rate_hz: int, speed: float) -> None:
    with pytest.raises(AudioExtraMissing, match=r"pip install '\.\[audio\]'"):
        open_encoder(coding, AudioFormat(sample_rate=rate_hz), speed)


@pytest.mark.usefixtures("_without_the_extra")
def test_without_the_extra_wav_and_pcm_as_it_comes_are_made() -> None:
    source = AudioFormat(sample_rate=22_050)
    assert encode(open_encoder("wav", source), [b"\1\0" * 50])[44:] == b"\1\0" * 50
    assert encode(open_encoder("pcm", PCM), [b"\1\0" * 50]) == b"\1\0" * 50
    check_encoder("wav")
    check_encoder("pcm")
    assert decoded(encode(open_encoder("mp3", source), [speech_like(22_050, 1.0)]), "mp3").duration_s > 0.9
    with pytest.raises(AudioExtraMissing, match="24000 Hz mono, from a worker's 22050 Hz with 1 channel:"):
        check_encoder("pcm", source=source)


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    program = (
        "import sys, relayd.http.audio.threaded_encoder\n"
        "assert not {'av', 'soxr', 'numpy'} & sys.modules.keys(), 'imported at once'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.trio
async def test_threads_encode_what_the_loop_would() -> None:
    source = AudioFormat(sample_rate=22_050)
    pcm = speech_like(22_050, 1.0)
    for coding in ("mp3", "wav"):
        await check_coding(coding)
        transcoder = await open_transcoder(coding, source)
        made = [await transcoder.feed(piece) for piece in pieces(pcm, source)]
        made.append(await transcoder.finish())
        assert b"".join(made) == encode(open_encoder(coding, source), pieces(pcm, source))


@pytest.mark.trio
async def test_the_loop_goes_on_while_a_large_piece_is_encoded() -> None:
    pcm = speech_like(24_000, 20.0)
    transcoder = await open_transcoder("mp3", PCM)
    turns, done = 0, trio.Event()

    async def turn() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        await transcoder.feed(pcm)
        done.set()
    assert turns >= 3  # 200 ms of work; in the loop it would be one turn
