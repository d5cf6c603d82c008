"""Engines that speak a text while it comes: mock, espeak and functions, by the loop that every slot uses."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    FormatChunk,
    LiveInput,
    MarkChunk,
    OutputChunk,
    ProgressChunk,
    RequestContext,
    VideoChunk,
)
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.espeak.engine import EspeakEngine
from gpuworker.engines.function.engine import FunctionEngine
from gpuworker.engines.mock import MockEngine
from gpuworker.slots.run_engine import RunResult, run_engine
from gpuworker.speaking.live_text import pieces_of
from gpuworker.speaking.speaking import with_live_text
from protocol.wire.structs import AudioFormat, InputRule
from protocol.wire.validators import Value
from tests.gpuworker.speaking.test_live_text import TEXTS
from tests.support.pictures import PICTURES, VIDEO

ENDS = ("completed", "failed", "cancelled")


def fed(data: bytes, sizes: list[int] | None = None) -> LiveInput:
    """A live input that has come in parts of these sizes, again and again."""
    live = LiveInput("text/plain")
    at, turn = 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)] if sizes else len(data)
        live.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    live.feed(b"", last=True)
    return live


def speak(
    engine: Engine,
    text: str | bytes | LiveInput | EngineInput,
    sizes: list[int] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    **params: Value,
) -> tuple[RunResult, list[Chunk]]:
    chunks: list[Chunk] = []
    if isinstance(text, str):
        text = text.encode()
    given_input = fed(text, sizes) if isinstance(text, bytes) else text
    return run_engine(engine, params, {"text": given_input}, cancelled, chunks.append), chunks


def pcm(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.pcm for chunk in chunks if isinstance(chunk, AudioChunk))


def marks(chunks: list[Chunk]) -> list[MarkChunk]:
    return [chunk for chunk in chunks if isinstance(chunk, MarkChunk)]


def a_mock(*options: str) -> MockEngine:
    engine = MockEngine(parse_options(MockEngine.OPTIONS, ["speed=0", *options]))
    engine.load()
    return engine


def a_function(call: Callable[..., Any], **options: Any) -> FunctionEngine:
    engine = FunctionEngine({"sample_rate": None, "channels": 1, "reproducible": False, **options}, call)
    engine.load()
    return engine


MOCK = a_mock()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(TEXTS), st.lists(st.integers(1, 40), min_size=1, max_size=10))
def test_any_chunking_makes_the_same_chunks_as_the_whole_text_at_once(text: str, sizes: list[int]) -> None:
    whole = speak(MOCK, text, duration_s=0.3)
    assert speak(MOCK, text, sizes, duration_s=0.3) == whole
    assert speak(MOCK, EngineInput(text.encode(), "text/plain"), duration_s=0.3) == whole


@pytest.mark.parametrize("text", TEXTS)
def test_each_piece_is_what_the_engine_makes_of_it_and_has_a_mark(text: str) -> None:
    end, chunks = speak(MOCK, text, [3], duration_s=0.3, seed=5)
    assert end.outcome == "completed"
    pieces = list(pieces_of([text]))
    assert len(pieces) > 2
    said = []
    for piece in pieces:
        alone: list[Chunk] = []
        run_engine(MOCK, {"text": piece.text, "duration_s": 0.3, "seed": 5}, {}, lambda: False, alone.append)
        said.append(pcm(alone))
    assert pcm(chunks) == b"".join(said)
    assert isinstance(chunks[0], FormatChunk)
    assert sum(isinstance(chunk, FormatChunk) for chunk in chunks) == 1
    samples = [len(b"".join(said[: number + 1])) // 2 for number in range(len(said))]
    assert marks(chunks) == [MarkChunk(piece.text_end, at) for piece, at in zip(pieces, samples, strict=True)]
    assert chunks[-1] == marks(chunks)[-1]


def test_a_text_that_is_a_param_is_spoken_as_ever() -> None:
    chunks: list[Chunk] = []
    text = "One sentence here. Another sentence here."
    run_engine(MOCK, {"text": text}, {}, lambda: False, chunks.append)
    assert marks(chunks) == []
    assert chunks == [FormatChunk(MOCK.capabilities.format), *MOCK.generate({"text": text}, {})]


@pytest.mark.parametrize("text", ["", "  \n ", "。"])
def test_nothing_to_speak_fails_in_words(text: str) -> None:
    end, chunks = speak(MOCK, text)
    assert (end.outcome, end.code, end.retryable) == ("failed", "invalid_params", False)
    assert end.message == "text contains nothing to speak"
    assert marks(chunks) == []


def test_text_that_is_not_utf_8_fails_after_what_was_good() -> None:
    end, chunks = speak(MOCK, b"One good sentence. And more.\xff\xff", [5], duration_s=0.1)
    assert (end.outcome, end.code) == ("failed", "input_mismatch")
    assert "send text as UTF-8" in end.message
    assert len(marks(chunks)) == 1


def test_a_piece_that_fails_fails_the_run() -> None:
    end, _chunks = speak(MOCK, "One sentence. Another.", fail={"how": "raise", "at": 1, "retryable": True})
    assert (end.outcome, end.code, end.retryable) == ("failed", "engine_failed", True)
    assert end.message == "the request asked for this failure"


def test_progress_only_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    end, chunks = speak(MOCK, TEXTS[0], [7], progress=1, duration_s=0.5)
    assert end.outcome == "completed"
    fractions = [chunk.fraction for chunk in chunks if isinstance(chunk, ProgressChunk)]
    assert len(fractions) > 10
    assert fractions == sorted(fractions)
    assert fractions[-1] < 1


def test_a_piece_is_spoken_before_the_rest_has_come_and_a_cancel_ends_the_wait() -> None:
    live = LiveInput("text/plain")
    live.feed(b"A sentence of some length. And th")
    chunks: list[Chunk] = []
    stopped = False

    def emit(chunk: Chunk) -> None:
        nonlocal stopped
        chunks.append(chunk)
        if isinstance(chunk, MarkChunk):  # the engine waits for more next
            stopped = True
            live.stop()

    end = run_engine(MOCK, {"duration_s": 0.1}, {"text": live}, lambda: stopped, emit)
    assert end == RunResult(outcome="cancelled")
    assert len(marks(chunks)) == 1


class Noting(Engine):
    """Notes what it is asked for; reports, and is closed."""

    calls: ClassVar[list[Any]] = []

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            format=AudioFormat(sample_rate=8_000, channels=2),
            params={"properties": {"text": {"type": ["string", "null"], "maxLength": 12}}},
            inputs={"voice": InputRule()},
        )

    def load(self) -> None: ...

    def format_for(self, params: dict[str, Value]) -> AudioFormat | None:
        self.calls.append(("format_for", params))
        return self.capabilities.format

    def generate(
        self, params: dict[str, Value], inputs: Mapping[str, Any], context: RequestContext | None = None
    ) -> Iterator[Chunk]:
        self.calls.append((params, dict(inputs), context))
        try:
            self.report(ProgressChunk("generating", 0.5))
            yield AudioChunk(bytes(8))
        finally:
            self.calls.append("closed")


@pytest.fixture
def noting() -> Noting:
    Noting.calls.clear()
    return Noting()


def test_everything_else_of_a_request_reaches_the_engine_with_each_piece(noting: Noting) -> None:
    chunks: list[Chunk] = []
    context = RequestContext(request_id="a" * 32)
    voice = EngineInput(b"abc")
    inputs = {"text": fed(b"Twenty letters are two."), "voice": voice}
    assert run_engine(noting, {"rate": 3}, inputs, lambda: False, chunks.append, context).outcome == "completed"
    said = [call[0] for call in noting.calls if isinstance(call, tuple) and len(call) == 3]
    assert said == [{"rate": 3, "text": text} for text in ("Twenty", "letters are", "two.")]  # of 12 characters at most
    assert all(call[1:] == ({"voice": voice}, context) for call in noting.calls if len(call) == 3)
    assert noting.calls.count("closed") == 3
    assert [chunk.fraction for chunk in chunks if isinstance(chunk, ProgressChunk)] == [1 / 3, 1.5 / 2.5, 2.5 / 3.5]
    assert [mark.sample for mark in marks(chunks)] == [2, 4, 6]


def test_the_engine_of_a_piece_is_closed_at_a_cancel(noting: Noting) -> None:
    made: list[Chunk] = []
    live = fed(b"Twenty letters are two.")
    end = run_engine(noting, {}, {"text": live}, lambda: len(made) >= 3, made.append)
    assert end.outcome == "cancelled"
    assert noting.calls[-1] == "closed"


# -- which engines ---------------------------------------------------------------------------------------------------


def test_the_input_is_offered_by_engines_with_a_text_and_without_such_an_input(noting: Noting) -> None:
    live = InputRule(media_types=["text/plain"], live=True)
    assert with_live_text(noting.capabilities).inputs == {"voice": InputRule(), "text": live}
    assert with_live_text(MOCK.capabilities).inputs["text"] == live
    for call in (lambda prompt: prompt, lambda text: text):  # the second may be anything
        plain = a_function(call).capabilities
        assert with_live_text(plain) is plain

    def takes_a_file(text: bytes) -> int:
        return len(text)

    own = a_function(takes_a_file).capabilities
    assert with_live_text(own) is own
    chunks: list[Chunk] = []
    run_engine(a_function(takes_a_file), {}, {"text": EngineInput(b"abc")}, lambda: False, chunks.append)
    assert chunks[-1] == OutputChunk(3)


def test_a_function_is_called_piece_after_piece() -> None:
    def shout(text: str, times: int = 2) -> Iterator[str]:
        for _ in range(times):
            yield text.upper()

    end, chunks = speak(a_function(shout), "First sentence. The second one, of them.", [4], times=1)
    assert end.outcome == "completed"
    assert chunks == [
        FormatChunk(None),
        OutputChunk("FIRST SENTENCE."),
        MarkChunk(15, 0),
        OutputChunk("THE SECOND ONE, OF THEM."),
        MarkChunk(40, 0),
    ]


def test_a_functions_audio_has_one_format() -> None:
    def tone(text: str) -> tuple[int, Any]:
        import numpy

        return 8_000 + (text.startswith("The") and 1_000), numpy.zeros(len(text))

    end, chunks = speak(a_function(tone), "First sentence. And a second one, so it is.")
    assert end.outcome == "completed"
    assert [mark.sample for mark in marks(chunks)] == [15, 42]
    end, chunks = speak(a_function(tone), "First sentence. The second one, so it is.")
    assert end.outcome == "failed"
    assert "different formats" in end.message


def test_a_class_reads_its_text_itself_if_it_has_such_an_input() -> None:
    def own(text: LiveInput) -> Iterator[str]:
        yield from text.text()

    engine = a_function(own)
    assert engine.capabilities.inputs["text"] == InputRule(required=True, live=True)
    end, chunks = speak(engine, "One. Two. Three.", [5])
    assert end.outcome == "completed"
    assert [chunk.data for chunk in chunks if isinstance(chunk, OutputChunk)] == ["One. ", "Two. ", "Three", "."]


@pytest.fixture(scope="module")
def espeak() -> EspeakEngine:
    engine = EspeakEngine(parse_options(EspeakEngine.OPTIONS, []))
    engine.load()
    return engine


def test_espeak_speaks_each_piece(espeak: EspeakEngine) -> None:
    text = "Hello there, my friend. 你好，今天天气很好。 Good-bye. ☃"
    whole, cut = (marks(speak(espeak, text, sizes)[1]) for sizes in (None, [2]))
    assert [mark.text_end for mark in whole] == [mark.text_end for mark in cut]
    assert len(whole) == 3
    assert whole[0].sample > 11_025
    assert speak(espeak, "☃")[0].outcome == "completed"
    end, _chunks = speak(espeak, "***")
    assert end.message == "text contains nothing to speak"


def test_the_visemes_of_espeak_go_on_from_piece_to_piece(espeak: EspeakEngine) -> None:
    end, chunks = speak(espeak, "Hello there, my friend. Good morning to you all.", visemes=True)
    assert end.outcome == "completed"
    times = [shape["t"] for chunk in chunks if isinstance(chunk, OutputChunk) for shape in chunk.data["visemes"]]
    assert times == sorted(times)
    first, last = (mark.sample / 22_050 for mark in marks(chunks))
    assert any(0 < at - first < 0.3 for at in times)
    assert first < times[-1] <= last + 0.001  # ms


def test_a_restart_is_asked_for_by_any_piece() -> None:
    calls: list[str] = []

    def fails(text: str) -> str:
        calls.append(text)
        if len(calls) > 1:
            raise EngineError("CUDA out of memory", restart=True, retryable=True)
        return text

    end, _chunks = speak(a_function(partial(fails)), "First sentence. The second one, of them.")
    assert (end.outcome, end.restart, end.retryable) == ("failed", True, True)


@pytest.mark.parametrize(
    ("piece_s", "begins"),
    [
        (0.2, [0, 18_000, 36_000]),  # each piece has five pictures, and begins where the audio before it ends
        (0.1, [0, 14_401, 28_802]),  # but never with a picture that is due before the last one
        (None, [0, 18_000, 36_000]),
    ],
)
def test_the_pictures_of_each_piece_follow_those_of_the_piece_before(piece_s: float | None, begins: list[int]) -> None:
    rate = 8_000
    audio = None if piece_s is None else AudioFormat(sample_rate=rate)

    class Signing(Engine):
        @property
        def capabilities(self) -> Capabilities:
            schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
            return Capabilities(format=audio, video=VIDEO, params=schema)

        def load(self) -> None:
            pass

        def generate(self, params: dict[str, Value], inputs: Mapping[str, Any]) -> Iterator[Chunk]:
            yield from [VideoChunk(data, pts, not pts) for data, pts in PICTURES]
            if piece_s is not None:
                yield AudioChunk(bytes(2 * round(piece_s * rate)))

    end, chunks = speak(Signing(), "This is the first one.\n\nThis is the second one.\n\nThis is the third one.")
    assert end.outcome == "completed", end
    assert chunks[0] == FormatChunk(audio, VIDEO)
    shown = [chunk.pts for chunk in chunks if isinstance(chunk, VideoChunk)]
    assert shown == [begin + pts for begin in begins for _, pts in PICTURES]
