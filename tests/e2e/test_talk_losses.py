"""A conversation through real processes, one of which is killed in the middle of a reply."""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.processes import Place, Proc, a_place, a_relay, a_worker
from tests.support.raw_http_client import visitor

PATIENCE_S = 120
CONFIG = """
[talk]
reply = "llm"
speech = "tts"
[spaces.llm]
[spaces.tts]
"""
MODEL = """
import time


def answer(messages):
    for word in f"It is. You said {messages[-1]['content']}. And that is all of it, I think, or so it seems.".split():
        time.sleep(0.1)
        yield word + " "
"""
REPLY = "It is. You said Hello. And that is all of it, I think, or so it seems. "
WORKERS = {
    "llm": ("--space", "llm", "--engine", "function", "-o", "call=model:answer"),
    "tts": ("--space", "tts", "--engine", "mock", "-o", "speed=0"),
}
SSE = {"accept": "text/event-stream"}


@asynccontextmanager
async def talking(folder: Path, worker_grace_s: float) -> AsyncIterator[tuple[Place, dict[str, Proc], AsyncExitStack]]:
    """A relay and its workers, by name."""
    (folder / "model.py").write_text(MODEL)
    place = a_place(folder, f"[limits]\nworker_grace_s = {worker_grace_s}\n{CONFIG}")
    async with AsyncExitStack() as stack:
        procs = {"relay": await stack.enter_async_context(a_relay(place))}
        for name in WORKERS:
            await begin(place, procs, name, stack)
        yield place, procs, stack


async def begin(place: Place, procs: dict[str, Proc], name: str, stack: AsyncExitStack) -> None:
    """Start one of them, perhaps again."""
    if name == "relay":
        procs[name] = await stack.enter_async_context(a_relay(place))
    else:
        worker = a_worker(place, procs["relay"], *WORKERS[name], PYTHONPATH=str(place.folder))
        procs[name] = await stack.enter_async_context(worker)


async def ask(url: str, method: str, path: str, **more: Any) -> Any:
    async with visitor(url) as http:
        return await http.ask(method, path, **more)


async def last_turn(url: str) -> Any:
    """The last turn, once it has ended."""
    while True:
        turn = (await ask(url, "GET", "/v1/talks/chat-1/turns")).json["turns"][-1]
        if turn["state"] in ("done", "interrupted", "failed"):
            return turn
        await trio.sleep(0.05)


async def speech_of(url: str, turn: Any) -> bytes:
    answer = await ask(url, "GET", f"/v1/requests/{turn['speech_request']}/audio?format=pcm")
    assert answer.status == 200
    body: bytes = answer.body
    return body


@pytest.mark.trio
@pytest.mark.parametrize("killed", ["relay", "tts", "llm"])
async def test_a_reply_is_whole_or_fails_whoever_is_killed(tmp_path: Path, killed: str) -> None:
    url = f"unix:{tmp_path}/state/relayd.sock"
    with trio.fail_after(PATIENCE_S):
        # Workers come back to a relay, and a worker that is killed does not.
        async with talking(tmp_path, 30 if killed == "relay" else 0.2) as (place, procs, stack):
            await ask(url, "POST", "/v1/talks/chat-1/say", told={"text": "Hello"})
            undisturbed = await last_turn(url)
            assert (undisturbed["content"], undisturbed["state"]) == (REPLY, "done")
            samples = await speech_of(url, undisturbed)

            async with visitor(url) as http:
                answer = await http.open("POST", "/v1/talks/chat-1/say", told={"text": "Hello"}, headers=SSE)
                await answer.until(b"event: mark")
                procs[killed].send_signal(signal.SIGKILL)
                await procs[killed].ended()
            await begin(place, procs, killed, stack)
            turn = await last_turn(url)
            assert turn["number"] == 3
            if killed == "llm":  # what a function makes cannot be continued
                assert (turn["state"], turn["code"]) == ("failed", "worker_lost")
                assert REPLY.startswith(turn["content"])
            else:
                assert (turn["content"], turn["state"], turn["code"]) == (REPLY, "done", None)
                assert await speech_of(url, turn) == samples
            await ask(url, "POST", "/v1/talks/chat-1/say", told={"text": "Hello"})
            assert (await last_turn(url))["state"] == "done", "the conversation goes on"
