"""The built-in engines and their catalog."""

import dataclasses
import datetime
import math
import sys
import time
from array import array
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
import msgpack
import numpy as np
import pytest

from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    FormatChunk,
    InvalidParams,
    Option,
    OptionError,
    OutputChunk,
    ProgressChunk,
    RequestContext,
    VideoChunk,
)
from gpuworker.engines.catalog import EngineNotFound, engine_names, find_engine, parse_options
from gpuworker.engines.espeak.engine import EspeakEngine, script_runs
from gpuworker.engines.espeak.visemes import VISEMES, viseme_of
from gpuworker.engines.function.engine import FunctionEngine
from gpuworker.engines.mock import MockEngine, default_duration_s
from gpuworker.slots import ipc
from gpuworker.slots.run_engine import RunResult, run_engine
from protocol.wire.frames import MAX_BINARY_BYTES
from protocol.wire.params_schema import check_params, check_schema
from protocol.wire.structs import AudioFormat, VideoFormat
from protocol.wire.validators import Value
from tests.support.pictures import KEY_PICTURE, NEXT_PICTURE, VIDEO


def never() -> bool:
    return False


def run(
    engine: Engine, params: dict[str, Value], cancelled: Any = never, **inputs: bytes
) -> tuple[RunResult, list[Chunk]]:
    """What a loaded engine makes, through the loop that every slot uses."""
    chunks: list[Chunk] = []
    given = {name: EngineInput(data) for name, data in inputs.items()}
    return run_engine(engine, params, given, cancelled, chunks.append), chunks


def pcm(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.pcm for chunk in chunks if isinstance(chunk, AudioChunk))


# -- mock --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mock() -> MockEngine:
    engine = MockEngine(parse_options(MockEngine.OPTIONS, ["speed=0"]))
    engine.load()
    return engine


def test_mock_tells_which_inputs_came(mock: MockEngine) -> None:
    assert set(mock.capabilities.inputs) == {"audio", "video", "file"}
    first, *tune = mock.generate({"text": "a", "speed": 0}, {"file": EngineInput(b"abc", "text/plain")})
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert first == OutputChunk({"file": {"media_type": "text/plain", "size": 3, "sha256": digest}})
    assert tune == list(mock.generate({"text": "a", "speed": 0}, {}))


def test_mock_audio_is_a_pure_function_of_text_and_seed_however_it_is_cut(mock: MockEngine) -> None:
    params = {"text": "hello", "seed": 3, "duration_s": 2.0}
    end, chunks = run(mock, params)
    assert end.outcome == "completed"
    assert chunks[0] == FormatChunk(AudioFormat(sample_rate=24_000))
    whole = pcm(chunks)
    assert len(whole) == 2 * 48_000
    again = MockEngine(parse_options(MockEngine.OPTIONS, ["speed=0", "chunk_ms=7"]))
    again.load()
    assert pcm(run(again, params)[1]) == whole
    assert pcm(run(mock, {**params, "duration_s": 1.0})[1]) == whole[:48_000]
    assert pcm(run(mock, {**params, "seed": 4})[1]) != whole
    assert pcm(run(mock, {**params, "text": "hellO"})[1]) != whole


def test_a_mock_that_is_not_reproducible_cuts_the_same_tune_anew_each_time(mock: MockEngine) -> None:
    odd = MockEngine(parse_options(MockEngine.OPTIONS, ["speed=0", "reproducible=false"]))
    odd.load()
    assert mock.capabilities.reproducible
    assert not odd.capabilities.reproducible
    params = {"text": "hello", "duration_s": 30.0}
    first, second = run(odd, params)[1], run(odd, params)[1]
    assert pcm(first) == pcm(second) == pcm(run(mock, params)[1])
    assert first != second


def test_mock_audio_never_repeats_within_seconds_so_that_a_lost_piece_shows(mock: MockEngine) -> None:
    note = 2 * 24_000 // 5
    whole = pcm(run(mock, {"text": "x", "duration_s": 30.0})[1])
    notes = [whole[start : start + note] for start in range(0, len(whole), note)]
    assert len(set(notes)) > 10
    for shift in range(1, 40):
        assert notes[shift:] != notes[: len(notes) - shift]


def test_mock_takes_2_to_5_seconds_by_text_length_where_nothing_else_is_asked_for(mock: MockEngine) -> None:
    assert [default_duration_s("x" * n) for n in (0, 100, 200, 5_000)] == [2.0, 3.5, 5.0, 5.0]
    assert len(pcm(run(mock, {"text": "x" * 100})[1])) == 2 * 24_000 * 3.5


