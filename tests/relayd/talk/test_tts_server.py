"""The protocol of the VoxCPM server: its messages, its limits, and what a client may do wrong."""

import json
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio_websocket import WebSocketConnection

from relayd.talk.dialects import tts_server
from tests.relayd.http.sample_handlers import make_token
from tests.relayd.http.sample_sockets import denial, socket_to
from tests.support.relay import until
from tests.support.talking import Speaker, Stage, speech_of, stage

#: The client of that server's integration test, unchanged but for its URL.
SCRIPT = """
import asyncio, json, websockets

async def main():
    uri = "ws://localhost:8765/tts"
    async with websockets.connect(uri) as ws:
        request = {
            "type": "tts_request",
            "request_id": "test-001",
            "params": {
                "text": "Hello, world!",
                "mode": "streaming"
            }
        }
        await ws.send(json.dumps(request))

        chunks_received = 0
        while True:
            message = await ws.recv()
            if isinstance(message, bytes):
                chunks_received += 1
            else:
                msg = json.loads(message)
                if msg["type"] == "complete":
                    break

        assert chunks_received > 0

asyncio.run(main())
"""


@attrs.define(eq=False)
class Client:
    socket: WebSocketConnection

    async def send(self, told: dict[str, Any] | str | bytes) -> None:
        await self.socket.send_message(json.dumps(told) if isinstance(told, dict) else told)

    async def ask(self, text: str = "Hello", request_id: Any = "r-1", **params: Any) -> None:
        await self.send({"type": "tts_request", "request_id": request_id, "params": {"text": text} | params})

    async def answer(self) -> Any:
        with trio.fail_after(10):
            message = await self.socket.get_message()
        return parsed(message) if isinstance(message, bytes) else json.loads(message)

    async def until(self, *types: str) -> list[Any]:
        answers: list[Any] = []
        while not answers or not isinstance(answers[-1], dict) or answers[-1]["type"] not in types:
            answers.append(await self.answer())
        return answers

    async def error(self, told: dict[str, Any] | str | bytes) -> tuple[str, str]:
        await self.send(told)
        error = (await self.answer())["error"]
        return error["code"], error["message"]


def parsed(message: bytes) -> tuple[int, dict[str, Any], bytes]:
    """A binary message: its type, what it says, and its audio."""
    magic, kind, reserved, size = struct.unpack_from(">2sBBI", message)
    assert (magic, reserved) == (b"\xaa\x55", 0)
    head, (length,) = message[8 : 8 + size], struct.unpack_from(">I", message, 8 + size)
    pcm = message[12 + size :]
    assert len(pcm) == length
    return kind, json.loads(head), pcm


@asynccontextmanager
async def serving(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Stage, Speaker, str]]:
    """A daemon with a worker that speaks; its path, with a token."""
    talk = {"tts_server": True} | options.pop("talk", {})
    async with stage(tmp_path, listen="127.0.0.1:0", talk=talk, **options) as on:
        speaker = await on.speaker(slots=20)
        yield on, speaker, f"/tts?token={make_token(on.daemon)}"


@asynccontextmanager
async def connected(on: Stage, path: str) -> AsyncIterator[Client]:
    async with socket_to(on.daemon.urls[0], path) as socket:
        yield Client(socket)


def progress(state: str, fraction: float, words: str, request_id: str = "r-1") -> dict[str, Any]:
    return {"type": "progress", "request_id": request_id, "state": state, "progress": fraction, "message": words}


@pytest.mark.trio
async def test_streaming_sends_each_piece_as_it_comes(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, speaker, path), connected(on, path) as client:
        await client.ask("Hello, world!", mode="streaming", cfg_value=2.0, normalize=False, temperature=1)
        first, second, *chunks, last = await client.until("complete")
        assert first == progress("processing", 0.0, "Processing request")
        assert second == progress("generating", 0.1, "Generating audio...")
        assert chunks == [
            (1, {"request_id": "r-1", "sequence": number, "sample_rate": 24_000, "is_final": False}, speech_of(word))
            for number, word in enumerate(("Hello,", "world!"))
        ]
        result = {"duration": 120 / 24_000, "sample_rate": 24_000, "samples": 120, "chunks": 2}
        assert last == {"type": "complete", "request_id": "r-1", "result": result}
        assert speaker.assigns[0].params == {"text": "Hello, world!", "temperature": 1}, "defaults are not asked for"


