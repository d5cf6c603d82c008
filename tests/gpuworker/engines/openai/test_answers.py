"""What engine `openai` makes of the answers of a speech server, good and bad."""

import contextlib
import json
import struct
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuworker.engines.audio_body import AudioBody, declared
from gpuworker.engines.base import (
    AudioChunk,
    Chunk,
    EngineError,
    EngineInput,
    FormatChunk,
    LiveInput,
    MarkChunk,
    OptionError,
)
from gpuworker.engines.model_server.engine import names_in
from gpuworker.engines.model_server.refusals import refusal
from gpuworker.engines.openai.engine import OpenAiEngine
from gpuworker.slots.run_engine import run_engine
from protocol.wire.structs import AudioFormat
from tests.gpuworker.engines.openai.speech_server import (
    LISTS,
    PCM,
    TLS,
    Call,
    SpeechServer,
    an_engine,
    format_of,
    pcm,
    plays,
    run,
)

MONO = AudioFormat(sample_rate=24_000)


def wav(samples: bytes, rate: int = 24_000, *, coding: int = 1, bits: int = 16, size: int | None = None) -> bytes:
    """A WAV with a chunk that nobody needs before its samples, as ffmpeg makes it."""
    fmt = struct.pack("<HHIIHH", coding, 1, rate, rate * bits // 8, bits // 8, bits)
    if coding == 0xFFFE:
        fmt += struct.pack("<HHI16s", 22, bits, 4, b"\x01\0" + bytes(14))
    listed = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    data = b"data" + struct.pack("<I", len(samples) if size is None else size) + samples
    return b"RIFF" + struct.pack("<I", 0xFFFF_FFFF) + b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + listed + data


def read(
    body: bytes, sizes: list[int], headers: dict[str, str] | None = None, *, fixed: bool = False
) -> tuple[list[Chunk], bytes]:
    """What comes of a body that arrives in pieces of these sizes, and then whole."""
    reader = AudioBody(declared(headers or {}), MONO, fixed=fixed)
    chunks: list[Chunk] = []
    for size in sizes:
        chunks += reader.feed(body[:size])
        body = body[size:]
    chunks += reader.feed(body)
    chunks += reader.end()
    return chunks, pcm(chunks)


FLOATS = array("f", [0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0, float("nan")]).tobytes()


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 70), max_size=40))
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (PCM[:301], PCM[:300]),
        (wav(PCM[:300]), PCM[:300]),
        (wav(PCM[:300], coding=0xFFFE), PCM[:300]),
        (wav(PCM[:300], size=0), PCM[:300]),
        (wav(PCM[:301], size=0xFFFF_FFFF), PCM[:300]),
        (wav(PCM[:301]) + b"\0" + wav(PCM[300:400]) + b"LIST\2\0\0\0ab", PCM[:400]),
        (wav(FLOATS, coding=3, bits=32)[:-4], array("h", [0, 16384, -16384, 32767, -32767, 32767, -32767]).tobytes()),
    ],
    ids=["pcm", "wav", "extensible", "endless", "endless and odd", "one after another", "float"],
)
def test_a_body_is_the_same_samples_however_it_is_cut(sizes: list[int], body: bytes, expected: bytes) -> None:
    chunks, samples = read(body, sizes)
    assert samples == expected
    assert format_of(chunks) == (24_000, 1)
    assert all(len(chunk.pcm) % 2 == 0 for chunk in chunks if isinstance(chunk, AudioChunk))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, (24_000, 1)),
        ({"content-type": "audio/pcm"}, (24_000, 1)),
        ({"content-type": "audio/pcm;rate=48000;channels=2"}, (48_000, 2)),
        ({"content-type": 'Audio/L16; rate="16000"'}, (16_000, 1)),
        ({"content-type": "application/octet-stream", "x-audio-sample-rate": "44100"}, (44_100, 1)),
        (
            {"content-type": "audio/pcm; rate=8000", "x-audio-sample-rate": "44100", "x-audio-channels": "2"},
            (44_100, 2),
        ),
        ({"content-type": "audio/pcm; rate=fast", "x-sample-rate": "-1"}, (24_000, 1)),
    ],
)
def test_the_head_says_the_format_of_pcm(headers: dict[str, str], expected: tuple[int, int]) -> None:
    assert format_of(read(PCM, [], headers)[0]) == expected


