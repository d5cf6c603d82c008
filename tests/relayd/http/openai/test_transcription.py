"""`POST /v1/audio/transcriptions`, with a worker whose every move the test makes."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from gpuworker.hearing.hearing import capabilities
from protocol.wire.frames import Completed, Failed, Output, Started
from protocol.wire.messages import Assign, Input
from relayd.http.openai.transcription_request import Transcript
from tests.support.fake_worker import MESSAGES, FakeWorker, fake_worker, identity
from tests.support.raw_http_client import Answer, File, Visitor, form, visitor
from tests.support.relay import Daemon, daemon

TCP: dict[str, Any] = {"listen": "127.0.0.1:0"}
HEARS = capabilities(decodes=False)
#: What a worker hears: two segments of one utterance at 16 kHz.
HEARD = (
    "Good morning.",
    {"segment": {"start": 8_000, "end": 16_000}},
    " It is late.",
    {"segment": {"start": 20_000, "end": 40_800}},
    {"utterance": {"start": 0, "end": 48_000, "sample_rate": 16_000}},
    {"finish_reason": "stop", "language": "en", "usage": {"type": "duration", "seconds": 3.0}},
)
WAV = File(b"RIFF\x24\0\0\0WAVEfmt " + bytes(24), "application/octet-stream", "hello.wav")


@asynccontextmanager
async def hearing(
    state_dir: Path, *, more: dict[str, Any] | None = None, **overrides: Any
) -> AsyncIterator[tuple[Daemon, FakeWorker, Visitor]]:
    """A daemon with a worker of space `stt`, and others of spaces that speak and reply."""
    config: dict[str, Any] = {"spaces": {"tts": {}, "llm": {}, "stt": {}}} | TCP | overrides
    register: dict[str, Any] = {"params": HEARS.params, "format": None, "inputs": HEARS.inputs} | (more or {})
    async with (
        daemon(state_dir, **config) as relay,
        fake_worker(relay.url),
        fake_worker(relay.url, name="model", spaces=("llm",), params=MESSAGES, format=None),
        fake_worker(relay.url, name="ears", spaces=("stt",), **register) as worker,
        visitor(relay.urls[0], token=relay.tokens.create(role="client", name="ann", now=0.0).text) as http,
    ):
        yield relay, worker, http


def tell(worker: FakeWorker, assign: Assign, *told: Any) -> None:
    """Send `started`, what was heard, and `completed`."""
    worker.send(Started(**identity(assign, 0), format=None))
    for number, data in enumerate(told, 1):
        worker.send(Output(**identity(assign, number), data=data))
    worker.send(Completed(**identity(assign, len(told) + 1)))


async def ask(http: Visitor, **parts: str | File) -> Answer:
    fields: dict[str, str | File] = {"model": "stt", "file": WAV, **parts}
    return await http.ask("POST", "/v1/audio/transcriptions", **form(fields))


async def transcribed(worker: FakeWorker, http: Visitor, *told: Any, **parts: str | File) -> tuple[Assign, Answer]:
    """What the worker is asked for, and what the client is answered."""
    asked: list[Assign] = []

    async def serve() -> None:
        asked.append(await worker.assigned())
        tell(worker, asked[0], *(told or HEARD))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        answer = await ask(http, **parts)
    return asked[0], answer


@pytest.mark.trio
async def test_a_file_becomes_an_input_and_the_transcript_its_text(tmp_path: Path) -> None:
    async with hearing(tmp_path) as (relay, worker, http):
        assign, answer = await transcribed(worker, http, language="en", prompt="Names: Ann.", temperature="0.2")
        assert answer.json == {
            "text": "Good morning. It is late.",
            "usage": {"type": "duration", "seconds": 3.0},
        }
        assert answer.headers["x-request-id"] == assign.request_id
        assert answer.headers["x-relay-space"] == "stt"
        expected = {"turn_detection": "none", "language": "en", "prompt": "Names: Ann.", "temperature": 0.2}
        assert assign.params == expected
        assert assign.inputs["audio"].media_type == "audio/wav"  # by its first bytes
        piece = await worker.peer.next(Input)
        assert bytes(piece.data) == WAV.data
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("response_format", "media_type", "body"),
    [
        ("text", "text/plain; charset=utf-8", "Good morning. It is late.\n"),
        (
            "srt",
            "application/x-subrip; charset=utf-8",
            "1\n00:00:00,500 --> 00:00:01,000\nGood morning.\n\n2\n00:00:01,250 --> 00:00:02,550\nIt is late.\n\n",
        ),
        (
            "vtt",
            "text/vtt; charset=utf-8",
            "WEBVTT\n\n00:00:00.500 --> 00:00:01.000\nGood morning.\n\n00:00:01.250 --> 00:00:02.550\nIt is late.\n\n",
        ),
    ],
)
async def test_the_formats_that_are_text(tmp_path: Path, response_format: str, media_type: str, body: str) -> None:
    async with hearing(tmp_path) as (_, worker, http):
        _, answer = await transcribed(worker, http, response_format=response_format)
        assert (answer.headers["content-type"], answer.body.decode()) == (media_type, body)


@pytest.mark.trio
async def test_verbose_json_says_when_each_piece_was_said(tmp_path: Path) -> None:
    async with hearing(tmp_path) as (_, worker, http):
        parts = {"response_format": "verbose_json", "timestamp_granularities[]": "segment"}
        _, answer = await transcribed(worker, http, **parts)
        assert answer.json == {
            "task": "transcribe",
            "language": "en",
            "duration": 3.0,
            "text": "Good morning. It is late.",
            "segments": [
                {"id": 0, "start": 0.5, "end": 1.0, "text": "Good morning."},
                {"id": 1, "start": 1.25, "end": 2.55, "text": " It is late."},
            ],
            "usage": {"type": "duration", "seconds": 3.0},
        }


def events(body: bytes) -> list[Any]:
    return [json.loads(line.removeprefix(b"data: ")) for line in body.split(b"\n\n")[:-1]]


@pytest.mark.trio
async def test_a_stream_has_each_piece_before_the_next_is_recognized(tmp_path: Path) -> None:
    async with hearing(tmp_path) as (_, worker, http):
        fields: dict[str, str | File] = {"model": "whisper-1", "file": WAV, "stream": "true"}
        await http.begin("POST", "/v1/audio/transcriptions", **form(fields))
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=None))
        worker.send(Output(**identity(assign, 1), data="Good morning."))
        answer = await http.answer()
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        first = await http.next_event()
        assert events(bytes(first.data)) == [{"type": "transcript.text.delta", "delta": "Good morning."}]
        worker.send(Output(**identity(assign, 2), data=" It is late."))
        worker.send(Output(**identity(assign, 3), data=HEARD[-1]))
        worker.send(Completed(**identity(assign, 4)))
        await answer.rest()
        assert events(answer.body) == [
            {"type": "transcript.text.delta", "delta": " It is late."},
            {
                "type": "transcript.text.done",
                "text": "Good morning. It is late.",
                "usage": {"type": "duration", "seconds": 3.0},
            },
        ]


@pytest.mark.trio
async def test_what_nobody_said_is_an_empty_transcript(tmp_path: Path) -> None:
    async with hearing(tmp_path) as (_, worker, http):
        _, answer = await transcribed(worker, http, HEARD[-1])
        assert (answer.status, answer.json["text"]) == (200, "")


@pytest.mark.trio
@pytest.mark.parametrize(
    ("parts", "status", "param", "what"),
    [
        ({"model": ""}, 400, "model", "is required"),
        ({"file": "no file"}, 400, "file", "is required: the sound, as a file"),
        ({"voice": WAV}, 400, "voice", "is not a file of this API; send file"),
        ({"response_format": "diarized_json"}, 400, "response_format", "must be one of json, text"),
        ({"response_format": "srt", "stream": "true"}, 400, "stream", "cannot be true for response_format srt"),
        ({"stream": "maybe"}, 400, "stream", "must be true or false"),
        ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities[]", "must be segment"),
        ({"language": "the Queen's"}, 400, "language", "must be a language such as en"),
        ({"temperature": "hot"}, 400, "temperature", "must be a number"),
        ({"temperature": "2"}, 400, "temperature", "must lie in 0..1"),
        ({"prompt": "a" * 4_001}, 400, "prompt", "may have 4000 characters"),
        (
            {"file": File(b"OggS" + bytes(60), "audio/ogg")},
            400,
            "file",
            "is audio/ogg, and model 'stt' reads audio/l16",
        ),
        ({"model": "tts"}, 400, "model", "does not write down what it hears"),
    ],
)
async def test_what_is_wrong_is_said_and_the_next_is_heard(
    tmp_path: Path, parts: dict[str, Any], status: int, param: str | None, what: str
) -> None:
    async with hearing(tmp_path) as (relay, worker, http):
        answer = await ask(http, **parts)
        error = answer.json["error"]
        assert (answer.status, error["param"]) == (status, param), error
        assert what in error["message"]
        async with visitor(relay.urls[0], token=http.headers["authorization"].split()[1]) as again:
            assert (await transcribed(worker, again))[1].status == 200


@pytest.mark.trio
async def test_a_form_is_needed(tmp_path: Path) -> None:
    async with hearing(tmp_path) as (_, _, http):
        answer = await http.ask("POST", "/v1/audio/transcriptions", told={"model": "stt"})
        assert answer.status == 415
        assert "multipart/form-data" in answer.json["error"]["message"]


@pytest.mark.trio
async def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with hearing(tmp_path, limits={"max_input_bytes": 1_000_000}) as (relay, _, http):
        answer = await ask(http, file=File(bytes(1_000_001)))
        assert (answer.status, answer.json["error"]["code"]) == (413, "input_too_large")
        await relay.at_rest()


@pytest.mark.trio
async def test_an_engine_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    async with hearing(tmp_path) as (_, worker, http), trio.open_nursery() as nursery:

        async def fail() -> None:
            assign = await worker.assigned()
            failed = Failed(**identity(assign, 0), code="input_mismatch", message="this WAV is broken")
            worker.send(failed)

        nursery.start_soon(fail)
        answer = await ask(http)
        assert answer.json["error"]["message"] == "this WAV is broken"
        assert answer.json["error"]["code"] == "input_mismatch"
        assert answer.status == 400


@pytest.mark.trio
async def test_only_what_the_worker_declares_is_sent(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"turn_detection": {"type": "string"}}, "additionalProperties": False}
    async with hearing(tmp_path, more={"params": schema}) as (_, worker, http):
        assign, answer = await transcribed(worker, http, language="en", prompt="a", temperature="0")
        assert (answer.status, assign.params) == (200, {"turn_detection": "none"})


@pytest.mark.trio
async def test_models_name_the_space_and_openais_names_stand_for_it(tmp_path: Path) -> None:
    async with hearing(tmp_path) as (_, worker, http):
        told = await http.get("/v1/models")
        assert [row["id"] for row in told.json["data"]] == ["check", "llm", "stt", "tts"]
        for model in ("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "openai/whisper-1"):
            assert (await http.get(f"/v1/models/{model}")).json["id"] == model
            assign, answer = await transcribed(worker, http, model=model)
            assert (assign.space, answer.status) == ("stt", 200)


def test_a_transcript_without_times_has_none() -> None:
    transcript = Transcript()
    transcript.note({"segment": {"start": 1, "end": 2}})  # of no text
    transcript.add("Yes.")
    transcript.note({"segment": "?"})
    assert transcript.segments == []
    assert transcript.in_format("srt")[0] == ""
    assert transcript.seconds == 0.0