@pytest.mark.trio
async def test_non_streaming_sends_one_whole(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _, path), connected(on, path) as client:
        await client.ask("Hello, world!", mode="non_streaming")
        answers = await client.until("complete")
        assert answers == [
            progress("processing", 0.0, "Processing request"),
            progress("generating", 0.5, "Generating audio..."),
            progress("encoding", 0.9, "Encoding audio..."),
            (2, {"request_id": "r-1", "sample_rate": 24_000, "duration": 0.005}, speech_of("Hello,world!")),
            {
                "type": "complete",
                "request_id": "r-1",
                "result": {"duration": 0.005, "sample_rate": 24_000, "samples": 120, "chunks": 1},
            },
        ]


@pytest.mark.trio
async def test_a_space_with_a_mode_and_the_params_is_told_them(tmp_path: Path) -> None:
    names = ("text", "mode", "cfg_value", "inference_timesteps")
    params = {"type": "object", "properties": {name: {} for name in names}, "additionalProperties": False}
    async with stage(tmp_path, listen="127.0.0.1:0", talk={"tts_server": True}) as on:
        speaker = await on.speaker(params=params)
        async with connected(on, f"/tts?token={make_token(on.daemon)}") as client:
            await client.ask(mode="non_streaming", cfg_value=2.0, retry_badcase=True, prompt_text=None)
            await client.until("complete")
            assert speaker.assigns[0].params == {"text": "Hello", "mode": "non_streaming", "cfg_value": 2.0}
            await client.ask(normalize=True)
            error = (await client.until("error"))[-1]["error"]
            assert (error["code"], list(error["details"])) == ("INVALID_PARAMS", ["normalize"])
            assert error["message"] == f"Validation failed: normalize: {error['details']['normalize']}"


@pytest.mark.trio
async def test_the_integration_test_of_that_server_runs(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _, path):
        script = SCRIPT.replace("ws://localhost:8765/tts", on.daemon.urls[0] + path)
        with trio.fail_after(60):
            await trio.run_process([sys.executable, "-c", script])


@pytest.mark.trio
async def test_a_cancel_ends_a_request_and_is_answered_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, speaker, path), connected(on, path) as client:
        speaker.lingers = trio.Event()
        await client.ask()
        for _ in range(2):
            await client.until("progress")
        assert (await client.answer())[0] == 1
        await client.send({"type": "cancel", "request_id": "r-1"})
        assert await client.answer() == {"type": "complete", "request_id": "r-1", "result": {"cancelled": True}}
        await until(lambda: len(speaker.cancelled) == 1)
        await client.send({"type": "cancel", "request_id": "unknown"})
        assert (await client.answer())["result"] == {"cancelled": True}
        speaker.lingers = None
        await client.ask()
        assert (await client.until("complete"))[-1]["result"]["samples"] == 50


@pytest.mark.trio
async def test_ping_is_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _, path), connected(on, path) as client:
        await client.send({"type": "ping", "timestamp": 1234})
        answer = await client.answer()
        assert (answer["type"], answer["timestamp"], type(answer["server_time"])) == ("pong", 1234, int)
        await client.send('{"type": "ping", "timestamp": NaN}')
        assert (await client.answer())["timestamp"] == "NaN", "which is no JSON by itself"
        await client.send({"type": "ping"})
        assert (await client.answer())["timestamp"] == 0


