"""OpenAI's Realtime API over WebRTC: events over the data channel, speech on the call."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from protocol.wire.messages import Rejected, Submit
from relayd.auth.tokens import Principal
from relayd.store.records import TokenLimits
from relayd.talk import microphone as stretches
from relayd.talk.held_request import HeldRequest
from tests.relayd.http.sample_handlers import make_token
from tests.support.calling import CALLS, OFFER, SPEAKS, Gateway, gateway, silence, tone
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

    async def call(self, offer: str = OFFER, **fields: Any) -> Answer:
        return await self.http.ask(
            "POST", "/v1/realtime/calls", **form(sdp=offer, session=json.dumps(SESSION | fields))
        )

    def say(self, kind: str, **fields: Any) -> None:
        self.gateway.event(json.dumps({"type": kind, **fields}))

    def user(self, text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        self.say("conversation.item.create", item={"type": "message", "role": "user", "content": content})

    async def listened_to(self, times: int) -> None:
        """Wait until so many requests have listened to the call, and the last one does."""

        def is_so() -> bool:
            begun = [assign for assign in self.gateway.assigns if assign.params.get("listen")]
            return len(begun) == times and [ear.assign for ear in self.gateway.ears] == begun[-1:]

        await until(is_so)

    @property
    def got(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.gateway.sent]

    async def told(self, kind: str, times: int = 1) -> dict[str, Any]:
        """The event of this type that comes as the `times`-th."""
        await until(lambda: sum(event["type"] == kind for event in self.got) >= times)
        return [event for event in self.got if event["type"] == kind][times - 1]


@asynccontextmanager
async def caller(tmp_path: Path, **talk: Any) -> AsyncIterator[Caller]:
    spaces = CALLS | {"stt": {}} | talk.pop("spaces", {})
    async with stage(tmp_path, listen="127.0.0.1:0", talk={"calls": "calls"} | talk, spaces=spaces) as on:
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


@pytest.mark.trio
async def test_what_is_said_on_the_call_is_heard_and_answered_there(tmp_path: Path) -> None:
    async with caller(tmp_path, transcribe="stt") as on:
        listener = await on.on.listener("Good morning.")
        await on.call(SPEAKS)
        assert (await on.told("session.created"))["session"]["audio"]["input"]["turn_detection"]["type"] == "server_vad"
        on.gateway.speak(silence(1) + tone(1) + silence(1))
        await on.told("response.done")
        await on.told("output_audio_buffer.stopped")
        kinds = [event["type"] for event in on.got if event["type"].startswith(("input_audio", "conversation.item"))]
        assert kinds[:7] == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.input_audio_transcription.delta",
            "conversation.item.input_audio_transcription.completed",
            "conversation.item.done",
        ]
        began, ended = await on.told("input_audio_buffer.speech_started"), await on.told(kinds[1])
        assert began["audio_start_ms"] == pytest.approx(700, abs=30)
        assert ended["audio_end_ms"] == pytest.approx(2_500, abs=30)
        assert on.writer.prompts == [
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Good morning."}]
        ]
        (peer,) = on.gateway.peers
        assert bytes(on.gateway.heard[peer]) == speech_of("You said: Good morning..")
        (assign,) = listener.assigns
        assert assign.inputs["audio"].media_type == "audio/L16;rate=16000;channels=1"
        on.say("input_audio_buffer.append", audio="AAAA")
        assert "on the call" in (await on.told("error"))["error"]["message"]
        on.gateway.hang_up()
        await until(lambda: all(not request.live for request in on.on.daemon.relay.requests.values()))


@pytest.mark.trio
async def test_who_speaks_on_the_call_silences_what_is_played_and_the_model_knows_what_was_heard(
    tmp_path: Path,
) -> None:
    async with caller(tmp_path, transcribe="stt") as on:
        await on.on.listener("Hello", "Stop.")
        on.gateway.stops_at = 95
        await on.call(SPEAKS)
        on.gateway.speak(tone(0.5) + silence(0.7))
        await on.told("response.done")
        await on.told("output_audio_buffer.started")
        on.gateway.stops_at = None
        on.gateway.speak(tone(0.5))
        await on.told("output_audio_buffer.cleared")
        await on.told("output_audio_buffer.stopped")
        on.gateway.speak(silence(0.7))
        await on.told("response.done", 2)
        said = [message["content"] for message in on.writer.prompts[-1] if message["role"] != "system"]
        assert said == ["Hello", "You said:", "Stop."]


@pytest.mark.trio
async def test_a_long_call_is_heard_in_many_requests_and_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "STRETCH_S", 1.0)
    async with caller(tmp_path, transcribe="stt") as on:
        texts = ["One.", "Two.", "Three."]
        listener = await on.on.listener(*texts)
        detection = {"type": "server_vad", "create_response": False}
        await on.call(SPEAKS)
        await on.listened_to(1)
        on.say("session.update", session={"audio": {"input": {"turn_detection": detection}}})
        await on.told("session.updated")
        for number in range(1, 1 + len(texts)):
            await on.listened_to(number + 1)
            on.gateway.speak(silence(0.5) + tone(0.5) + silence(0.7))
            await on.told("conversation.item.done", number)
        starts = [event["audio_start_ms"] for event in on.got if event["type"].endswith("speech_started")]
        assert starts == pytest.approx([200, 1_900, 3_600], abs=31)
        assert len(listener.assigns) == 3
        assert "response.created" not in {event["type"] for event in on.got}


@pytest.mark.trio
async def test_a_caller_that_says_itself_when_it_has_spoken(tmp_path: Path) -> None:
    async with caller(tmp_path, transcribe="stt") as on:
        await on.on.listener("Good morning.")
        await on.call(SPEAKS)
        await on.listened_to(1)
        on.say("session.update", session={"audio": {"input": {"turn_detection": None}}})
        await on.listened_to(2)
        on.say("input_audio_buffer.clear")
        await on.told("input_audio_buffer.cleared")
        await on.listened_to(3)
        on.gateway.speak(tone(1))
        await until(lambda: any(request.entry.fed_bytes > 31_000 for request in on.on.daemon.relay.requests.values()))
        on.say("input_audio_buffer.commit")
        done = await on.told("conversation.item.done")
        assert done["item"]["content"] == [{"type": "input_audio", "transcript": "Good morning."}]


@pytest.mark.trio
async def test_without_a_worker_that_hears_a_caller_is_told_and_the_call_goes_on(tmp_path: Path) -> None:
    async with caller(tmp_path, transcribe="nobody") as on:
        await on.call(SPEAKS)
        assert (await on.told("error"))["error"]["code"] == "space_not_found"
        on.user("Hello")
        on.say("response.create")
        assert (await on.told("response.done"))["response"]["status"] == "completed"


@pytest.mark.trio
async def test_a_call_that_is_listened_to_takes_three_slots_and_one_without_a_microphone_two(tmp_path: Path) -> None:
    async with caller(tmp_path, transcribe="stt") as on:
        for offer, status in ((SPEAKS, 201), (SPEAKS, 201), (OFFER, 201), (SPEAKS, 429), (OFFER, 201), (OFFER, 429)):
            answer = await on.call(offer)
            assert answer.status == status, answer.body
            if status == 429:
                each = "three" if offer == SPEAKS else "two"
                assert f"a call takes {each} of its 10 slots" in answer.error["message"]


@pytest.mark.trio
async def test_a_principal_calls_only_as_its_token_allows(tmp_path: Path) -> None:
    async with caller(tmp_path) as on:
        daemon = on.on.daemon
        for more, status, words in (
            ({"readonly": True}, 403, "read-only"),
            ({"spaces": ("llm", "tts")}, 403, "calls"),
            ({"limits": TokenLimits(max_queued=1)}, 429, "may have 1 queued requests"),
        ):
            name = f"bob-{status}-{len(more)}-{next(iter(more))}"
            async with visitor(daemon.urls[0], token=make_token(daemon, name, **more)) as bob:
                if "limits" in more:  # nobody serves that space, so it waits
                    waiting = Submit(request_id="f" * 32, space="face", params={})
                    principal = Principal(name=name, role="client")
                    admitted = on.on.talks.place.admission.submit(waiting, principal, HeldRequest(lambda: None))
                    assert not isinstance(admitted, Rejected)
                answer = await attrs.evolve(on, http=bob).call()
                assert (answer.status, words in answer.error["message"]) == (status, True), answer.body
        assert not on.gateway.peers