def test_a_format_that_was_given_holds_whatever_the_head_says() -> None:
    chunks, samples = read(PCM, [], {"content-type": "audio/pcm;rate=48000"}, fixed=True)
    assert samples == PCM
    assert isinstance(chunks[0], AudioChunk)  # the slot has announced the format already
    with pytest.raises(EngineError, match="made audio of 48000 Hz with 1 channel, and not of 24000 Hz"):
        read(wav(PCM, 48_000), [], fixed=True)


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        (b"", {}, "made no audio of this"),
        (b"\0", {}, "made no audio of this"),
        (wav(b""), {}, "made no audio of this"),
        (b"ID3\4" + bytes(100), {}, "neither PCM nor WAV"),
        (
            PCM,
            {"content-type": "audio/mpeg"},
            "sent audio/mpeg, which is neither PCM nor WAV; its owner may try -o resp",
        ),
        (PCM, {"content-type": "audio/wav"}, "neither PCM nor WAV"),
        (PCM, {"x-audio-bits-per-sample": "32"}, "sends 32-bit samples"),
        (PCM, {"x-audio-format": "pcm_f32le"}, "sends pcm_f32le samples"),
        (PCM, {"x-audio-channels": "6"}, "cannot be used: channels"),
        (wav(PCM, bits=24), {}, "24-bit samples of kind 1"),
        (wav(PCM, 1), {}, "cannot be used: sample_rate"),
        (wav(PCM[:4]) + wav(PCM[:4], 48_000), {}, "audio of 48000 Hz with 1 channel after 24000 Hz"),
        (wav(PCM)[:12] + b"fmt \xff\xff\0\0" + bytes(100), {}, "an impossible length"),
        (wav(PCM)[:12] + b"data\xff\xff\0\0" + bytes(100), {}, "no format before its samples"),
    ],
)
def test_a_body_that_is_no_audio_is_told_in_words(body: bytes, headers: dict[str, str], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        read(body, [7], headers)


@settings(max_examples=200)
@given(body=st.binary(max_size=200), riff=st.booleans(), sizes=st.lists(st.integers(0, 30), max_size=8))
def test_no_body_breaks_the_reader(body: bytes, riff: bool, sizes: list[int]) -> None:
    body = b"RIFF\0\0\0\0WAVE" + body if riff else body
    try:
        _, samples = read(body, sizes)
    except EngineError:
        return
    assert 0 < len(samples) <= len(body)


@settings(max_examples=200)
@given(
    names=st.dictionaries(
        st.sampled_from(["content-type", "x-audio-sample-rate", "x-audio-channels", "x-bit-depth", "x-audio-format"]),
        st.one_of(
            st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=30),
            st.sampled_from(
                ["9" * 5_000, "audio/pcm; rate=" + "9" * 5_000, "audio/pcm; rate*=utf-8''24000", "audio/x;;="]
            ),
        ),
    )
)
def test_no_head_breaks_the_reader(names: dict[str, str]) -> None:
    with contextlib.suppress(EngineError):
        read(PCM, [], names)


# -- through HTTP


def test_samples_are_passed_on_as_they_come_and_the_request_is_openai_s() -> None:
    def script(call: Call) -> None:
        call.stream([PCM[:1], PCM[1:6], PCM[6:9], PCM[9:]])

    with SpeechServer(script) as server, an_engine(server.url) as engine:
        capabilities = engine.capabilities
        assert (capabilities.format, capabilities.late_format) == (MONO, True)
        assert (capabilities.reproducible, capabilities.streams) == (False, False)
        assert capabilities.params["properties"]["voice"]["enum"] == ["anna", "bert"]
        end, chunks = run(engine, {"voice": "bert", "instructions": "Whisper.", "speed": 1.5})
        assert end.outcome == "completed"
        assert pcm(chunks) == PCM
        assert (server.calls[0].method, server.calls[0].path) == ("POST", "/v1/audio/speech")
        assert "authorization" not in server.calls[0].headers
        assert server.calls[0].body == {
            "model": "kokoro",
            "input": "Hello.",
            "voice": "bert",
            "instructions": "Whisper.",
            "speed": 1.5,
            "response_format": "pcm",
            "stream": True,
            "stream_format": "audio",
        }
        assert pcm(run(engine)[1]) == PCM
        assert "voice" not in server.calls[1].body


