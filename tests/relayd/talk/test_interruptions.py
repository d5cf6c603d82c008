"""Clients that interrupt all the time, a hundred times in each protocol: nothing is lost, and nothing piles up."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from relayd.talk.conversation import MAX_SPOKEN
from tests.relayd.http.sample_handlers import make_token
from tests.relayd.http.sample_sockets import socket_to
from tests.relayd.talk.realtime_client import realtime
from tests.support.gpu_client import GOOD, gpu_client
from tests.support.raw_http_client import visitor
from tests.support.relay import new_token, until
from tests.support.talking import Stage, Step, Writer, stage

COUNT = 100
TEXTS = [f"Number {number}." for number in range(COUNT)]
LAST = "Say goodbye."
#: More than a hundred turns.
OPTIONS: dict[str, Any] = {"listen": "127.0.0.1:0", "talk": {"max_turns": 1_000, "tts_server": True}}


def endless(messages: list[dict[str, str]]) -> Sequence[Step]:
    """Answer at once, and then say no more; but for the last text."""
    is_last = messages[-1]["content"].endswith(LAST)
    return ["Goodbye."] if is_last else ["One two three. ", trio.Event()]


async def both(on: Stage) -> Writer:
    """Workers that answer and speak."""
    await on.speaker()
    return await on.writer(endless)


def _has_begun(writer: Writer, number: int) -> bool:
    return len(writer.assigns) > number


async def assert_nothing_is_left(on: Stage, session: str | None, user: str = "") -> None:
    """All texts are in the history, each with its end, and neither tasks nor samples nor requests are left of them."""
    await until(lambda: not any(on.daemon.relay.stats.talk.websockets.values()))
    await on.daemon.at_rest()
    place = on.talks.place
    assert not place.unended
    assert on.daemon.relay.stats.talk.unended == 0
    await until(lambda: len(place.nursery.child_tasks) == 1)  # that which deletes old conversations
    assert all(len(spoken) <= MAX_SPOKEN for spoken in place.spoken.values())
    if session is not None:
        turns = (await on.open(session, user=user, create=False)).turns
        assert [turn.content for turn in turns if turn.role == "user"] == [*TEXTS, LAST]
        states = [turn.state for turn in turns if turn.role == "assistant"]
        assert states == ["interrupted"] * COUNT + ["done"]


@pytest.mark.trio
async def test_over_http(tmp_path: Path) -> None:
    ended: dict[str, str] = {}
    async with stage(tmp_path, **OPTIONS) as on:
        writer, token = await both(on), await new_token(on.daemon)

        async def say(text: str) -> None:
            async with visitor(on.daemon.url, token=token) as http:
                told = {"text": text, "interrupt": True}
                ended[text] = (await http.ask("POST", "/v1/talks/s1/say", told=told)).json["turn"]["state"]

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number, text in enumerate([*TEXTS, LAST]):
                    nursery.start_soon(say, text)
                    await until(partial(_has_begun, writer, number))
        assert ended == dict.fromkeys(TEXTS, "interrupted") | {LAST: "done"}
        await assert_nothing_is_left(on, "s1")


@pytest.mark.trio
async def test_over_the_protocol_of_the_gpu_server(tmp_path: Path) -> None:
    answers: dict[str, Any] = {}
    async with stage(tmp_path, **OPTIONS) as on:
        writer = await both(on)
        async with gpu_client(on) as client, trio.open_nursery() as nursery:

            async def listen() -> None:
                while len(answers) <= COUNT:
                    answer = await client.answer()
                    answers[answer["message_id"]] = answer.get("interrupted", False)

            nursery.start_soon(listen)
            for number, text in enumerate([*TEXTS, LAST]):
                await client.send(GOOD | {"content": text, "interrupt": True, "message_id": text})
                await until(partial(_has_begun, writer, number))
        assert answers == dict.fromkeys(TEXTS, True) | {LAST: False}
        await assert_nothing_is_left(on, "uuid-session-1", "6")


@pytest.mark.trio
async def test_over_realtime(tmp_path: Path) -> None:
    async with realtime(tmp_path, "/v1/realtime?model=llm&conversation=s1", **OPTIONS) as (on, client):
        await both(on)
        for text in TEXTS:
            await client.user(text)
            await client.say("response.create")
            await client.next("response.output_audio.delta")
            await client.say("response.cancel")  # the next text does not wait until that is done
        await client.user(LAST)
        await client.say("response.create")
        while (await client.done())["status"] != "completed":
            pass
        done = [event["response"]["status"] for event in client.got if event["type"] == "response.done"]
        assert done == ["cancelled"] * COUNT + ["completed"]
        assert not [event for event in client.got if event["type"] == "error"]
        await client.socket.aclose()
        await assert_nothing_is_left(on, "s1")


@pytest.mark.trio
async def test_over_the_protocol_of_the_voxcpm_server(tmp_path: Path) -> None:
    async with stage(tmp_path, **OPTIONS) as on:
        speaker = await on.speaker()
        speaker.lingers = trio.Event()
        results: dict[str, Any] = {}
        cancelled = ""
        async with socket_to(on.daemon.urls[0], f"/tts?token={make_token(on.daemon)}") as socket:
            for text in [*TEXTS, LAST]:
                if text == LAST:
                    speaker.lingers.set()
                params = {"text": text}
                await socket.send_message(json.dumps({"type": "tts_request", "request_id": text, "params": params}))
                while text not in results:
                    with trio.fail_after(10):
                        message = await socket.get_message()
                    told: dict[str, Any] = {"type": "audio"} if isinstance(message, bytes) else json.loads(message)
                    if told["type"] == "audio" and text not in (LAST, cancelled):
                        cancelled = text
                        await socket.send_message(json.dumps({"type": "cancel", "request_id": text}))
                    elif told["type"] == "complete":
                        assert told["request_id"] not in results
                        results[told["request_id"]] = told["result"].get("cancelled", False)
                    assert told["type"] != "error", told
        assert results == dict.fromkeys(TEXTS, True) | {LAST: False}
        await until(lambda: len(speaker.cancelled) == COUNT)
        await assert_nothing_is_left(on, None)
