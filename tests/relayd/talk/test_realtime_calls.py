"""OpenAI's Realtime API over WebRTC: events over the data channel, speech on the call."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.relayd.http.sample_handlers import make_token
from tests.support.calling import CALLS, OFFER, Gateway, gateway
from tests.support.raw_http_client import Answer, Visitor, visitor
from tests.support.talking import Stage, Writer, speech_of, stage
from tests.support.until import until

SESSION = {"type": "realtime", "model": "llm", "audio": {"output": {"voice": "anna"}}, "instructions": "Be brief."}


def form(**fields: str) -> dict[str, Any]:
    """A body as OpenAI's clients send it."""
    parts = [f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in fields.items()]
    return {
        "body": ("".join(parts) + "--x--\r\n").encode(),
        "headers": {"content-type": "multipart/form-data; boundary=x"},
    }


@attrs.define(eq=False)
class Caller:
    """One call, and the data channel of its peer."""

    on: Stage
    writer: Writer
    gateway: Gateway
    http: Visitor

    async def call(self, **fields: Any) -> Answer:
        return await self.http.ask(
            "POST", "/v1/realtime/calls", **form(sdp=OFFER, session=json.dumps(SESSION | fields))
        )

    def say(self, kind: str, **fields: Any) -> None:
        self.gateway.event(json.dumps({"type": kind, **fields}))

    def user(self, text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        self.say("conversation.item.create", item={"type": "message", "role": "user", "content": content})

    @property
    def got(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.gateway.sent]

    async def told(self, kind: str, times: int = 1) -> dict[str, Any]:
        """The event of this type that comes as the `times`-th."""
        await until(lambda: sum(event["type"] == kind for event in self.got) >= times)
        return [event for event in self.got if event["type"] == kind][times - 1]


@asynccontextmanager
async def caller(tmp_path: Path, **talk: Any) -> AsyncIterator[Caller]:
    async with stage(tmp_path, listen="127.0.0.1:0", talk={"calls": "calls"} | talk, spaces=CALLS) as on:
        writer = await on.writer()
        await on.speaker()
        calls = await gateway(on)
        async with visitor(on.daemon.urls[0], token=make_token(on.daemon)) as http:
            yield Caller(on, writer, calls, http)


@pytest.mark.trio
async def test_a_response_is_told_over_the_channel_and_heard_on_the_call(tmp_path: Path) -> None:
    async with caller(tmp_path) as on:
        answer = await on.call()
        assert (answer.status, answer.headers["content-type"]) == (201, "application/sdp")
        assert answer.body.decode() == f"answer 0 to {OFFER}"
        created = await on.told("session.created")
        assert created["session"]["instructions"] == "Be brief."
        on.user("Hello")
        await on.told("conversation.item.done")
        on.say("response.create")
        done = (await on.told("response.done"))["response"]
        assert done["status"] == "completed"
        text = done["output"][0]["content"][0]["transcript"]
        (peer,) = on.gateway.peers
        await on.told("output_audio_buffer.stopped")
        assert bytes(on.gateway.heard[peer]) == speech_of(text)
        kinds = [event["type"] for event in on.got]
        assert kinds.index("output_audio_buffer.started") < kinds.index("output_audio_buffer.stopped")
        assert not [kind for kind in kinds if kind == "response.output_audio.delta"], "speech is not sent twice"
        hung_up = await on.http.ask("POST", f"{answer.headers['location']}/hangup")
        assert hung_up.status == 200
        await until(lambda: not on.gateway.peers)
        await until(lambda: not any(on.on.daemon.relay.stats.talk.websockets.values()))
        assert (await on.http.ask("POST", f"{answer.headers['location']}/hangup")).status == 404


@pytest.mark.trio
async def test_what_was_heard_is_what_the_call_has_played(tmp_path: Path) -> None:
    async with caller(tmp_path) as on:
        on.gateway.stops_at = 95
        await on.call()
        on.user("Hello")
        on.say("response.create")
        await on.told("response.done")
        await on.told("output_audio_buffer.started")
        on.say("output_audio_buffer.clear")
        await on.told("output_audio_buffer.cleared")
        on.user("What did I hear?")
        on.gateway.stops_at = None
        on.say("response.create")
        await on.told("response.done", 2)
        (heard,) = [m["content"] for m in on.writer.prompts[-1] if m["role"] == "assistant"]
        assert heard == "You said:"


@pytest.mark.trio
async def test_a_session_ends_with_its_call(tmp_path: Path) -> None:
    async with caller(tmp_path) as on:
        await on.call()
        await on.told("session.created")
        on.gateway.hang_up()
        await until(lambda: not any(on.on.daemon.relay.stats.talk.websockets.values()))
        assert not len(on.on.talks.place.calls)


@pytest.mark.trio
async def test_what_cannot_be_a_call_is_refused_as_openai_refuses(tmp_path: Path) -> None:
    async with caller(tmp_path) as on:
        plain = await on.http.ask(
            "POST", "/v1/realtime/calls?model=llm", body=OFFER.encode(), headers={"content-type": "application/sdp"}
        )
        assert plain.status == 201
        for refused, status, words in (
            (await on.http.ask("POST", "/v1/realtime/calls", **form(session="{}")), 400, "sdp: is required"),
            (await on.http.ask("POST", "/v1/realtime/calls", **form(sdp=OFFER, session="[]")), 400, "object"),
            (await on.http.ask("POST", "/v1/realtime/calls", **form(sdp="v=1")), 422, "no SDP"),
            (await on.call(output_modalities=["smell"]), 400, "output_modalities"),
            (await on.call(model="tts"), 422, "writes no replies"),
        ):
            assert (refused.status, words in refused.error["message"]) == (status, True), refused.json
            assert refused.error["type"] == "invalid_request_error"
        await until(lambda: len(on.gateway.peers) == 1)


@pytest.mark.trio
async def test_without_a_space_for_calls_it_is_said_who_can_name_one(tmp_path: Path) -> None:
    async with caller(tmp_path, calls="") as on:
        answer = await on.call()
        assert (answer.status, "[talk] calls" in answer.error["message"]) == (404, True)