def test_a_text_that_comes_is_asked_for_piece_after_piece() -> None:
    live = LiveInput("text/plain")
    live.feed(b"A first sentence. And a second one, so it ")
    live.feed(b"is.", last=True)
    chunks: list[Chunk] = []
    with SpeechServer(plays) as server, an_engine(server.url) as engine:
        end = run_engine(engine, {"voice": "amy"}, {"text": live}, lambda: False, chunks.append)
    assert end.outcome == "completed"
    assert [call.body["input"] for call in server.calls] == ["A first sentence.", "And a second one, so it is."]
    assert {call.body["voice"] for call in server.calls} == {"amy"}
    assert pcm(chunks) == 2 * PCM
    assert sum(isinstance(chunk, FormatChunk) for chunk in chunks) == 1
    ends = [chunk for chunk in chunks if isinstance(chunk, MarkChunk)]
    assert ends == [MarkChunk(17, len(PCM) // 2), MarkChunk(45, len(PCM))]


def test_the_first_audio_is_passed_on_before_the_last_is_made() -> None:
    with SpeechServer(lambda call: None) as server, an_engine(server.url) as engine:

        def script(call: Call) -> None:
            call.head("200 OK", "Content-Type: audio/pcm")
            call.send(PCM[:100])
            call.until_given_up()

        server.script = script
        chunks: list[Chunk] = []
        end, _ = run(engine, cancelled=lambda: len(chunks) == 2, chunks=chunks)
        assert end.outcome == "cancelled"
        assert chunks == [FormatChunk(MONO), AudioChunk(PCM[:100])]


def test_options_say_what_is_asked_for() -> None:
    def script(call: Call) -> None:
        call.answer(wav(PCM, 16_000), "200 OK", "Content-Type: audio/wav")

    options = ("model=big", "voices=anna,bert", "response_format=wav", 'extra={"language":"English","stream":null}')
    with SpeechServer(script) as server, an_engine(server.url, *options) as engine:
        end, chunks = run(engine)
        assert (end.outcome, format_of(chunks), pcm(chunks)) == ("completed", (16_000, 1), PCM)
        body = server.calls[0].body
        assert {name: body.get(name) for name in ("model", "voice", "response_format", "language", "stream")} == {
            "model": "big",
            "voice": "anna",
            "response_format": "wav",
            "language": "English",
            "stream": None,
        }


def test_a_recording_of_a_voice_is_sent_as_a_data_url() -> None:
    def script(call: Call) -> None:
        call.answer(PCM)

    with SpeechServer(script) as server, an_engine(server.url, "cloning=true", "voices=*") as engine:
        assert set(engine.capabilities.inputs) == {"reference_wav"}
        assert "enum" not in engine.capabilities.params["properties"]["voice"]
        recording = EngineInput(b"RIFF\0\0\0\0WAVEx")
        end, _ = run(engine, {"ref_text": "What I said."}, inputs={"reference_wav": recording})
        assert end.outcome == "completed"
        body = server.calls[0].body
        assert body["ref_audio"] == "data:audio/wav;base64,UklGRgAAAABXQVZFeA=="
        assert body["ref_text"] == "What I said."
        end, _ = run(engine, {"ref_text": "What I said."})
        assert (end.code, set(end.details)) == ("invalid_params", {"reference_wav"})
    with SpeechServer(script) as server, an_engine(server.url) as engine:
        assert engine.capabilities.inputs == {}
        assert "ref_text" not in engine.capabilities.params["properties"]


def test_nanovllm_is_asked_at_its_own_path_and_says_its_rate() -> None:
    def script(call: Call) -> None:
        call.stream([PCM], "Content-Type: audio/L16", "X-Audio-Sample-Rate: 48000", "X-Audio-Channels: 1")

    info = {"/info": {"model": {"sample_rate": 48_000, "channels": 1}}}
    with SpeechServer(script, info) as server:
        url = server.url.removesuffix("/v1")
        with an_engine(url, "api=nanovllm", "cloning=true") as engine:
            assert engine.capabilities.format == AudioFormat(sample_rate=48_000)
            inputs = {"prompt_wav": EngineInput(b"fLaC"), "reference_wav": EngineInput(b"ID3")}
            end, chunks = run(engine, {"seed": 7, "cfg_value": 2.0, "prompt_text": "So."}, inputs=inputs)
            assert (end.outcome, format_of(chunks), pcm(chunks)) == ("completed", (48_000, 1), PCM)
            assert server.calls[0].path == "/generate"
            assert server.calls[0].body == {
                "target_text": "Hello.",
                "response_format": "pcm",
                "seed": 7,
                "cfg_value": 2.0,
                "prompt_text": "So.",
                "prompt_wav_base64": "ZkxhQw==",
                "prompt_wav_format": "flac",
                "ref_audio_wav_base64": "SUQz",
                "ref_audio_wav_format": "mp3",
            }
            assert set(run(engine, {"prompt_text": "So."})[0].details) == {"prompt_wav"}
            assert set(run(engine, inputs={"prompt_wav": EngineInput(b"fLaC")})[0].details) == {"prompt_text"}
    with SpeechServer(script, {}) as server, an_engine(server.url, "api=nanovllm") as engine:
        assert engine.capabilities.inputs == {}
        assert format_of(run(engine)[1]) == (48_000, 1)


WORDS = OpenAiEngine.WORDS
KEY = "sk-abcdefghijk"
ERROR = json.dumps(
    {"error": {"message": f"no voice 'x' at http://10.0.0.1/?k={KEY} in /srv/tts/v.py", "param": "voice"}}
)
FASTAPI = {
    "detail": [{"loc": ["body", "input"], "msg": "is too long"}, {"loc": ["body", "speed"], "msg": "is too big"}]
}


@pytest.mark.parametrize(
    ("status", "body", "code", "retryable", "words"),
    [
        (
            "400 Bad Request",
            ERROR,
            "invalid_params",
            False,
            r"\(HTTP 400\): no voice 'x' at \(an address\) in \(a path\)",
        ),
        ("422 X", json.dumps(FASTAPI), "invalid_params", False, "text: is too long; speed: is too big"),
        ("413 X", "<html>no</html>", "invalid_params", False, r"refuses this request \(HTTP 413\)$"),
        ("401 Unauthorized", ERROR, "engine_failed", False, r"refuses the worker \(HTTP 401\); its owner gives a key"),
        ("403 X", ERROR, "engine_failed", False, "refuses the worker"),
        ("404 X", '{"detail": "no model big"}', "engine_failed", False, r"the path \(HTTP 404\): no model big"),
        ("429 X", ERROR, "engine_failed", True, "is busy"),
        ("503 X", ERROR, "engine_failed", True, "is busy"),
        ("502 X", ERROR, "engine_failed", True, "answers nothing now"),
        ("504 X", ERROR, "engine_failed", True, "failed"),
        (
            "500 X",
            ERROR,
            "engine_failed",
            False,
            r"failed \(HTTP 500\); the worker's owner finds the reason in its log$",
        ),
        ("307 X", "", "engine_failed", False, "is elsewhere"),
        ("200 OK", '{"error": "out of voices"}', "engine_failed", False, "answered without audio: out of voices"),
        ("200 OK", 'data: {"type": "speech.audio.delta"}', "engine_failed", False, "answered without audio; its owner"),
        ("200 OK", "[" * 100_000, "engine_failed", False, "answered without audio"),
    ],
)
def test_what_the_server_says_arrives_in_words_without_what_is_its_own(
    status: str, body: str, code: str, retryable: bool, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def script(call: Call) -> None:
        location = "Location: http://127.0.0.1:1/elsewhere"
        call.answer(body.encode(), status, "Content-Type: application/json", location)

    with SpeechServer(script) as server, an_engine(server.url) as engine:
        end, _ = run(engine)
        assert len(server.calls) == 1
    assert (end.outcome, end.code, end.retryable) == ("failed", code, retryable)
    with pytest.raises(EngineError, match=words):
        raise EngineError(end.message)
    assert "http://" not in end.message + str(end.details)
    assert KEY not in end.message + str(end.details)
    assert f"it answered HTTP {status[:3]}" in capfd.readouterr().err


def test_faults_of_fields_are_named_after_the_params() -> None:
    assert set(refusal(WORDS, 422, {}, json.dumps(FASTAPI).encode()).details) == {"text", "speed"}
    assert set(refusal(WORDS, 400, {}, ERROR.encode()).details) == {"voice"}


@settings(max_examples=200)
@given(
    status=st.integers(100, 999),
    body=st.one_of(
        st.binary(max_size=100),
        st.recursive(
            st.none() | st.text(max_size=5) | st.integers(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["error", "detail", "message", "msg", "loc", "param"]), inner, max_size=3
                )
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    ),
    after=st.sampled_from(["", "3", "x", "-1", "Fri, 31 Dec 1999 23:59:59 GMT", "9" * 5000]),
)
def test_no_refusal_breaks_the_engine(status: int, body: bytes, after: str) -> None:
    assert str(refusal(WORDS, status, {"retry-after": after}, body))


def huge(call: Call) -> None:
    call.head("500 Internal Server Error", "Transfer-Encoding: chunked")
    while True:
        call.chunk(b"x" * 65_536)


def test_an_error_without_end_is_read_in_part() -> None:
    with SpeechServer(huge) as server, an_engine(server.url) as engine:
        end, _ = run(engine)
    assert (end.outcome, end.code) == ("failed", "engine_failed")


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}, {"id": "a"}]}, ("a", "b")),
        ({"voices": ["a", "b", 3, ""]}, ("a", "b")),
        ([{"voice_id": "a"}, {"name": "b"}, {}], ("a", "b")),
        ({"voices": {"a": {}, "b": {}}}, ("a", "b")),
        (None, ()),
        ("a", ()),
        ({"data": 3}, ()),
    ],
)
def test_names_are_found_in_the_lists_that_servers_have(listed: object, expected: tuple[str, ...]) -> None:
    assert names_in(listed) == expected