@pytest.mark.trio
async def test_what_a_client_sends_wrong_is_named_and_the_connection_stays(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _, path), connected(on, path) as client:
        for sent, code, message in (
            ("{", "INVALID_JSON", "Invalid JSON format"),
            ("[1]", "INVALID_JSON", "Invalid JSON format"),
            ("[" * 500_000, "INVALID_JSON", "Invalid JSON format"),
            (b"\0", "UNSUPPORTED_FORMAT", "Binary messages from client are not supported"),
            ({"type": "other"}, "UNKNOWN_MESSAGE_TYPE", "Unknown message type: other"),
            ({"type": ["a"]}, "UNKNOWN_MESSAGE_TYPE", "Unknown message type: an array"),
            ({"type": "tts_request", "request_id": 5}, "INVALID_PARAMS", "Validation failed: request_id: must be a"),
            ({"type": "cancel", "request_id": {}}, "INVALID_PARAMS", "Validation failed: request_id: must be a"),
            ({"type": "tts_request", "params": []}, "INVALID_PARAMS", "Validation failed: params: must be an object"),
            ({"type": "tts_request"}, "INVALID_PARAMS", "Validation failed: text: is required"),
        ):
            told = await client.error(sent)
            assert told[0] == code
            assert told[1].startswith(message)
        await client.ask()
        assert (await client.until("complete", "error"))[-1]["type"] == "complete"


@pytest.mark.trio
async def test_params_have_the_ranges_and_the_words_of_that_server(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _, path), connected(on, path) as client:
        for name, value, fault in (
            ("text", 5, "must be a string"),
            ("text", "", "cannot be empty"),
            ("text", "x" * 5_001, "too long (max 5000 characters)"),
            ("mode", "fast", "must be 'streaming' or 'non_streaming'"),
            ("mode", [], "must be 'streaming' or 'non_streaming'"),
            ("cfg_value", "2", "must be a number"),
            ("cfg_value", 0.09, "must be between 0.1 and 10.0"),
            ("cfg_value", 10.1, "must be between 0.1 and 10.0"),
            ("inference_timesteps", 1.5, "must be an integer"),
            ("inference_timesteps", True, "must be an integer"),
            ("inference_timesteps", 0, "must be between 1 and 50"),
            ("inference_timesteps", 51, "must be between 1 and 50"),
            ("normalize", 1, "must be a boolean"),
            ("denoise", None, "must be a boolean"),
            ("retry_badcase", "yes", "must be a boolean"),
            ("retry_badcase_max_times", -1, "must be between 0 and 10"),
            ("retry_badcase_max_times", 11, "must be between 0 and 10"),
            ("retry_badcase_ratio_threshold", 0.9, "must be between 1.0 and 20.0"),
            ("retry_badcase_ratio_threshold", 20.1, "must be between 1.0 and 20.0"),
        ):
            params: dict[str, Any] = {"text": "Hello"} | {name: value}
            await client.ask(**params)
            (answer,) = await client.until("error")
            assert answer["request_id"] == "r-1"
            message, details = f"Validation failed: {name}: {fault}", {name: fault}
            assert answer["error"] == {"code": "INVALID_PARAMS", "message": message, "details": details}
        bounds: dict[str, Any] = {"cfg_value": 10, "inference_timesteps": 50, "retry_badcase_max_times": 0}
        await client.ask("x" * 5_000, **bounds, retry_badcase_ratio_threshold=1)
        assert (await client.until("complete", "error"))[-1]["type"] == "complete"


@pytest.mark.trio
async def test_failures_have_the_codes_of_that_server(tmp_path: Path) -> None:
    spaces = {"tts": {"when_empty": "refuse"}}
    async with serving(tmp_path, spaces=spaces) as (on, speaker, path), connected(on, path) as client:
        speaker.fails_with = "engine_failed"
        await client.ask(request_id=None)
        failed = (await client.until("error"))[-1]
        assert (failed["request_id"], failed["error"]["code"]) == (None, "GENERATION_FAILED")
        assert failed["error"]["message"] == "as the test says"
        speaker.gone.set()
        await until(lambda: not on.daemon.relay.workers.serving("tts"))
        await client.ask()
        assert (await client.until("error"))[-1]["error"]["code"] == "MODEL_NOT_LOADED"
    async with serving(tmp_path, talk={"speech": ""}) as (on, _, path), connected(on, path) as client:
        await client.ask()
        assert (await client.until("error"))[-1]["error"]["code"] == "MODEL_NOT_LOADED"


