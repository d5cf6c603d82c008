"""Calls of the GPU server's clients: offers, candidates, and what is played."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.relayd.http.sample_handlers import make_token
from tests.support.calling import CALLS, OFFER, Gateway, gateway
from tests.support.gpu_client import GOOD, GpuClient, gpu_client, pcm_of
from tests.support.relay import kept_logs, until
from tests.support.talking import Stage, Writer, speech_of, stage

ASKED = {"type": "webrtc_offer", "sdp": OFFER, "user_id": 6, "avatar_id": "avatar_tutor_13"}
CANDIDATE = {"candidate": "candidate:1 1 udp 1 127.0.0.1 9 typ host", "sdpMLineIndex": 0, "sdpMid": "0"}
ICE = {"type": "webrtc_ice_candidate", "candidate": CANDIDATE, "user_id": 6}


@asynccontextmanager
async def serving(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Stage, Writer, Gateway]]:
    """A daemon with a language model, a voice and a gateway, on the main port."""
    talk = {"calls": "calls", "avatar": "avatar_tutor_13"} | options.pop("talk", {})
    async with stage(tmp_path, listen="127.0.0.1:0", talk=talk, spaces=CALLS, **options) as on:
        writer, _ = await on.writer(), await on.speaker()
        yield on, writer, await gateway(on)


def heard(calls: Gateway) -> bytes:
    """What was played on the only call."""
    (played,) = calls.heard.values()
    return bytes(played)


@pytest.mark.trio
async def test_an_offer_is_answered_and_a_text_is_played_as_well_as_sent(tmp_path: Path) -> None:
    with kept_logs() as logs:
        async with serving(tmp_path) as (on, _, calls), gpu_client(on) as client:
            answer = await client.ask(ASKED)
            assert list(answer) == ["type", "sdp", "timestamp"]
            assert (answer["type"], answer["sdp"]) == ("webrtc_answer", f"answer 0 to {OFFER}")
            await client.send(ICE)
            reply = await client.ask(GOOD)
            assert pcm_of(reply) == speech_of("You said: Hello.")
            await until(lambda: heard(calls) == speech_of("You said: Hello."))
            await client.ask({"type": "text", "content": "Only sent", "engine_session_id": "uuid-session-1"})
            assert heard(calls) == speech_of("You said: Hello.")
            assert calls.commands == [{"candidate": CANDIDATE}]
    events = [line["event"] for line in logs if line["event"].startswith(("Received", "WebRTC"))]
    assert events == [
        "Received WebRTC offer from session user_6,",
        "WebRTC answer sent to user 6 with idle frames",
        "Received ICE candidate from session user_6,",
        "WebRTC streaming response sent",
    ]


@pytest.mark.trio
async def test_five_sessions_share_a_connection_and_a_call(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, writer, calls), gpu_client(on) as client:
        await client.ask(ASKED)
        texts = {f"text {number}": f"uuid-session-{number % 5}" for number in range(10)}
        for text, session in texts.items():
            await client.send(GOOD | {"content": text, "engine_session_id": session})
        answers = [await client.answer() for _ in texts]
        assert {answer["content"] for answer in answers} == {f"You said: {text}." for text in texts}
        samples = sum(len(speech_of(f"You said: {text}.")) for text in texts)
        await until(lambda: len(heard(calls)) == samples)
        assert sorted(len(prompt) for prompt in writer.prompts) == [1] * 5 + [3] * 5
        assert len(calls.heard) == 1


@pytest.mark.trio
@pytest.mark.parametrize("sdp", ["v=0...", "", "candidate:...", "x" * 60_001])
async def test_a_bad_offer_is_an_error_and_nothing_else_is_lost(tmp_path: Path, sdp: str) -> None:
    async with serving(tmp_path) as (on, _, calls), gpu_client(on) as client:
        assert await client.error(ASKED | {"sdp": sdp})
        for candidate in ("candidate:...", {"candidate": "candidate:..."}, {}, None, 7, {"candidate": "x" * 5_000}):
            await client.send(ICE | {"candidate": candidate})
        assert (await client.ask(GOOD))["type"] == "text"
        assert (await client.ask(ASKED))["type"] == "webrtc_answer"
        assert len(calls.peers) == 1


@pytest.mark.trio
async def test_what_was_heard_of_an_interrupted_reply_is_what_was_played(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, writer, calls), gpu_client(on) as client:
        await client.ask(ASKED)
        calls.stops_at = 95
        await client.ask(GOOD)
        await until(lambda: len(heard(calls)) == 190)
        calls.stops_at = None
        stop = {"type": "interrupt", "engine_session_id": "uuid-session-1"}
        assert (await client.ask(stop))["interrupted"] is True
        assert (await client.ask(stop))["interrupted"] is False
        await client.ask(GOOD | {"content": "And?"})
        assert writer.prompts[-1][1] == {"role": "assistant", "content": "You said:"}
        expected = speech_of("You said: Hello.")[:190] + speech_of("You said: And?.")
        await until(lambda: heard(calls) == expected)


@pytest.mark.trio
async def test_a_call_outlives_its_connection_for_a_while_and_is_taken_up_again(tmp_path: Path) -> None:
    async with serving(tmp_path, limits={"resume_window_s": 1.0}) as (on, _, calls):
        token = make_token(on.daemon)
        async with gpu_client(on, token=token) as client:
            await client.ask(ASKED)
            (peer,) = calls.peers
        async with gpu_client(on, token=token) as client:
            await until(lambda: on.daemon.relay.requests[peer].abandoned_at is None)
            await client.ask(GOOD)
            await until(lambda: heard(calls) == speech_of("You said: Hello."))
        with trio.fail_after(10):
            await until(lambda: not calls.peers)
        assert calls.cancelled == [peer]


@pytest.mark.trio
async def test_a_new_offer_replaces_the_call_of_its_user_and_of_nobody_else(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _, calls):
        token = make_token(on.daemon)
        async with gpu_client(on, token=token) as first, gpu_client(on, "user_7", token=token) as other:
            await first.ask(ASKED)
            (peer,) = calls.peers
            await other.ask(ASKED | {"user_id": 7})
            async with gpu_client(on, token=token) as second:
                await second.ask(ASKED)
                await until(lambda: len(calls.peers) == 2)
                assert calls.cancelled == [peer]
                await first.ask(GOOD)
                *_, third = calls.peers
                await until(lambda: bytes(calls.heard[third]) == speech_of("You said: Hello."))


@pytest.mark.trio
async def test_a_session_may_call_as_well(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _, calls), gpu_client(on, "session_abc123", path="/ws") as client:
        assert (await client.ask(ASKED))["type"] == "webrtc_answer"
        told = GOOD | {"engine_session_id": "session_abc123"}
        await ask_and_play(client, told, calls)


async def ask_and_play(client: GpuClient, told: dict[str, Any], calls: Gateway) -> None:
    assert (await client.ask(json.dumps(told)))["type"] == "text"
    await until(lambda: heard(calls) == speech_of("You said: Hello."))