def test_mock_paces_its_chunks_and_stops_soon_when_cancelled(mock: MockEngine) -> None:
    began = time.monotonic()
    run(mock, {"text": "x", "duration_s": 0.4, "speed": 2, "delay_s": 0.2})
    assert 0.4 <= time.monotonic() - began < 1.0
    began = time.monotonic()
    end, chunks = run(mock, {"text": "x", "delay_s": 100}, lambda: time.monotonic() - began > 0.1)
    assert (end.outcome, len(chunks)) == ("cancelled", 1)
    assert time.monotonic() - began < 1.0


def test_mock_makes_progress_and_text_when_asked(mock: MockEngine) -> None:
    end, chunks = run(mock, {"text": " one two\nthree", "output": "text", "progress": 2})
    assert end.outcome == "completed"
    assert chunks == [
        FormatChunk(None),
        ProgressChunk("generating", 0.0),
        OutputChunk(" one "),
        OutputChunk("two\n"),
        ProgressChunk("generating", 2 / 3),
        OutputChunk("three"),
    ]


@pytest.mark.parametrize("at", [0, 3, 1000])
def test_mock_raises_before_the_chunk_asked_for_and_after_the_last_if_there_is_none(mock: MockEngine, at: int) -> None:
    end, chunks = run(mock, {"text": "x", "duration_s": 1.0, "fail": {"how": "raise", "at": at}})
    assert (end.outcome, end.code, end.retryable) == ("failed", "engine_failed", False)
    assert len(chunks) == 1 + min(at, 10)


def test_mock_params_are_checked_by_its_schema(mock: MockEngine) -> None:
    schema = mock.capabilities.params
    check_schema(schema)
    assert check_params(schema, {"text": "x", "seed": 1, "fail": {"how": "hang"}}) == {}
    assert set(check_params(schema, {"seed": -1, "loud": 1, "fail": {}})) == {"text", "seed", "loud", "fail.how"}


def test_hundreds_of_mock_streams_are_cheap(mock: MockEngine) -> None:
    began = time.process_time()
    run(mock, {"text": "x", "duration_s": 300.0})
    assert time.process_time() - began < 3.0  # 100 streams in real time would take a CPU at 3 s; it takes 0.1


# -- espeak ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def espeak() -> EspeakEngine:
    engine = EspeakEngine(parse_options(EspeakEngine.OPTIONS, []))
    engine.load()
    return engine


def level(data: bytes) -> float:
    """RMS, 0..1."""
    samples = array("h", data)
    return math.sqrt(sum(sample * sample for sample in samples) / len(samples)) / 32768


