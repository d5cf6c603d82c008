"""OpenAI's speech API, with a worker whose every move the test makes."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h11
import openai
import pytest
import trio

from protocol import open_relay
from protocol.audio.encoder import CODINGS, AudioExtraMissing
from protocol.wire.frames import Audio, Completed, Failed, Started
from protocol.wire.messages import Assign, Cancel, Input
from protocol.wire.structs import AudioFormat, InputRule
from relayd.core.workers import Workers
from relayd.http.audio.encoded_results import MAX_SENDING_BYTES
from tests.support.audio_compare import decoded, energy_likeness, of_pcm, spectral_likeness, speech_like
from tests.support.fake_worker import FORMAT, SCHEMA, FakeWorker, fake_worker, identity
from tests.support.relay import Daemon, a_submit, daemon, kept_logs, peer, until
from tests.support.timed_http_client import Answer, asking, open_stream

TCP: dict[str, Any] = {"listen": "127.0.0.1:0"}
STRICT: dict[str, Any] = {"openai": {"strict": True}}
VOICES = SCHEMA | {"properties": SCHEMA["properties"] | {"voice": {"enum": ["anna", "bert"]}}}
PCM = speech_like(FORMAT.sample_rate, 2.0)
SECOND = FORMAT.sample_rate * 2
#: What a WAV's header and any codec's first frames are below.
FIRST_BYTES = 200


def asking_to_speak(url: str, token: str | None = None, **fields: Any) -> AbstractAsyncContextManager[Answer]:
    body = json.dumps({"model": "tts", "input": "hello"} | fields).encode()
    return asking(url, "POST", "/v1/audio/speech", token=token, body=body)


async def error_of(url: str, token: str | None = None, **fields: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    async with asking_to_speak(url, token, **fields) as answer:
        told = await answer.json()
        assert answer.headers["content-type"] == "application/json"
        assert told["error"].keys() == {"message", "type", "param", "code"}
        return answer.status, told["error"], answer.headers


def pieces(pcm: bytes, seconds: float = 0.1) -> list[bytes]:
    size = round(SECOND * seconds)
    return [pcm[begin : begin + size] for begin in range(0, len(pcm), size)]


@asynccontextmanager
async def speaking(state_dir: Path, **overrides: Any) -> AsyncIterator[tuple[Daemon, FakeWorker]]:
    """A daemon with a worker that has two voices."""
    async with daemon(state_dir, **overrides) as relay, fake_worker(relay.url, params=VOICES) as worker:
        yield relay, worker


async def speak_once(worker: FakeWorker, pcm: bytes = PCM) -> Assign:
    assign = await worker.assigned()
    worker.speak(assign, pieces(pcm))
    return assign


# -- audio --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("coding", CODINGS)
async def test_what_the_worker_spoke_is_heard_in_every_format(tmp_path: Path, coding: str) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        nursery.start_soon(speak_once, worker)
        async with asking_to_speak(relay.url, response_format=coding) as answer:
            body = await answer.body()
            assert answer.status == 200
            assert answer.headers["content-type"] == CODINGS[coding].content_type
            assert answer.headers["x-accel-buffering"] == "no", "or nginx holds the audio back"
            assert answer.headers["x-request-id"] in relay.relay.requests
        await relay.at_rest()
    heard, spoken = decoded(body, coding), of_pcm(PCM)
    assert heard.duration_s == pytest.approx(2.0, abs=0.15)
    assert energy_likeness(spoken, heard) > 0.95
    assert spectral_likeness(spoken, heard) > 0.95


@pytest.mark.trio
@pytest.mark.parametrize("coding", CODINGS)
async def test_audio_is_heard_before_the_worker_has_made_the_rest(tmp_path: Path, coding: str) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        answered = trio.Event()

        async def hear() -> None:
            async with asking_to_speak(relay.url, response_format=coding) as answer:
                body = b""
                while len(body) < FIRST_BYTES:
                    body += await answer.piece() or b"the end" * 100
                answered.set()
                body += await answer.body()
            assert decoded(body, coding).duration_s == pytest.approx(2.0, abs=0.15)

        nursery.start_soon(hear)
        assign = await worker.assigned()
        worker.speak(assign, pieces(PCM)[:5], end=False)
        with trio.fail_after(10):
            await answered.wait()  # and not a frame more was sent
        for number, pcm in enumerate(pieces(PCM)[5:], 6):
            worker.send(Audio(**identity(assign, number), pcm=pcm))
        worker.send(Completed(**identity(assign, 21), result={}))


@pytest.mark.trio
async def test_speed_is_the_relays_own_and_no_param_of_the_worker(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        assigns: list[Assign] = []

        async def serve() -> None:
            assigns.append(await speak_once(worker))

        nursery.start_soon(serve)
        async with asking_to_speak(relay.url, response_format="pcm", speed=2) as answer:
            heard = of_pcm(await answer.body())
    assert heard.duration_s == pytest.approx(1.0, abs=0.01)
    assert spectral_likeness(of_pcm(PCM), heard) > 0.9
    assert assigns[0].params == {"text": "hello"}


@pytest.mark.trio
async def test_stereo_of_48_khz_is_pcm_of_24_khz_mono_to_the_client(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        stereo = AudioFormat(sample_rate=48_000, channels=2)
        pcm = speech_like(48_000, 1.0, 2)

        async def serve() -> None:
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=stereo))
            worker.send(Audio(**identity(assign, 1), pcm=pcm))
            worker.send(Completed(**identity(assign, 2), result={}))

        nursery.start_soon(serve)
        async with asking_to_speak(relay.url, response_format="pcm") as answer:
            heard = of_pcm(await answer.body())
    assert heard.duration_s == pytest.approx(1.0, abs=0.001)
    assert spectral_likeness(of_pcm(pcm, stereo), heard) > 0.99


@pytest.mark.trio
async def test_without_streaming_it_comes_whole_and_says_its_length(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        nursery.start_soon(speak_once, worker)
        async with asking_to_speak(relay.url, response_format="wav", stream=False) as answer:
            body = await answer.body()
            assert answer.headers["content-length"] == str(len(body))
    assert int.from_bytes(body[40:44], "little") == len(PCM)
    assert body[44:] == PCM


@pytest.mark.trio
async def test_what_is_too_large_to_be_sent_whole_is_refused(tmp_path: Path) -> None:
    async with speaking(tmp_path, limits={"max_result_bytes": 100_000}) as (relay, worker):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak_once, worker, PCM[:60_000])
            told = await error_of(relay.url, response_format="wav", stream=False, speed=0.25)
        assert told[0] == 500
        assert told[1]["code"] == "result_too_large"


@pytest.mark.trio
async def test_whole_speeches_of_a_principal_that_are_too_much_together_are_refused(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (relay, worker):
        encoded, other = relay.http_context.encoded, object()
        encoded.collect("root", other, MAX_SENDING_BYTES)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak_once, worker)
            told = await error_of(relay.url, response_format="wav", stream=False)
        assert (told[0], told[1]["code"]) == (429, "rate_limited")
        encoded.collect("root", other, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak_once, worker)
            async with asking_to_speak(relay.url, response_format="wav", stream=False) as answer:
                assert answer.status == 200
        await until(lambda: encoded.idle)


@pytest.mark.trio
async def test_events_carry_the_same_bytes_and_end_with_the_usage(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        nursery.start_soon(speak_once, worker)
        async with asking_to_speak(relay.url, response_format="wav", stream_format="sse") as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            assert answer.headers["x-accel-buffering"] == "no"
            body = await answer.body()
    lines = body.decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    *deltas, done = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert len(deltas) > 2
    assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas)[44:] == PCM
    usage = {"input_tokens": 5, "output_tokens": 40, "total_tokens": 45}
    assert done == {"type": "speech.audio.done", "usage": usage}


@pytest.mark.trio
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("fields", [{}, {"stream": False}, {"stream_format": "sse"}])
async def test_an_engine_that_makes_no_audio_at_all_is_a_failure(
    tmp_path: Path, coding: str, fields: dict[str, Any]
) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        nursery.start_soon(speak_once, worker, b"")
        status, told, headers = await error_of(relay.url, response_format=coding, **fields)
        assert (status, told["code"], headers["x-should-retry"]) == (502, "engine_failed", "false")
        assert "made no audio" in told["message"]


# -- fields beyond OpenAI's -----------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_the_space_declares_is_sent_on_and_checked(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (relay, worker):
        assign, _ = await spoken(relay, worker, rate=7, unheard_of=[1])
        assert assign.params == {"text": "hello", "rate": 7}
        for rate in ("x", 1.5, 10**29):
            status, told, _ = await error_of(relay.url, rate=rate)
            assert (status, told["code"]) == (422, "invalid_params")
            assert told["param"] == "rate"
        status, told, _ = await error_of(relay.url, ref_audio="UklGRg==")
        assert (status, told["param"]) == (422, "ref_audio")


@pytest.mark.trio
async def test_a_recording_in_the_body_reaches_the_worker_and_its_faults_the_client(tmp_path: Path) -> None:
    recording = bytes(300_000)
    packed = base64.b64encode(recording).decode()
    inputs = {"reference_wav": InputRule(max_bytes=400_000)}
    async with daemon(tmp_path) as relay, fake_worker(relay.url, params=VOICES, inputs=inputs) as worker:
        assign, _ = await spoken(relay, worker, ref_audio=f"data:audio/wav;base64,{packed}")
        assert assign.inputs["reference_wav"].media_type == "audio/wav"
        assert (await worker.peer.next(Input)).request_id == assign.request_id

        async def refuse() -> None:
            refused = await worker.assigned()
            details = {"reference_wav": "is no audio"}
            fault: dict[str, Any] = {"code": "invalid_params", "message": "is no audio", "retryable": False}
            worker.send(Failed(**identity(refused, 0), **fault, details=details))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            status, told, _ = await error_of(relay.url, ref_audio=packed)
        assert (status, told["param"]) == (422, "ref_audio")
        status, told, _ = await error_of(relay.url, ref_audio=packed * 2)
        assert (status, told["code"]) == (413, "input_too_large")
        await until(lambda: relay.http_context.upload_bytes == 0)


# -- who the clients are ------------------------------------------------------------------------------------------

#: What each sends by default; tests/e2e/test_openai_programs.py runs litellm, LiveKit and pipecat themselves.
BODIES: dict[str, dict[str, Any]] = {
    "Open WebUI": {"input": "Hello there.", "voice": "alloy", "model": "tts-1"},
    "SillyTavern": {
        "input": "Hello there.",
        "response_format": "mp3",
        "voice": "nova",
        "speed": 1,
        "model": "tts-1",
    },
    "litellm": {"model": "tts-1", "input": "Hello there.", "voice": "alloy"},
    "LiveKit": {
        "model": "gpt-4o-mini-tts",
        "input": "Hello there.",
        "voice": "ash",
        "response_format": "mp3",
        "speed": 1.0,
        "stream_format": "sse",
    },
    "pipecat": {"model": "gpt-4o-mini-tts", "input": "Hello there.", "voice": "alloy", "response_format": "pcm"},
}


@pytest.mark.trio
@pytest.mark.parametrize("program", BODIES)
async def test_default_bodies_of_known_programs_are_spoken(tmp_path: Path, program: str) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        told: list[Assign] = []

        async def serve() -> None:
            told.append(await speak_once(worker))

        nursery.start_soon(serve)
        asked = BODIES[program]
        headers = [("Content-Type", "application/json")]
        async with asking(
            relay.url, "POST", "/v1/audio/speech", headers=headers, body=json.dumps(asked).encode()
        ) as answer:
            assert answer.status == 200
            heard = await answer.body()
    if asked.get("stream_format") == "sse":
        events = [json.loads(line.removeprefix("data: ")) for line in heard.decode().split("\n\n")[:-1]]
        heard = b"".join(base64.b64decode(event["audio"]) for event in events if "audio" in event)
    if asked.get("response_format") == "pcm":
        assert heard == PCM
    else:
        assert decoded(heard, "mp3").duration_s == pytest.approx(2.0, abs=0.15)
    assert told[0].params == {"text": "Hello there."}


async def token_of(relay: Daemon, *spaces: str) -> str:
    """A client's new token."""
    async with open_relay(relay.url, token="", role="operator") as operator:
        done = await operator.steer("create_token", "-".join(("client", *spaces)), role="client", spaces=list(spaces))
    return str(done["token"])


