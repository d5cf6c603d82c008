"""Engines that hear, by the loop that every slot uses: what is cut, what is told of it, and which sound is read."""

import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuworker.engines.base import Chunk, Engine, EngineInput, FormatChunk, LiveInput, OutputChunk
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.mock import MockEngine
from gpuworker.hearing.sound import mono
from gpuworker.hearing.utterances import Began, Ended, Utterance, Utterances
from gpuworker.slots.run_engine import RunResult, run_engine
from protocol.wire.params_schema import check_params, check_schema
from protocol.wire.validators import Value

RATE = 16_000
L16 = f"audio/L16;rate={RATE};channels=1"
FRAME = RATE * 30 // 1000


def tone(seconds: float, rate: int = RATE) -> bytes:
    step = 2 * math.pi * 440 / rate
    return array("h", (round(8_000 * math.sin(step * at)) for at in range(round(seconds * rate)))).tobytes()


def silence(seconds: float, rate: int = RATE) -> bytes:
    return bytes(2 * round(seconds * rate))


#: A second of silence, one of speech, one of silence, half of speech, one of silence.
TWO = silence(1) + tone(1) + silence(1) + tone(0.5) + silence(1)


def fed(
    data: bytes, sizes: Sequence[int] = (3_200,), media_type: str = f"audio/L16;rate={RATE};channels=1"
) -> LiveInput:
    """A live input that has come in parts of these sizes, again and again."""
    live = LiveInput(media_type)
    at = turn = 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        live.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    live.feed(b"", last=True)
    return live


def a_mock(transcripts: str = "Good morning.|What time is it?", *options: str) -> MockEngine:
    engine = MockEngine(parse_options(MockEngine.OPTIONS, [f"transcripts={transcripts}", *options]))
    engine.load()
    return engine


def hear(
    given_input: LiveInput | EngineInput, engine: Engine | None = None, **params: Value
) -> tuple[RunResult, list[Value]]:
    chunks: list[Chunk] = []
    result = run_engine(engine or a_mock(), params, {"audio": given_input}, lambda: False, chunks.append)
    assert chunks[0] == FormatChunk(None)
    return result, [chunk.data for chunk in chunks if isinstance(chunk, OutputChunk)]


def text_of(told: list[Value]) -> str:
    return "".join(data for data in told if isinstance(data, str))


def events_of(told: list[Value], *names: str) -> list[Value]:
    return [data for data in told if isinstance(data, dict) and set(data) & set(names)]


def wav(pcm: bytes, rate: int = RATE, channels: int = 1, bits: int = 16, kind: int = 1) -> bytes:
    size = bits // 8 * channels
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, rate * size, size, bits)
    body = b"WAVE" + fmt + struct.pack("<4sI", b"data", len(pcm)) + pcm
    return b"RIFF" + struct.pack("<I", len(body)) + body


# -- cutting


def test_an_utterance_begins_with_speech_and_ends_with_the_silence_behind_it() -> None:
    result, told = hear(fed(TWO))
    assert result.outcome == "completed"
    assert text_of(told) == "Good morning.\nWhat time is it?"
    (began, ended, second, over) = events_of(told, "speech_started", "speech_stopped")
    assert began["speech_started"]["sample"] == pytest.approx(0.7 * RATE, abs=FRAME)  # 300 ms before the tone
    assert ended["speech_stopped"]["sample"] == pytest.approx(2.5 * RATE, abs=FRAME)
    assert second["speech_started"]["sample"] == pytest.approx(2.7 * RATE, abs=FRAME)
    assert over["speech_stopped"]["sample"] == pytest.approx(4.0 * RATE, abs=FRAME)
    assert [next(iter(data)) if isinstance(data, dict) else data for data in told][:7] == [
        "speech_started", "speech_stopped", "Good", "segment", " morning.", "segment", "utterance",
    ]  # fmt: skip
    assert told[-1] == {
        "finish_reason": "stop",
        "language": "en",
        "usage": {"type": "duration", "seconds": 4.5},
    }


def test_each_piece_of_the_transcript_says_when_it_was_said() -> None:
    _, told = hear(fed(TWO))
    (first, *_), (utterance, _) = events_of(told, "segment"), events_of(told, "utterance")
    place = utterance["utterance"]
    assert place["sample_rate"] == RATE
    assert first["segment"]["start"] == place["start"] == told[0]["speech_started"]["sample"]
    pieces = [event["segment"] for event in events_of(told, "segment")][:2]
    assert pieces[0]["end"] == pieces[1]["start"]
    assert pieces[1]["end"] == place["end"]