@pytest.mark.parametrize(
    ("text", "shortest_s", "longest_s"),
    [
        ("The quick brown fox jumps over the lazy dog.", 2.0, 4.5),
        ("你好，世界。今天天气很好，我们一起去公园散步吧。", 4.0, 8.0),
        ("你好，世界。Hello world.", 1.8, 3.5),
    ],
    ids=["English", "Chinese", "mixed"],
)
def test_espeak_speaks(espeak: EspeakEngine, text: str, shortest_s: float, longest_s: float) -> None:
    end, chunks = run(espeak, {"text": text})
    assert end.outcome == "completed"
    assert chunks[0] == FormatChunk(AudioFormat(sample_rate=22_050))
    speech = pcm(chunks)
    assert shortest_s < len(speech) / 2 / 22_050 < longest_s
    assert 0.03 < level(speech) < 0.3
    assert len(chunks) > 10
    assert all(len(chunk.pcm) <= 2 * 22_050 // 5 for chunk in chunks if isinstance(chunk, AudioChunk))


def test_espeak_speaks_each_script_with_its_own_voice(espeak: EspeakEngine) -> None:
    def seconds(text: str, **more: Value) -> float:
        return len(pcm(run(espeak, {"text": text, **more})[1])) / 2 / 22_050

    mixed, apart = seconds("你好，世界。Hello world."), seconds("你好，世界。") + seconds("Hello world.")
    assert mixed == pytest.approx(apart, abs=0.6)
    assert seconds("你好，世界。", voice="en-us") != pytest.approx(seconds("你好，世界。"), abs=0.1)
    assert seconds("Hello world.", voice="de") > 0.5


def test_scripts_are_cut_where_they_change() -> None:
    def runs(text: str) -> list[tuple[str, str]]:
        return script_runs(text, "zh", "en")

    assert runs("你好，世界。Hello world.") == [("zh", "你好，世界。"), ("en", "Hello world.")]
    assert runs("我用 Python 3 写代码。") == [("zh", "我用 "), ("en", "Python 3 "), ("zh", "写代码。")]
    assert runs("「Hi」你好") == [("zh", "「"), ("en", "Hi」"), ("zh", "你好")]
    assert runs("42, naïve Ёлка") == [("en", "42, naïve Ёлка")]
    assert runs("123 !") == [("en", "123 !")]
    assert runs("") == [("en", "")]
    for text in ("你好，世界。Hello world.", " 1 a 好 b", "「Hi」你好"):
        assert "".join(part for _voice, part in runs(text)) == text


def test_espeak_obeys_rate_volume_and_pitch_and_forgets_them_after(espeak: EspeakEngine) -> None:
    text = {"text": "The quick brown fox jumps over the lazy dog."}
    plain = pcm(run(espeak, text)[1])
    assert len(pcm(run(espeak, {**text, "rate": 350})[1])) < 0.7 * len(plain)
    assert level(pcm(run(espeak, {**text, "volume": 20})[1])) < 0.5 * level(plain)
    assert pcm(run(espeak, {**text, "pitch": 90})[1]) != plain
    assert len(pcm(run(espeak, text)[1])) == pytest.approx(len(plain), rel=0.02)


def test_espeak_streams_a_long_text_and_stops_between_chunks(espeak: EspeakEngine) -> None:
    text = "Streaming speech starts to play long before it is all made. " * 150
    began = time.monotonic()
    chunks = espeak.generate({"text": text}, {})
    next(chunks)
    first_s = time.monotonic() - began
    chunks.close()  # type: ignore[attr-defined]  # a generator
    closed_s = time.monotonic() - began
    end, whole = run(espeak, {"text": text})
    assert end.outcome == "completed"
    assert len(pcm(whole)) / 2 / 22_050 > 300
    assert first_s < 0.5
    assert closed_s < 0.5


def test_espeak_takes_every_text_its_schema_lets_through(espeak: EspeakEngine) -> None:
    schema = espeak.capabilities.params
    check_schema(schema)
    for text in ("a\0b", "\N{PILE OF POO}", "<speak>&amp;</speak>", "[[h@l'oU]]", "100%", "👋"):
        assert check_params(schema, {"text": text}) == {}
        assert run(espeak, {"text": text})[0].outcome == "completed", text
    for text in ("  \n", "。", "\n\t\u200b.", "-", "\ufffd"):
        end, _ = run(espeak, {"text": text})
        assert (end.code, end.details) == ("invalid_params", {"text": "contains nothing to speak"})
    faults = check_params(schema, {"text": "x" * 20_001, "voice": "nobody", "rate": "fast", "pitch": 101, "x": 1})
    assert set(faults) == {"text", "voice", "rate", "pitch", "x"}


@pytest.mark.parametrize("voice", ["en-gb", "fr-fr", "chr-US-Qaaa-x-west", "de", "en-us-nyc", "yue"])
def test_espeak_speaks_with_each_voice_that_it_offers(espeak: EspeakEngine, voice: str) -> None:
    end, chunks = run(espeak, {"text": "Hello", "voice": voice})
    assert (end.outcome, end.message) == ("completed", "")
    assert level(pcm(chunks)) > 0.01


def visemes(chunks: list[Chunk]) -> list[dict[str, Any]]:
    return [shape for chunk in chunks if isinstance(chunk, OutputChunk) for shape in chunk.data["visemes"]]


def test_espeak_tells_how_the_mouth_stands_if_it_is_asked(espeak: EspeakEngine) -> None:
    text = {"text": "Mama, 你好. Two shoes."}
    end, chunks = run(espeak, {**text, "visemes": True})
    assert end.outcome == "completed"
    made = visemes(chunks)
    assert [shape["viseme"] for shape in made[:4]] == ["PP", "aa", "PP", "aa"]
    assert {"U", "CH", "I", "SS", "sil"} <= {shape["viseme"] for shape in made}
    assert made[0] == {"t": 0.0, "viseme": "PP", "opening": 0.0, "width": 0.5}
    times = [shape["t"] for shape in made]
    assert times == sorted(times)  # also over the change of the voice
    seconds = len(pcm(chunks)) / 2 / 22_050
    assert 0.8 * seconds < times[-1] <= seconds + 0.001  # ms
    heard_s = 0.0  # they come before their sound
    for chunk in chunks:
        if isinstance(chunk, AudioChunk):
            heard_s += len(chunk.pcm) / 2 / 22_050
        elif isinstance(chunk, OutputChunk):
            assert chunk.data["visemes"][0]["t"] >= heard_s - 0.001
    assert visemes(run(espeak, text)[1]) == []


def test_a_phoneme_is_seen_by_its_letters_in_any_language() -> None:
    seen = {name: viseme_of(name) for name in ("ˈɑː", "tʃ", "ts", "ˈaɪ", "m", "ɯ", "ʲ", "", "t͡s", "ˌyː", "w")}
    assert list(seen.values()) == ["aa", "CH", "SS", "aa", "PP", "U", None, "sil", "SS", "U", "U"]
    for opening, width in VISEMES.values():
        assert 0 <= opening <= 1
        assert 0 <= width <= 1


def test_espeak_refuses_a_voice_option_that_is_none() -> None:
    engine = EspeakEngine(parse_options(EspeakEngine.OPTIONS, ["voice=nobody"]))
    with pytest.raises(OptionError, match="en-us"):
        engine.load()


def test_the_modules_of_engines_import_nothing_heavy() -> None:
    import subprocess

    script = (
        "import gpuworker.cli, gpuworker.engines.espeak.engine, gpuworker.engines.function.engine, "
        "gpuworker.engines.openai.engine, sys; "
        "print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "voxcpm", "espeakng_loader", "httpx2"} & set(modules)


# -- function ----------------------------------------------------------------------------------------------------


def function(call: Any, **options: Any) -> FunctionEngine:
    engine = FunctionEngine({"sample_rate": None, "channels": 1, "reproducible": False, **options}, call)
    engine.load()
    return engine


MONO = AudioFormat(sample_rate=16_000)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)


class Picture:
    """Shows itself to notebooks, as images of PIL do."""

    def _repr_png_(self) -> bytes:
        return PNG


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [FormatChunk(None)]),
        ("words", [FormatChunk(None), OutputChunk("words")]),
        ({"a": [1, 2.5, None]}, [FormatChunk(None), OutputChunk({"a": [1, 2.5, None]})]),
        ([1, 2], [FormatChunk(None), OutputChunk([1, 2])]),
        ((1, "x"), [FormatChunk(None), OutputChunk([1, "x"])]),
        (7, [FormatChunk(None), OutputChunk(7)]),
        (True, [FormatChunk(None), OutputChunk(True)]),
        (b"\0\1", [FormatChunk(None), OutputChunk(b"\0\1")]),
        (PNG, [FormatChunk(None), OutputChunk(PNG, "image/png")]),
        (bytearray(PNG), [FormatChunk(None), OutputChunk(PNG, "image/png")]),
        (OutputChunk(PNG), [FormatChunk(None), OutputChunk(PNG, "image/png")]),
        (OutputChunk(b"a,b", "text/csv"), [FormatChunk(None), OutputChunk(b"a,b", "text/csv")]),
        (OutputChunk("<p>", "text/html"), [FormatChunk(None), OutputChunk("<p>", "text/html")]),
        (EngineInput(b"\0\1", "video/mp4"), [FormatChunk(None), OutputChunk(b"\0\1", "video/mp4")]),
        (Picture(), [FormatChunk(None), OutputChunk(PNG, "image/png")]),
        ((16_000, np.array([1, -2], np.int16)), [FormatChunk(MONO), AudioChunk(b"\1\0\xfe\xff")]),
        ((16_000, np.array([1.0, -2.0, 0.5], np.float32)), [FormatChunk(MONO), AudioChunk(b"\xff\x7f\1\x80\0\x40")]),
        ((16_000, np.array([[65536, 131072, 0]], np.int32)), [FormatChunk(MONO), AudioChunk(b"\1\0\2\0\0\0")]),
        (
            (16_000, np.array([[1, 2], [3, 4], [5, 6]], np.int16)),
            [FormatChunk(AudioFormat(sample_rate=16_000, channels=2)), AudioChunk(b"\1\0\2\0\3\0\4\0\5\0\6\0")],
        ),
        (
            (16_000, np.array([[1, 3, 5], [2, 4, 6]], np.int16)),
            [FormatChunk(AudioFormat(sample_rate=16_000, channels=2)), AudioChunk(b"\1\0\2\0\3\0\4\0\5\0\6\0")],
        ),
    ],
)
def test_what_a_function_returns_or_yields_becomes_output(value: Any, expected: list[Chunk]) -> None:
    def plain() -> Any:
        return value

    def generator() -> Iterator[Any]:
        yield value

    for call in (plain, generator):
        end, chunks = run(function(call), {})
        assert (end.outcome, chunks) == ("completed", expected)