@pytest.mark.trio
async def test_the_openai_package_speaks_lists_and_raises_its_own_errors(tmp_path: Path) -> None:
    async with speaking(tmp_path, **TCP, **STRICT) as (relay, worker), trio.open_nursery() as nursery:
        base_url = relay.urls[0].replace("ws:", "http:") + "/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key=await token_of(relay), max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["check", "tts"]
            assert (await client.models.retrieve("tts")).owned_by == "relayd"
            speak = partial(client.audio.speech.create, model="tts", voice="anna", input="hello")
            nursery.start_soon(speak_once, worker)
            whole = await speak()
            assert decoded(await whole.aread(), "mp3").duration_s == pytest.approx(2.0, abs=0.15)
            nursery.start_soon(speak_once, worker)
            create = client.audio.speech.with_streaming_response.create
            async with create(model="tts", voice="bert", input="hello", response_format="pcm") as streamed:
                assert b"".join([piece async for piece in streamed.iter_bytes()]) == PCM
            with pytest.raises(openai.NotFoundError, match="space 'nobody' does not exist"):
                await speak(model="nobody")
            with pytest.raises(openai.UnprocessableEntityError, match="it has default, anna, bert") as fault:
                await speak(voice="alloy")
            assert (fault.value.code, fault.value.param) == ("invalid_params", "voice")
        async with openai.AsyncOpenAI(base_url=base_url, api_key="rly_c_none", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()


# -- names that clients have built in ---------------------------------------------------------------------------------

ALLOY = {"model": "tts-1", "voice": "alloy", "instructions": "Speak softly."}


async def spoken(relay: Daemon, worker: FakeWorker, token: str | None = None, **fields: Any) -> tuple[Assign, Any]:
    """What the worker is asked for, and the head that the client gets."""
    told: list[Assign] = []

    async def serve() -> None:
        told.append(await speak_once(worker))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        url = relay.url if token is None else relay.urls[0]
        async with asking_to_speak(url, token, **({"response_format": "pcm"} | fields)) as answer:
            assert answer.status == 200, await answer.body()
            assert await answer.body() == PCM
    return told[0], answer.headers


@pytest.mark.trio
async def test_one_speaking_space_is_enough_for_openais_names_and_says_what_it_did(tmp_path: Path) -> None:
    with kept_logs() as logs:
        async with speaking(tmp_path) as (relay, worker):
            for _ in range(2):
                assign, head = await spoken(relay, worker, **ALLOY)
                assert (assign.space, assign.params) == ("tts", {"text": "hello"})
                assert (head["x-relay-space"], head["x-relay-voice"]) == ("tts", "default")
                assert head["x-relay-ignored"] == "instructions"
            assign, head = await spoken(relay, worker, model="kokoro", voice="bert")
            assert (assign.params["voice"], head["x-relay-voice"]) == ("bert", "bert")
            assert "x-relay-ignored" not in head
            async with asking(relay.url, "GET", "/v1/models/tts-1") as answer:
                assert (await answer.json())["id"] == "tts-1"
            async with asking(relay.url, "GET", "/v1/audio/voices?model=openai/tts-1-hd") as answer:
                assert [voice["id"] for voice in (await answer.json())["voices"]] == ["default", "anna", "bert"]
    assert [(log["asked"], log["voice"]) for log in logs if log["event"].startswith("voice is spoken")] == [
        ("alloy", "default")
    ]


@pytest.mark.trio
async def test_with_two_speaking_spaces_a_name_that_is_none_is_refused_with_those_there_are(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (relay, _), fake_worker(relay.url, spaces=("check",), name="two", params=VOICES):
        status, told, _ = await error_of(relay.url, **ALLOY)
        assert (status, told["code"]) == (404, "space_not_found")
        assert "models are check, tts" in told["message"]
        status, told, _ = await error_of(relay.url, voice="alloy")
        assert (status, told["param"]) == (422, "voice")


@pytest.mark.trio
async def test_a_token_for_one_space_of_several_has_openais_names_and_nobody_elses(tmp_path: Path) -> None:
    async with (
        speaking(tmp_path, **TCP) as (relay, worker),
        fake_worker(relay.url, spaces=("check",), name="two", params=VOICES),
    ):
        token = await token_of(relay, "tts")
        assign, _ = await spoken(relay, worker, token, **ALLOY)
        assert assign.space == "tts"
        for model in ("check", "nobody"):
            status, told, _ = await error_of(relay.urls[0], token, model=model)
            assert (status, told["code"]) == (403, "forbidden")


@pytest.mark.trio
async def test_the_settings_say_what_names_stand_for(tmp_path: Path) -> None:
    names = {
        "models": {"tts-1": "tts", "*": "check"},
        "voices": {"alloy": "anna", "bert": "anna", "tts": {"alloy": "bert"}, "gone": "eve", "*": "default"},
        "unknown_instructions": "refuse",
    }
    async with (
        speaking(tmp_path, openai=names) as (relay, worker),
        fake_worker(relay.url, spaces=("check",), name="two", params=VOICES) as other,
    ):
        for asked, speaker, fields in (
            ("bert", worker, {"model": "tts-1", "voice": "alloy"}),
            ("anna", other, {"model": "kokoro", "voice": "alloy"}),
            ("anna", worker, {"voice": "bert"}),
            ("anna", worker, {"voice": "anna"}),
            (None, worker, {"voice": "nova"}),
        ):
            assign, head = await spoken(relay, speaker, **fields)
            assert (assign.params.get("voice"), head["x-relay-voice"]) == (asked, asked or "default")
        _, told, _ = await error_of(relay.url, voice="gone")
        assert "'gone' stands for 'eve' ([openai] voices of relayd.toml)" in told["message"]
        _, told, _ = await error_of(relay.url, instructions="softly")
        assert told["param"] == "instructions"


@pytest.mark.trio
async def test_a_model_that_stands_for_a_space_that_is_not_there_says_so(tmp_path: Path) -> None:
    async with speaking(tmp_path, openai={"models": {"tts-1": "gone"}}) as (relay, _):
        status, told, _ = await error_of(relay.url, model="tts-1")
        assert status == 404
        assert "'tts-1' stands for it ([openai] models" in told["message"]


@pytest.mark.trio
async def test_a_model_that_stands_for_a_space_of_others_does_not_name_it(tmp_path: Path) -> None:
    async with speaking(tmp_path, openai={"models": {"*": "tts"}}) as (relay, _):
        token = relay.tokens.create(role="client", name="bob", now=0.0, spaces=["check"]).text
        status, told, _ = await error_of(relay.url, token=token, model="tts-1")
        assert (status, told["message"]) == (403, "principal 'bob' may not use model 'tts-1'; ask for a token that may")


@pytest.mark.trio
async def test_a_voice_in_any_script_fits_the_head(tmp_path: Path) -> None:
    voices = SCHEMA | {"properties": SCHEMA["properties"] | {"voice": {"enum": ["小美"]}}}
    async with daemon(tmp_path) as relay, fake_worker(relay.url, params=voices) as worker:
        _, head = await spoken(relay, worker, voice="小美")
        assert head["x-relay-voice"] == "%E5%B0%8F%E7%BE%8E"


# -- errors before the first byte -----------------------------------------------------------------------------------


@pytest.mark.trio
async def test_who_may_not_is_told_so_before_anything_is_spoken(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP) as relay:
        url = relay.urls[0]
        status, told, headers = await error_of(url)
        assert (status, told["type"], headers["www-authenticate"]) == (401, "authentication_error", "Bearer")
        token = await token_of(relay, "check")
        status, told, _ = await error_of(url, token)
        assert (status, told["code"], told["type"]) == (403, "forbidden", "permission_error")
        missing = (await error_of(url, token, model="nobody"))[:2]
        assert missing == (status, told | {"message": told["message"].replace("'tts'", "'nobody'")})
        token = await token_of(relay, "nobody")
        status, told, _ = await error_of(url, token, model="nobody")
        assert (status, told["code"], told["type"]) == (404, "space_not_found", "invalid_request_error")
        assert told["message"].startswith("space 'nobody' does not exist; ask the relay's operator")
        assert not relay.relay.requests


@pytest.mark.trio
async def test_a_full_queue_is_429_with_the_time_to_wait(tmp_path: Path) -> None:
    async with speaking(tmp_path, spaces={"tts": {"max_queued": 1}}) as (relay, worker), trio.open_nursery() as nursery:

        async def wait() -> None:
            async with asking_to_speak(relay.url):
                raise AssertionError("the worker says nothing")

        nursery.start_soon(wait)
        await worker.assigned()
        nursery.start_soon(wait)
        await until(lambda: bool(relay.relay.scheduler.state.spaces["tts"].queue))
        status, told, headers = await error_of(relay.url)
        assert (status, told["code"], told["type"]) == (429, "queue_full", "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_who_would_wait_too_long_is_told_when_to_come_back(tmp_path: Path) -> None:
    async with speaking(tmp_path, http={"max_wait_s": 60}) as (relay, worker), trio.open_nursery() as nursery:
        relay.relay.scheduler.state.spaces["tts"].recent_runs_s.append(90.0)

        async def hear() -> None:
            async with asking_to_speak(relay.url, response_format="pcm") as answer:
                assert await answer.body() == PCM

        nursery.start_soon(hear)
        assign = await worker.assigned()
        status, told, headers = await error_of(relay.url)
        assert (status, told["code"]) == (429, "queue_full")
        assert "http.max_wait_s" in told["message"]
        assert 25 <= int(headers["retry-after"]) <= 30
        worker.speak(assign, pieces(PCM))
    await relay.at_rest()


@pytest.mark.trio
async def test_a_space_that_refuses_while_empty_is_503(tmp_path: Path) -> None:
    async with daemon(tmp_path, spaces={"tts": {"when_empty": "refuse"}}) as relay:
        status, told, headers = await error_of(relay.url)
        assert (status, told["code"], told["type"]) == (503, "no_worker", "server_error")
        assert "retry-after" in headers


@pytest.mark.trio
@pytest.mark.parametrize("waits", [{"spaces": {"tts": {"queue_timeout_s": 0.05}}}, {"http": {"max_wait_s": 0.05}}])
async def test_a_deadline_in_the_queue_is_504_and_not_sent_again(tmp_path: Path, waits: dict[str, Any]) -> None:
    async with speaking(tmp_path, **waits) as (relay, worker), trio.open_nursery() as nursery:

        async def hear() -> None:
            async with asking_to_speak(relay.url, response_format="pcm") as answer:
                assert await answer.body() == PCM

        nursery.start_soon(hear)
        assign = await worker.assigned()
        status, told, headers = await error_of(relay.url)
        assert (status, told["code"], headers["x-should-retry"]) == (504, "queue_timeout", "false")
        assert "no slot of space 'tts' was free" in told["message"]
        worker.speak(assign, pieces(PCM))


@pytest.mark.trio
async def test_speech_that_is_kept_is_sent_without_a_worker(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"http": {"no_worker_wait_s": 0.02}, "spaces": {"tts": {"cache_s": 600.0}}}
    heard: list[bytes] = []
    async with daemon(tmp_path, **settings) as relay:
        async with (
            fake_worker(relay.url, params=VOICES, reproducible=True) as worker,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(speak_once, worker)
            async with asking_to_speak(relay.url, response_format="pcm") as answer:
                heard.append(await answer.body())
        await until(lambda: not relay.relay.workers)
        async with asking_to_speak(relay.url, response_format="pcm") as answer:
            heard.append(await answer.body())
        assert heard == [PCM, PCM]
        assert (await error_of(relay.url, input="something else"))[0] == 503


@pytest.mark.trio
async def test_without_a_worker_it_is_503_within_the_wait_and_nothing_is_queued(tmp_path: Path) -> None:
    async with daemon(tmp_path, http={"no_worker_wait_s": 0.05}) as relay:
        status, told, headers = await error_of(relay.url)
        assert (status, told["code"], told["type"]) == (503, "no_worker", "server_error")
        assert "no worker of space 'tts' takes requests now" in told["message"]
        assert "retry-after" in headers
        assert "x-should-retry" not in headers
        assert not relay.relay.requests
        async with fake_worker(relay.url, params=VOICES) as worker:
            await spoken(relay, worker)
            relay.relay.workers.drain(next(iter(relay.relay.workers)))
            assert (await error_of(relay.url))[0] == 503


@pytest.mark.trio
async def test_a_worker_that_comes_within_the_wait_is_asked_in_its_own_words(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, trio.open_nursery() as nursery:

        async def hear() -> None:
            async with asking_to_speak(relay.url, voice="alloy", response_format="pcm") as answer:
                assert await answer.body() == PCM

        nursery.start_soon(hear)
        await until(lambda: bool(relay.http_context.exchanges))
        async with fake_worker(relay.url, params=VOICES) as worker:
            assert (await speak_once(worker)).params == {"text": "hello"}
            await relay.at_rest()


@pytest.mark.trio
async def test_who_is_queued_when_the_last_worker_leaves_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.http.openai.waiting.MIN_LOOK_S", 0.02)
    async with daemon(tmp_path, http={"no_worker_wait_s": 0.02}) as relay, trio.open_nursery() as nursery:
        heard = trio.Event()

        async def hear() -> None:
            status, told, _ = await error_of(relay.url)
            assert (status, told["code"]) == (503, "no_worker")
            heard.set()

        async def hold() -> None:
            async with asking_to_speak(relay.url):
                pass

        async with fake_worker(relay.url, params=VOICES) as worker:
            nursery.start_soon(hold)
            await worker.assigned()
            nursery.start_soon(hear)
            await until(lambda: bool(relay.relay.scheduler.state.spaces["tts"].queue))
        await heard.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_who_is_queued_while_the_last_worker_is_away_for_a_moment_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.http.openai.waiting.MIN_LOOK_S", 0.02)
    looks, statuses = list[str](), list[int]()

    def serving(_workers: Workers, space: str) -> bool:
        looks.append(space)
        return len(looks) > 1

    async with (
        speaking(tmp_path, http={"no_worker_wait_s": 0.02}) as (relay, worker),
        trio.open_nursery() as nursery,
    ):

        async def hear() -> None:
            async with asking_to_speak(relay.url) as answer:
                await answer.body()
                statuses.append(answer.status)

        nursery.start_soon(hear)
        first = await worker.assigned()
        nursery.start_soon(hear)
        await until(lambda: bool(relay.relay.scheduler.state.spaces["tts"].queue))
        monkeypatch.setattr(Workers, "serving", serving)
        await until(lambda: len(looks) > 2)
        worker.speak(first, pieces(PCM))
        await speak_once(worker)
    assert statuses == [200, 200]


@pytest.mark.trio
async def test_a_deadline_in_an_empty_queue_says_that_nobody_is_connected(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submit = a_submit(queue_timeout_s=0.05)
        client.send(submit)
        (failed,) = await client.frames(submit)
        assert failed.code == "queue_timeout"
        assert "no worker is connected to space 'tts'" in failed.message


@pytest.mark.trio
async def test_a_body_that_stops_half_way_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.http.body_parser.BODY_STALL_S", 0.05)
    async with daemon(tmp_path) as relay, open_stream(relay.url) as stream:
        await stream.send_all(b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n{")
        with trio.fail_after(10):
            assert b" 408 " in await stream.receive_some()


@pytest.mark.trio
@pytest.mark.parametrize("whole", [True, False])
async def test_an_engine_that_fails_before_its_first_audio_is_a_status(tmp_path: Path, whole: bool) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:

        async def fail() -> None:
            assign = await worker.assigned()
            worker.speak(assign, pieces(PCM) if whole else [], end=False)
            seq = 21 if whole else 1
            worker.send(Failed(**identity(assign, seq), code="run_timeout", message="too slow", retryable=True))

        nursery.start_soon(fail)
        status, told, _ = await error_of(relay.url, stream=not whole)
        assert (status, told["code"], told["message"]) == (504, "run_timeout", "too slow")


@pytest.mark.trio
async def test_an_engine_that_makes_no_audio_is_refused_at_once(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, format=None):
        status, told, _ = await error_of(relay.url)
        assert (status, told["code"], told["param"]) == (422, "invalid_params", "model")
        assert "produces no audio" in told["message"]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "is required"),
        ({"input": "  "}, "input", "contains nothing to speak"),
        ({"input": "\ufffd"}, "input", "contains nothing to speak"),
        ({"input": "\ufeff\u200b... -"}, "input", "contains nothing to speak"),
        ({"input": 5}, "input", "must be a string"),
        ({"model": None}, "model", "is required"),
        ({"voice": ["anna"]}, "voice", "must be a string or"),
        ({"voice": "alloy"}, "voice", "it has default, anna, bert"),
        ({"voice": {"id": "alloy"}}, "voice", "it has default, anna, bert"),
        ({"instructions": "softly"}, "instructions", "does not accept instructions"),
        ({"response_format": "wma"}, "response_format", "must be one of mp3, opus, aac, flac, wav, pcm"),
        ({"speed": 0.2}, "speed", "0.25..4.0"),
        ({"speed": True}, "speed", "must be a number"),
        ({"stream_format": "ws"}, "stream_format", "must be one of audio, sse"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"input": "\ud800"}, "input", "lone surrogate"),
        ({"input": "x" * 70_000}, "input", "the limit is 65536"),
    ],
)
async def test_what_cannot_be_spoken_is_422_and_says_why(
    tmp_path: Path, fields: dict[str, Any], param: str, words: str
) -> None:
    async with speaking(tmp_path, **STRICT) as (relay, _):
        status, told, _ = await error_of(relay.url, **fields)
        assert (status, told["code"], told["param"]) == (422, "invalid_params", param)
        assert words in told["message"]
        assert not relay.relay.requests


@pytest.mark.trio
@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'"text"'])
async def test_what_is_no_json_object_is_400(tmp_path: Path, body: bytes) -> None:
    async with (
        daemon(tmp_path) as relay,
        asking(relay.url, "POST", "/v1/audio/speech", body=body) as answer,
    ):
        told = await answer.json()
        assert (answer.status, told["error"]["code"]) == (400, "invalid_json")


@pytest.mark.trio
async def test_a_body_without_end_is_413(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        for fields in ({"input": "x" * 9_000_000}, {"x": [0] * 200_000}):
            status, told, _ = await error_of(relay.url, **fields)
            assert (status, told["code"]) == (413, "input_too_large")


@pytest.mark.trio
async def test_without_the_audio_extra_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def missing(name: str, speed: float, source: AudioFormat) -> None:
        raise AudioExtraMissing(name)

    monkeypatch.setattr("relayd.http.openai.routes.check_coding", missing)
    async with speaking(tmp_path) as (relay, _):
        status, told, _ = await error_of(relay.url)
        assert (status, told["code"], told["param"]) == (422, "format_unavailable", "response_format")
        assert "pip install '.[audio]'" in told["message"]
        assert not relay.relay.requests


# -- ends in mid-stream -------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_failure_in_mid_stream_cuts_the_answer_short(tmp_path: Path) -> None:
    async with speaking(tmp_path, **TCP) as (relay, worker), trio.open_nursery() as nursery:

        async def fail() -> None:
            assign = await worker.assigned()
            worker.speak(assign, pieces(PCM)[:5], end=False)
            await heard.wait()
            worker.send(Failed(**identity(assign, 6), code="engine_failed", message="it broke", retryable=True))

        heard = trio.Event()
        nursery.start_soon(fail)
        token = await token_of(relay)
        async with asking_to_speak(relay.urls[0], token, response_format="wav") as answer:
            assert await answer.piece()
            heard.set()
            with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
                await answer.body()


@pytest.mark.trio
async def test_events_say_why_they_end(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:

        async def fail() -> None:
            assign = await worker.assigned()
            worker.speak(assign, pieces(PCM)[:5], end=False)
            worker.send(Failed(**identity(assign, 6), code="engine_failed", message="it broke", retryable=True))

        nursery.start_soon(fail)
        body = b""
        async with asking_to_speak(relay.url, stream_format="sse") as answer:
            while b'"error"' not in body:
                body += await answer.piece() or b""
            with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
                await answer.body()
    last = json.loads(body.decode().rstrip().rpartition("data: ")[2])
    assert last["type"] == "error"
    assert last["error"]["code"] == "engine_failed"
    assert last["error"]["message"].startswith("it broke")


@pytest.mark.trio
async def test_a_client_that_goes_away_cancels_its_speech(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        heard = trio.Event()

        async def hear() -> None:
            async with asking_to_speak(relay.url, response_format="wav") as answer:
                assert await answer.piece()
                heard.set()

        nursery.start_soon(hear)
        assign = await worker.assigned()
        worker.speak(assign, pieces(PCM)[:5], end=False)
        await heard.wait()
        cancel = await worker.peer.next(Cancel)
        assert cancel.request_id == assign.request_id
        assert "disconnected" in cancel.reason


# -- models and voices ----------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_models_and_voices_are_those_the_token_may_use(tmp_path: Path) -> None:
    spaces = {"tts": {"description": "speaks"}, "text": {}}
    async with (
        speaking(tmp_path, spaces=spaces, **TCP, **STRICT) as (relay, _),
        fake_worker(relay.url, spaces=("text",), name="other", format=None),
    ):

        async def get(path: str, token: str | None = None) -> Any:
            async with asking(relay.urls[0], "GET", path, token=token) as answer:
                return answer.status, await answer.json()

        everybody, few = await token_of(relay), await token_of(relay, "tts")
        status, told = await get("/v1/models", everybody)
        assert (status, told["object"], [row["id"] for row in told["data"]]) == (200, "list", ["check", "tts"])
        assert told["data"][1].keys() == {"id", "object", "created", "owned_by", "ready"}
        assert [row["ready"] for row in told["data"]] == [False, True]
        assert [row["id"] for row in (await get("/v1/models", few))[1]["data"]] == ["tts"]
        assert await get("/v1/audio/models", few) == (200, {"models": [{"id": "tts", "name": "speaks"}]})
        status, told = await get("/v1/audio/voices", few)
        assert told["voices"] == [{"id": name, "name": name, "models": ["tts"]} for name in ("default", "anna", "bert")]
        status, told = await get("/v1/audio/voices?model=check", everybody)
        assert [row["id"] for row in told["voices"]] == ["default"]
        assert (await get("/v1/audio/voices?model=check", few))[0] == 403
        assert (await get("/v1/models/check", few))[0] == 403
        for path in ("/v1/models/{}", "/v1/audio/voices?model={}"):
            status, told = await get(path.format("check"), few)
            missing = await get(path.format("nobody"), few)
            assert str(missing) == str((status, told)).replace("'check'", "'nobody'")
            assert (await get(path.format("nobody"), everybody))[0] == 404
        for path in ("/v1/models", "/v1/models/tts", "/v1/audio/models", "/v1/audio/voices"):
            assert (await get(path))[0] == 401


@pytest.mark.trio
async def test_public_lists_are_told_to_anybody_and_speech_is_not(tmp_path: Path) -> None:
    async with speaking(tmp_path, http={"lists": "public"}, **TCP) as (relay, _):
        url, few = relay.urls[0], await token_of(relay, "check")
        for path in ("/v1/models", "/v1/models/tts", "/v1/audio/models", "/v1/audio/voices?model=tts-1"):
            for headers in ([], [("Authorization", "Bearer")]):
                async with asking(url, "GET", path, headers=headers) as answer:
                    assert answer.status == 200, (path, headers)
            async with asking(url, "GET", path, token="rly_c_wrong") as answer:
                assert answer.status == 401
        async with asking(url, "GET", "/v1/models", token=few) as answer:
            assert [row["id"] for row in (await answer.json())["data"]] == ["check"]
        assert (await error_of(url))[0] == 401
        async with asking(url, "GET", "/v1/spaces") as answer:
            assert answer.status == 401