def test_without_turn_detection_all_is_one_utterance() -> None:
    _, told = hear(fed(TWO), turn_detection="none")
    assert text_of(told) == "Good morning."
    assert not events_of(told, "speech_started", "speech_stopped")
    assert events_of(told, "utterance") == [{"utterance": {"start": 0, "end": len(TWO) // 2, "sample_rate": RATE}}]


def test_silence_alone_and_no_sound_at_all_have_no_transcript() -> None:
    for data in (silence(3), b"", b"\0"):
        result, told = hear(fed(data))
        assert result.outcome == "completed"
        assert [set(each) for each in told] == [{"finish_reason", "language", "usage"}]


def test_a_click_is_no_speech_and_a_short_pause_ends_nothing() -> None:
    click = silence(1) + tone(0.05) + silence(1)
    assert text_of(hear(fed(click))[1]) == ""
    paused = silence(1) + tone(0.5) + silence(0.4) + tone(0.5) + silence(1)
    assert len(events_of(hear(fed(paused))[1], "utterance")) == 1
    assert len(events_of(hear(fed(paused), silence_ms=200)[1], "utterance")) == 2


def test_the_end_of_the_sound_ends_an_utterance() -> None:
    _, told = hear(fed(silence(0.2) + tone(0.71)))
    assert text_of(told) == "Good morning."
    assert events_of(told, "speech_stopped") == [{"speech_stopped": {"sample": round(0.91 * RATE)}}]


def test_whoever_never_falls_silent_is_cut_after_a_minute_and_nothing_is_lost() -> None:
    cutter = Utterances(8_000, lambda _frame: 1.0, threshold=0.5, silence_ms=500, prefix_ms=300)
    told = [*cutter.add(bytes(2 * 8_000 * 130)), *cutter.finish()]
    utterances = [event for event in told if isinstance(event, Utterance)]
    assert [round(len(each.pcm) / 16_000) for each in utterances] == [60, 60, 10]
    assert sum(len(each.pcm) for each in utterances) == 2 * 8_000 * 130


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9_999), min_size=1, max_size=5), as_wav=st.booleans())
def test_the_cuts_are_the_same_however_the_sound_comes(sizes: list[int], as_wav: bool) -> None:
    expected = hear(fed(TWO))
    if as_wav:
        assert hear(fed(wav(TWO), sizes, "audio/wav")) == expected
    else:
        assert hear(fed(TWO, sizes)) == expected


def test_speech_goes_on_at_a_likelihood_at_which_it_would_not_begin() -> None:
    likely = iter([0.6] * 4 + [0.4] * 40 + [0.1] * 40)
    cutter = Utterances(RATE, lambda _frame: next(likely), threshold=0.5, silence_ms=300, prefix_ms=0)
    told = list(cutter.add(bytes(2 * FRAME * 84)))
    assert [type(event) for event in told] == [Began, Ended, Utterance]
    assert told[1] == Ended(54 * FRAME)


# -- which sound is read


def test_all_wavs_and_rates_that_hold_the_same_are_heard_alike() -> None:
    stereo = array("h")
    for sample in array("h", TWO):
        stereo.extend((sample, sample))
    floats = struct.pack(f"<{len(TWO) // 2}f", *(sample / 32_767 for sample in array("h", TWO)))
    expected = hear(fed(TWO))[1]
    assert hear(EngineInput(wav(TWO), "audio/wav"))[1] == expected
    assert hear(EngineInput(wav(TWO), "application/octet-stream"))[1] == expected
    assert hear(EngineInput(wav(stereo.tobytes(), channels=2), "audio/x-wav"))[1] == expected
    assert hear(EngineInput(wav(floats, bits=32, kind=3), "audio/wav"))[1] == expected
    assert hear(fed(stereo.tobytes(), media_type="audio/L16;rate=16000;channels=2"))[1] == expected
    assert hear(fed(TWO, media_type="audio/pcm"))[1][-1]["usage"]["seconds"] == 3.0  # OpenAI's pcm: 24 kHz


def test_two_channels_are_mixed() -> None:
    assert mono(array("h", (100, 300, -5, -5)).tobytes(), 2) == array("h", (200, -5)).tobytes()


@pytest.mark.parametrize(
    ("data", "media_type", "what"),
    [
        (b"OggS" + bytes(40), "audio/ogg", "input audio is 'audio/ogg', which is not read here; send audio/wav"),
        (bytes(64), "audio/L16", "audio/L16 needs its rate"),
        (wav(bytes(60), bits=24), "audio/wav", "the client's WAV has 24-bit samples"),
        (bytes(64), "audio/L16;rate=5", "it must lie in 8000..192000"),
    ],
)
def test_sound_that_cannot_be_read_is_refused_in_words(data: bytes, media_type: str, what: str) -> None:
    result, told = hear(EngineInput(data, media_type))
    assert result.outcome == "failed"
    assert what in result.message
    assert result.code == "input_mismatch"
    assert told == []


# -- mock


def test_mock_begins_again_after_its_last_text_and_in_each_request() -> None:
    engine = a_mock("Yes.|No.")
    speech = b"".join(tone(0.3) + silence(0.6) for _ in range(3))
    assert text_of(hear(fed(speech), engine)[1]) == "Yes.\nNo.\nYes."
    assert text_of(hear(fed(speech), engine)[1]) == "Yes.\nNo.\nYes."


def test_mock_may_hear_nothing_in_what_was_said() -> None:
    _, told = hear(fed(TWO), a_mock("|Hello."))
    assert text_of(told) == "Hello."
    assert len(events_of(told, "utterance")) == 2


def test_the_params_of_hearing_are_checked() -> None:
    schema: Any = a_mock().capabilities.params
    check_schema(schema)
    assert not check_params(schema, {"turn_detection": "none", "language": "en", "temperature": 0.2})
    for wrong in ({"threshold": 2}, {"silence_ms": 1}, {"turn_detection": "loud"}, {"text": "a"}):
        assert check_params(schema, wrong)