@pytest.mark.parametrize("wrong", ["png", "image/png\r\nx: y", "image/" + "x" * 200, ""])
def test_a_media_type_that_is_none_fails_its_request_in_words(wrong: str) -> None:
    end, _ = run(function(lambda: OutputChunk(PNG, wrong)), {})
    assert end.outcome == "failed"
    assert "cannot be sent" in end.message


def test_bytes_are_a_file_of_any_size_and_other_values_have_the_size_of_a_message() -> None:
    large = PNG + bytes(3 * 1024 * 1024)
    assert run(function(lambda: large), {})[1][1] == OutputChunk(large, "image/png")
    end, _ = run(function(lambda: "x" * len(large)), {})
    assert end.outcome == "failed"


def test_inputs_declare_their_media_types() -> None:
    def call(
        picture: Annotated[bytes, "image/png", "image/jpeg"],
        film: Annotated[EngineInput, "video/*"] | None = None,
        told: Annotated[bytes, "whatever people say about it"] = b"",
        anything: Annotated[bytes | None, "audio/wav"] = None,
        n: Annotated[int, "a/number"] = 1,
    ) -> Any:
        return n

    capabilities = function(call).capabilities
    assert {name: rule.media_types for name, rule in capabilities.inputs.items()} == {
        "picture": ["image/png", "image/jpeg"],
        "film": ["video/*"],
        "told": [],
        "anything": ["audio/wav"],
    }
    assert capabilities.params["properties"] == {"n": {"type": "integer", "default": 1}}