@pytest.mark.parametrize("lists", [{}, {"/v1/models": []}, {"/v1/audio/voices": {"voices": []}}])
def test_a_server_without_lists_takes_any_voice(lists: dict[str, object]) -> None:
    with SpeechServer(lambda call: call.answer(PCM), lists) as server, an_engine(server.url) as engine:
        assert "enum" not in engine.capabilities.params["properties"]["voice"]
        assert run(engine, {"voice": "anybody"})[0].outcome == "completed"
        assert server.calls[0].body["voice"] == "anybody"
        assert "model" not in server.calls[0].body


def test_https_is_checked_by_the_certificates_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with SpeechServer(plays, tls=True) as server:
        assert server.url.startswith("https:")
        with pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED"), an_engine(server.url):
            pass
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
        with an_engine(server.url) as engine:
            assert pcm(run(engine)[1]) == PCM


def test_a_key_is_read_from_its_file_and_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # of no use on one's own network
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    with SpeechServer(lambda call: call.answer(PCM)) as server, an_engine(server.url, f"api_key_file={path}") as engine:
        assert run(engine)[0].outcome == "completed"
        assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"
    for content in ("", "two keys", "schlüssel"):
        path.write_text(content)
        with pytest.raises(EngineError, match="must contain one key"), an_engine(server.url, f"api_key_file={path}"):
            pass
    with (
        pytest.raises(EngineError, match="cannot be read: No such file"),
        an_engine(server.url, "api_key_file=/no/key"),
    ):
        pass