@pytest.mark.trio
async def test_audio_that_fits_into_no_message_is_an_error_and_cancels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"max_backlog_bytes": 2 * 1024 * 1024}
    monkeypatch.setattr(tts_server, "OTHER_BYTES", limits["max_backlog_bytes"] - 90_000)
    async with serving(tmp_path, limits=limits) as (on, speaker, path), connected(on, path) as client:
        speaker.lingers = trio.Event()
        await client.ask("x" * 4_900, mode="non_streaming")
        error = (await client.until("error"))[-1]["error"]
        assert error["code"] == "GENERATION_FAILED"
        assert error["message"] == "the audio is too long for one message; use mode streaming"
        await until(lambda: len(speaker.cancelled) == 1)


@pytest.mark.trio
async def test_ten_run_and_fifty_wait_and_no_more(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, speaker, path), connected(on, path) as client:
        speaker.lingers = trio.Event()
        for number in range(61):
            await client.ask(request_id=f"r-{number}")
        error = (await client.until("error"))[-1]
        assert (error["request_id"], error["error"]["code"]) == ("r-60", "RATE_LIMITED")
        await until(lambda: len(speaker.assigns) == 10)
        await client.ask(request_id="r-0")
        error = (await client.until("error"))[-1]
        assert error["error"]["message"] == "Validation failed: request_id: is that of a request that runs"
        speaker.lingers.set()
        done: set[str] = set()
        while len(done) < 60:
            done.add((await client.until("complete"))[-1]["request_id"])
        await client.ask(request_id="r-0")
        await client.until("complete")


@pytest.mark.trio
async def test_what_a_connection_has_asked_for_ends_with_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, speaker, path):
        speaker.lingers = trio.Event()
        async with connected(on, path) as client:
            await client.ask()
            await until(lambda: len(speaker.assigns) == 1)
        await until(lambda: len(speaker.cancelled) == 1)
        await on.daemon.at_rest()


@pytest.mark.trio
async def test_only_with_a_token_and_only_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts_server, "MAX_CONNECTIONS", 1)
    async with serving(tmp_path) as (on, _, path):
        url = on.daemon.urls[0]
        assert (await denial(url, "/tts"))[0] == 401
        assert (await denial(url, "/tts?token=wrong"))[0] == 401
        async with connected(on, path):
            status, body = await denial(url, path)
            assert (status, json.loads(body)["error"]["message"]) == (503, "1 are connected; try again later")
            assert on.daemon.relay.stats.talk.websockets == {"tts_server": 1}
        await until(lambda: on.daemon.relay.stats.talk.websockets == {"tts_server": 0})
        async with socket_to(url, "/tts", path.partition("=")[2]) as socket:
            await Client(socket).send({"type": "ping"})
            assert (await Client(socket).answer())["type"] == "pong"


@pytest.mark.trio
async def test_the_path_is_there_only_where_the_settings_say_so(tmp_path: Path) -> None:
    async with serving(tmp_path, talk={"tts_server": False}) as (on, _, path):
        assert (await denial(on.daemon.urls[0], path))[0] == 404


@pytest.mark.trio
async def test_who_asks_for_all_that_he_may_keeps_nobody_else_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tts_server, "MAX_CONNECTIONS", 1)
    async with serving(tmp_path) as (on, speaker, path), connected(on, path) as client:
        speaker.lingers = trio.Event()
        for number in range(60):
            await client.ask(request_id=f"r-{number}")
        await until(lambda: len(speaker.assigns) == 10)
        async with connected(on, f"/tts?token={make_token(on.daemon, 'bob')}") as other:
            await other.ask()
            await until(lambda: [each.principal for each in speaker.assigns[10:]] == ["bob"])
            speaker.lingers.set()
            await other.until("complete")