@dataclasses.dataclass
class Word:
    text: str
    score: Any


Span = namedtuple("Span", "start end")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        ({"score": np.float32(0.5), "n": np.int64(3), "ok": np.bool_(True)}, {"score": 0.5, "n": 3, "ok": True}),
        ([{"box": np.array([[1, 2], [3, 4]])}], [{"box": [[1, 2], [3, 4]]}]),
        ({"zero": np.array(7), "text": np.str_("a")}, {"zero": 7, "text": "a"}),
        ({np.int64(1): "one", 2: "two", None: "none"}, {"1": "one", "2": "two", "null": "none"}),
        ((1, {"b"}, (np.int8(2),)), [1, ["b"], [2]]),
        (Word("hi", np.float64(0.25)), {"text": "hi", "score": 0.25}),
        ([Span(np.int32(1), 2)], [{"start": 1, "end": 2}]),
        (
            {"when": datetime.date(2026, 1, 2), "where": Path("a/b"), "rest": bytearray(b"x")},
            {"when": "2026-01-02", "where": "a/b", "rest": b"x"},
        ),
    ],
)
def test_values_of_numpy_and_the_standard_library_become_plain_ones(value: Any, expected: Any) -> None:
    end, chunks = run(function(lambda: value), {})
    assert end == RunResult(outcome="completed")
    assert chunks == [FormatChunk(None), OutputChunk(expected)]
    assert msgpack.unpackb(msgpack.packb(ipc.encode_chunk(chunks[1])))["data"] == expected


def test_a_rate_of_numpy_is_a_rate_and_an_array_that_no_message_has_room_for_is_told() -> None:
    chunks = run(function(lambda: (np.int64(24_000), np.zeros(3, np.float32))), {})[1]
    assert chunks == [FormatChunk(AudioFormat(sample_rate=24_000)), AudioChunk(bytes(6))]
    end, _ = run(function(lambda: {"all": np.zeros(1_000_000)}), {})
    assert "an array of 1000000 values; yield it in parts" in end.message


def test_details_of_an_error_may_be_of_numpy() -> None:
    assert RunResult.from_error(EngineError("no", details={"at": np.int64(3)})).details == {"at": 3}


def test_details_whose_own_code_breaks_are_left_out() -> None:
    class Broken:
        def model_dump(self) -> None:
            raise RuntimeError("CUDA error: no kernel image")

    end = RunResult.from_error(EngineError("no", details={"at": Broken()}))
    assert (end.details, end.outcome) == ({}, "failed")
    assert end.message.startswith("no (its details are left out: ")


def test_bytes_and_arrays_are_audio_where_the_rate_is_given() -> None:
    def call() -> Iterator[Any]:
        yield b"\1\0\2"
        yield b"\0\3\0"
        yield np.array([4], np.int16)

    end, chunks = run(function(call, sample_rate=16_000), {})
    assert (end.outcome, chunks) == (
        "completed",
        [FormatChunk(MONO), AudioChunk(b"\1\0"), AudioChunk(b"\2\0\3\0"), AudioChunk(b"\4\0")],
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([np.zeros(3)], "without its rate"),
        ([(16_000, np.zeros((3, 3)))], "shape"),
        ([(16_000, np.zeros(3, np.uint8))], "uint8"),
        ([(16_000, np.array([math.nan]))], "NaN"),
        ([(16_000, np.zeros(3)), (24_000, np.zeros(3))], "24000 Hz"),
        ([(1, np.zeros(3))], "sample_rate"),
        (["words", (16_000, np.zeros(3))], "none"),
        ([object()], "object"),
        ([{(1, 2): 3}], "key"),
        (["x" * 2_000_000], "limit"),
        ([AudioChunk(b"\0\0")], "FormatChunk"),
    ],
)
def test_output_that_cannot_be_is_told_in_words(values: list[Any], words: str) -> None:
    end, _ = run(function(lambda: iter(values)), {})
    assert (end.outcome, end.code) == ("failed", "engine_failed")
    assert words in end.message