def test_a_server_with_several_models_needs_a_choice() -> None:
    lists = {**LISTS, "/v1/models": {"data": [{"id": "a"}, {"id": "b"}]}}
    with SpeechServer(lambda call: call.answer(PCM), lists) as server:
        with pytest.raises(EngineError, match="several models, choose one: -o model=… a, b"), an_engine(server.url):
            pass
        with an_engine(server.url, "model=c") as engine:  # it may have more than it lists
            assert run(engine)[0].outcome == "completed"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("url=127.0.0.1:8880", "write the server's address up to /v1"),
        ("url=ftp://host/v1", "write the server's address"),
        ("url=http://host:99999/v1", "write the server's address"),
        ("url=http://", "write the server's address"),
        ("url=http://user:secret@host/v1", "a key goes into -o api_key_file"),
        ("url=http://host/v1?key=secret", "a key goes into -o api_key_file"),
        ("url=http://host/v1/audio/speech", "leave out /audio/speech"),
        ("sample_rate=1", "sample_rate"),
        ("wait_s=-1", "wait_s=-1.0: must be a number of seconds"),
        ("silence_s=0", "silence_s=0.0: must be a number of seconds"),
        ("extra=[]", "write a JSON object"),
        ("extra={", "write a JSON object"),
    ],
)
def test_options_that_cannot_be_are_refused_in_words_and_secrets_are_not_repeated(option: str, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught, an_engine("http://host/v1", option):
        pass
    assert "secret" not in str(caught.value)
