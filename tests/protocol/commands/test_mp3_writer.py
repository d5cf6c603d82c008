"""Files that `relay` encodes itself; needs lameenc, and PyAV to decode them again."""

from pathlib import Path

import pytest

from protocol.commands.wav_writer import AudioWriter
from protocol.wire.structs import AudioFormat
from tests.support.audio_compare import decoded, of_pcm, spectral_likeness, speech_like

MONO = AudioFormat(sample_rate=24_000)
STEREO = AudioFormat(sample_rate=48_000, channels=2)


@pytest.mark.parametrize("form", [MONO, STEREO, AudioFormat(sample_rate=8_000), AudioFormat(sample_rate=96_000)])
def test_a_name_of_mp3_gets_mp3(tmp_path: Path, form: AudioFormat) -> None:
    path, pcm = tmp_path / "out.MP3", speech_like(form.sample_rate, 2.0, form.channels)
    writer = AudioWriter(path)
    for _ in range(2):
        writer.begin(form)
        for begin in range(0, len(pcm), 10_000):
            writer.write(pcm[begin : begin + 10_000])
    assert writer.seconds == pytest.approx(2.0)
    writer.close()
    heard = decoded(path.read_bytes(), "mp3")
    assert heard.duration_s == pytest.approx(2.0, abs=0.1)
    assert spectral_likeness(of_pcm(pcm, form), heard) > 0.95