def test_params_and_inputs_are_read_from_the_signature() -> None:
    def call(
        text: str,
        speed: float = 1.0,
        *,
        count: int | None = None,
        mode: Literal["fast", "good"] = "good",
        tags: list[str] = [],  # noqa: B006 - as people write it
        anything: Any = None,
        voice: bytes,
        extra: EngineInput | None = None,
        cancelled: Any = None,
    ) -> Any:
        return [text, speed, count, mode, tags, anything, voice, extra, cancelled()]

    engine = function(call)
    capabilities = engine.capabilities
    check_schema(capabilities.params)
    assert capabilities.params == {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "speed": {"type": "number", "default": 1.0},
            "count": {"type": ["integer", "null"], "default": None},
            "mode": {"enum": ["fast", "good"], "default": "good"},
            "tags": {"type": "array"},
            "anything": {"default": None},
        },
        "required": ["text"],
        "additionalProperties": False,
    }
    assert {name: rule.required for name, rule in capabilities.inputs.items()} == {"voice": True, "extra": False}
    end, chunks = run(engine, {"text": "hi", "count": 3}, voice=b"v")
    assert end.outcome == "completed"
    assert chunks[1] == OutputChunk(["hi", 1.0, 3, "good", [], None, b"v", None, False])


def test_whole_numbers_in_lists_and_dicts_are_ints_where_they_are_annotated_so() -> None:
    def call(ns: list[int], more: dict[str, list[int]] | None = None, xs: list[float] = []) -> list[str]:  # noqa: B006
        return [repr(ns), repr(more), repr(xs)]

    _, chunks = run(function(call), {"ns": [1.0, 2], "more": {"a": [3.0]}, "xs": [1.0]})
    assert chunks[1] == OutputChunk(["[1, 2]", "{'a': [3]}", "[1.0]"])


def test_a_function_may_yield_pictures_behind_their_format() -> None:
    def call(text: str) -> Iterator[Chunk]:
        if text == "video":
            yield FormatChunk(None, VIDEO)
        yield VideoChunk(KEY_PICTURE, 0, True)

    assert run(function(call), {"text": "video"})[1] == [FormatChunk(None, VIDEO), VideoChunk(KEY_PICTURE, 0, True)]
    assert "before yielding its format: FormatChunk(format, video)" in run(function(call), {"text": ""})[0].message


def test_a_class_is_made_once_at_load_and_called() -> None:
    class Model:
        made = 0

        def __init__(self) -> None:
            Model.made += 1

        def __call__(self, text: str) -> str:
            return text.upper()

    engine = function(Model)
    assert run(engine, {"text": "a"})[1][1] == OutputChunk("A")
    assert run(engine, {"text": "b"})[1][1] == OutputChunk("B")
    assert Model.made == 1


def test_a_function_that_asks_for_cancelled_can_stop_itself_and_its_generator_is_closed() -> None:
    log: list[str] = []

    def call(cancelled: Any) -> Iterator[str]:
        try:
            while not cancelled():
                yield "working"
            log.append("asked")
        finally:
            log.append("closed")

    asked = iter([False] * 8 + [True] * 100)
    end, _ = run(function(call), {}, lambda: next(asked))
    assert end.outcome == "cancelled"
    assert log[-1] == "closed"


def test_a_function_that_asks_for_the_context_learns_who_asked() -> None:
    def call(text: str, context) -> dict[str, Any]:  # type: ignore[no-untyped-def]  # as people write it
        return {"who": context.principal, "id": context.request_id, "text": text}

    def typed(context: RequestContext | None = None) -> str:
        assert context is not None
        return context.space

    asked = RequestContext(request_id="r1", principal="ann", space="tts")
    for served, expected in ((call, {"who": "ann", "id": "r1", "text": "hi"}), (typed, "tts")):
        engine, chunks = function(served), list[Chunk]()
        assert "context" not in engine.capabilities.params["properties"]
        params = {"text": "hi"} if served is call else {}
        assert run_engine(engine, params, {}, lambda: False, chunks.append, asked).outcome == "completed"
        assert chunks[1] == OutputChunk(expected)


def test_a_param_of_another_type_may_be_called_context() -> None:
    def answer(question: str, context: str) -> str:
        return f"{question} {context}"

    engine = function(answer)
    assert engine.capabilities.params["properties"]["context"] == {"type": "string"}
    assert run(engine, {"question": "Q", "context": "C"})[1][1] == OutputChunk("Q C")


