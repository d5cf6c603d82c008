"""Files that `relay` encodes itself; needs lameenc and the extra `[audio]`."""

from pathlib import Path

import pytest

from protocol.commands.wav_writer import ENCODED, AudioWriter, check_audio_name
from protocol.wire.structs import AudioFormat
from tests.support.audio_compare import decoded, of_pcm, spectral_likeness, speech_like

MONO = AudioFormat(sample_rate=24_000)
MAGIC = {"opus": b"OggS", "flac": b"fLaC", "aac": b"\xff\xf1"}
STEREO = AudioFormat(sample_rate=48_000, channels=2)


@pytest.mark.parametrize("form", [MONO, STEREO, AudioFormat(sample_rate=8_000), AudioFormat(sample_rate=96_000)])
@pytest.mark.parametrize("name", ["out.MP3", "out.opus", "out.flac", "out.ogg", "out.aac"])
def test_a_file_becomes_what_its_name_says(tmp_path: Path, name: str, form: AudioFormat) -> None:
    path, pcm = tmp_path / name, speech_like(form.sample_rate, 2.0, form.channels)
    check_audio_name(path)
    writer = AudioWriter(path)
    for _ in range(2):
        writer.begin(form)
        for begin in range(0, len(pcm), 10_000):
            writer.write(pcm[begin : begin + 10_000])
    assert writer.seconds == pytest.approx(2.0)
    writer.close()
    data, kind = path.read_bytes(), ENCODED[path.suffix.lower()]
    assert path.suffix == ".MP3" or data.startswith(MAGIC[kind])
    heard = decoded(data, kind)
    assert heard.duration_s == pytest.approx(2.0, abs=0.15)
    assert spectral_likeness(of_pcm(pcm, form), heard) > 0.95