def test_an_engine_whose_generate_has_a_context_gets_it() -> None:
    class Asking(Scripted):
        def generate(self, params: Any, inputs: Any, context: RequestContext | None = None) -> Iterator[Chunk]:
            assert context is not None
            yield OutputChunk(context.principal)

    chunks: list[Chunk] = []
    asked = RequestContext(principal="ann")
    assert run_engine(Asking(), {}, {}, lambda: False, chunks.append, asked).outcome == "completed"
    assert chunks[1] == OutputChunk("ann")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("served_functions", "module:callable"),
        ("served_functions:nothing", "nothing"),
        ("no_such_module_anywhere:call", "no_such_module_anywhere"),
        ("served_functions:VALUE", "not callable"),
        ("served_functions:waits", "async"),
        ("served_functions:by_place", "by name"),
        ("served_functions:Sensor.read", ""),
    ],
)
def test_a_call_that_cannot_be_served_is_told_at_load(
    call: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served_functions.py").write_text(
        "VALUE = 3\nasync def waits(): pass\ndef by_place(a, /): pass\n"
        "class Sensor:\n    @staticmethod\n    def read(): return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "served_functions", raising=False)
    engine = FunctionEngine({"call": call})
    if not words:
        engine.load()
        assert run(engine, {})[1][1] == OutputChunk(1)
        return
    with pytest.raises(EngineError, match=words):
        engine.load()


# -- the loop every slot uses ------------------------------------------------------------------------------------


class Scripted(Engine):
    """Yields what it is given; raises what is an exception."""

    def __init__(self, *items: Any, **capabilities: Any) -> None:
        super().__init__()
        self._items = items
        self._capabilities = Capabilities(**capabilities)
        self.closed = 0

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def load(self) -> None:
        pass

    def generate(self, params: Any, inputs: Any) -> Iterator[Chunk]:
        try:
            for item in self._items:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.closed += 1


def test_pictures_and_their_format_are_passed_on_whatever_holds_their_bytes() -> None:
    items = [VideoChunk(bytearray(KEY_PICTURE), np.int64(0), np.bool_(True)), VideoChunk(NEXT_PICTURE, 90, False)]  # type: ignore[arg-type]
    end, chunks = run(Scripted(*items, video=VIDEO), {})
    assert end.outcome == "completed"
    assert chunks == [FormatChunk(None, VIDEO), VideoChunk(KEY_PICTURE, 0, True), VideoChunk(NEXT_PICTURE, 90, False)]
    late = Scripted(FormatChunk(MONO, VIDEO), *items, AudioChunk(b"\0\0"), late_format=True)
    assert run(late, {})[1] == [FormatChunk(MONO, VIDEO), *chunks[1:], AudioChunk(b"\0\0")]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([VideoChunk(KEY_PICTURE, 0, True)], "before yielding its format: FormatChunk(format, video)"),
        ([VIDEO, VideoChunk(NEXT_PICTURE, 0, False)], "first picture is no key frame"),
        ([VIDEO, VideoChunk(NEXT_PICTURE, 0, True)], "first picture says key=True, and its bytes are no such VP8"),
        ([VIDEO, VideoChunk(KEY_PICTURE, 0, False)], "says key=False"),
        ([VIDEO, VideoChunk(b"\0" * 40, 0, True)], "says key=True"),
        ([VIDEO, VideoChunk(b"", 0, True)], "has no bytes"),
        ([VIDEO, VideoChunk("a picture", 0, True)], "has no bytes; `data` is one encoded picture"),  # type: ignore[arg-type]
        ([VIDEO, VideoChunk(KEY_PICTURE + bytes(MAX_BINARY_BYTES), 0, True)], "encode it smaller"),
        ([VIDEO, VideoChunk(KEY_PICTURE, -1, True)], "has a pts that is -1"),
        ([VIDEO, VideoChunk(KEY_PICTURE, 0.5, True)], "has a pts that must be an integer"),  # type: ignore[arg-type]
        (
            [VIDEO, VideoChunk(KEY_PICTURE, 90, True), VideoChunk(NEXT_PICTURE, 90, False)],
            "the picture after pts 90 has pts 90, and the one before 90; it must grow",
        ),
        ([attrs.evolve(VIDEO, width=17), VideoChunk(KEY_PICTURE, 0, True)], "is 16x16, and the format says 17x16"),
    ],
)
def test_an_engine_whose_video_cannot_be_shown_is_told_what_is_wrong_with_it(items: list[Any], words: str) -> None:
    chunks = [FormatChunk(None, item) if isinstance(item, VideoFormat) else item for item in items]
    end, _ = run(Scripted(*chunks, late_format=True), {})
    assert (end.outcome, end.code) == ("failed", "engine_failed")
    assert words in end.message


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (ValueError("bad"), RunResult(outcome="failed", code="engine_failed", message="ValueError: bad")),
        (
            InvalidParams({"text": "is rude"}),
            RunResult(outcome="failed", code="invalid_params", message="text is rude", details={"text": "is rude"}),
        ),
        (
            EngineError("out of memory", retryable=True, restart=True),
            RunResult(outcome="failed", code="engine_failed", message="out of memory", retryable=True, restart=True),
        ),
    ],
)
def test_what_an_engine_raises_is_how_its_run_ends(fault: Exception, expected: RunResult) -> None:
    engine = Scripted(AudioChunk(b"\0\0"), fault, format=MONO)
    end, chunks = run(engine, {})
    assert attrs.evolve(end, report="") == expected
    # Where a fault is in the engine's code, operators are told where.
    assert ("raise item" in end.report) is not isinstance(fault, EngineError)
    assert chunks == [FormatChunk(MONO), AudioChunk(b"\0\0")]
    assert engine.closed == 1


class AcceleratorError(RuntimeError):
    """As torch has it."""


class OutOfMemoryError(RuntimeError):
    """As torch has it."""


def raised_from(fault: Exception, cause: Exception) -> Exception:
    fault.__cause__ = cause
    return fault


@pytest.mark.parametrize(
    ("fault", "process_broken"),
    [
        (RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), True),
        (RuntimeError("HIP error: invalid device function"), True),
        (Exception("hipErrorIllegalAddress"), True),
        (AcceleratorError("an unspecified launch failure"), True),
        (OutOfMemoryError("Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("MPS backend out of memory"), False),
        (raised_from(ValueError("no voice"), RuntimeError("CUDA error: misaligned address")), True),
        (raised_from(EngineError("the model failed"), RuntimeError("CUDA error: misaligned address")), True),
        (EngineError("CUDA error: unspecified launch failure"), True),
        (ExceptionGroup("two", [KeyError("a"), RuntimeError("NCCL error in: x.cpp:1")]), True),
    ],
)
def test_an_error_of_the_gpu_may_be_tried_again_in_a_new_engine_whatever_engine_it_came_from(
    fault: Exception, process_broken: bool
) -> None:
    end = RunResult.from_error(fault)
    assert (end.code, end.retryable, end.restart, end.process_broken) == ("engine_failed", True, True, process_broken)


@pytest.mark.parametrize(
    "fault",
    [
        ValueError("cannot speak 'CUDA error: out of memory'"),
        KeyError("hipError"),
        RuntimeError("no such voice"),
        RuntimeError("relationship error between tables"),
        RuntimeError("ownership failure"),
        RuntimeError("bad process_status_code 3, shipment_status_unknown, customer_status_bad"),
        RuntimeError("StatusCode.RESOURCE_EXHAUSTED"),
        MemoryError("Unable to allocate 80 GiB for an array"),
        InvalidParams({"text": "is rude"}),
    ],
)
def test_another_error_costs_no_engine(fault: Exception) -> None:
    end = RunResult.from_error(fault)
    assert (end.retryable, end.restart, end.process_broken) == (False, False, False)


def test_chunks_are_held_to_what_the_wire_takes() -> None:
    assert run(Scripted(AudioChunk(b"\0"), format=MONO), {})[0].outcome == "failed"
    assert run(Scripted(AudioChunk(b"\0\0")), {})[0].outcome == "failed"
    assert run(Scripted(FormatChunk(MONO), format=MONO), {})[0].outcome == "failed"
    assert run(Scripted("words", format=MONO), {})[0].outcome == "failed"
    end, chunks = run(
        Scripted(AudioChunk(b""), ProgressChunk("dancing", math.nan), ProgressChunk("loading", 7.0), format=MONO), {}
    )
    assert end.outcome == "completed"
    assert chunks[1:] == [ProgressChunk("generating", 0.0), ProgressChunk("loading", 1.0)]


def test_nothing_is_made_after_a_cancel_and_the_engine_is_closed_between_two_chunks() -> None:
    made: list[Chunk] = []
    engine = Scripted(*[AudioChunk(b"\0\0")] * 9, format=MONO)
    end = run_engine(engine, {}, {}, lambda: len(made) >= 4, made.append)
    assert (end.outcome, len(made), engine.closed) == ("cancelled", 4, 1)


# -- the catalog -------------------------------------------------------------------------------------------------


def test_the_catalog_finds_what_is_installed_and_names_it_where_one_is_not() -> None:
    assert {"espeak", "mock", "function", "openai"} <= set(engine_names())
    assert find_engine("mock") is MockEngine
    with pytest.raises(EngineNotFound, match=r"installed are: .*mock"):
        find_engine("nope")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["nope=1"], "no such option; accepted: flag, rate, size"),
        (["size"], "key=value"),
        (["size=big"], "whole number"),
        (["rate=x"], "a number"),
        (["flag=yes"], "true or false"),
        (["rate=1"], "size=… is required"),
        (["size=1", "kind=c"], "no such option"),
    ],
)
def test_options_are_checked_with_words(given: list[str], words: str) -> None:
    declared = {
        "size": Option(kind=int, required=True, help="how big"),
        "rate": Option(kind=float, default=1.5),
        "flag": Option(kind=bool, default=False),
    }
    with pytest.raises(OptionError, match=words):
        parse_options(declared, given)
    assert parse_options(declared, ["size=3", "flag=true"]) == {"size": 3, "rate": 1.5, "flag": True}
