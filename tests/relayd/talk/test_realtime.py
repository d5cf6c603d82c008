"""OpenAI's Realtime API: the events of a session, and what becomes of what is said in it."""

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from starlette.websockets import WebSocketDisconnect

from protocol.wire.structs import AudioFormat
from relayd.talk.dialects.json_socket import JsonSocket
from relayd.talk.dialects.realtime_session import RealtimeSession
from tests.relayd.http.sample_sockets import denial
from tests.relayd.talk.realtime_client import PATH, client_of, realtime
from tests.support.relay import new_token, until
from tests.support.talking import ANN, Stage, speech_of, stage

SPOKEN = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
]


async def a_reply(on: Stage) -> None:
    await on.writer(lambda _messages: ["Hello ", "there, you."])
    await on.speaker()


@pytest.mark.trio
async def test_a_text_is_answered_with_the_events_of_a_spoken_reply(tmp_path: Path) -> None:
    async with realtime(tmp_path) as (on, client):
        await a_reply(on)
        assert on.daemon.relay.stats.talk.websockets == {"realtime": 1}
        created = client.got[0]["session"]
        assert created["output_modalities"] == ["audio"]
        assert created["audio"]["output"] == {
            "format": {"type": "audio/pcm", "rate": 24_000},
            "voice": "default",
            "speed": 1.0,
        }
        item = await client.user("Hi", id="mine-1")
        assert (item["id"], item["status"]) == ("mine-1", "completed")
        assert [event["type"] for event in client.got[1:]] == ["conversation.item.added", "conversation.item.done"]
        client.got.clear()
        done = await client.asked(metadata={"turn": "1"})
        assert set(client.types()) == set(SPOKEN)
        firsts = list(dict.fromkeys(client.types()))
        assert [kind for kind in firsts if ".delta" not in kind] == [kind for kind in SPOKEN if ".delta" not in kind]
        assert client.heard() == speech_of("Hello there, you.")
        assert done["status"] == "completed"
        assert done["metadata"] == {"turn": "1"}
        assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": "Hello there, you."}]
        usage = done["usage"]
        assert (usage["input_tokens"], usage["output_token_details"]["text_tokens"]) == (3, 5)
        added = next(event for event in client.got if event["type"] == "conversation.item.added")
        assert added["previous_item_id"] == "mine-1"
        assert {event["event_id"] for event in client.got}.__len__() == len(client.got)


@pytest.mark.trio
async def test_text_alone_makes_no_speech(tmp_path: Path) -> None:
    async with realtime(tmp_path) as (on, client):
        await a_reply(on)
        await client.say("session.update", session={"type": "realtime", "output_modalities": ["text"]})
        assert (await client.next("session.updated"))["session"]["output_modalities"] == ["text"]
        await client.user("Hi")
        done = await client.asked()
        assert done["output"][0]["content"] == [{"type": "output_text", "text": "Hello there, you."}]
        assert not client.heard()
        assert [each.submit.space for each in on.daemon.relay.requests.values()] == ["llm"]
        spoken = await client.asked(output_modalities=["audio"])
        assert spoken["output"][0]["content"][0]["type"] == "output_audio"


@pytest.mark.trio
async def test_the_beta_has_its_own_names(tmp_path: Path) -> None:
    header = {"headers": {"OpenAI-Beta": "realtime=v1"}}
    browser = {"subprotocols": ["realtime", "openai-beta.realtime-v1"]}
    async with stage(tmp_path) as on:
        await a_reply(on)
        for options in (header, browser):
            async with client_of(on, **options) as client:
                created = (await client.next("session.created"))["session"]
                assert created["modalities"] == ["text", "audio"]
                assert created["output_audio_format"] == "pcm16"
                await client.say("session.update", session={"modalities": ["text", "audio"], "voice": "alloy"})
                assert (await client.next("session.updated"))["session"]["voice"] == "alloy"
                await client.say(
                    "conversation.item.create",
                    item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                )
                done = await client.asked(modalities=["text", "audio"])
                assert done["output"][0]["content"] == [{"type": "audio", "transcript": "Hello there, you."}]
                types = set(client.types())
                assert {"response.audio.delta", "response.audio_transcript.done", "response.output_item.done"} <= types
                assert "conversation.item.created" in types
                assert not {kind for kind in types if "output_audio" in kind or kind.startswith("conversation.item.d")}
                assert client.heard() == speech_of("Hello there, you.")


@pytest.mark.trio
async def test_samples_of_another_rate_are_converted(tmp_path: Path) -> None:
    async with realtime(tmp_path) as (on, client):
        await on.writer(lambda _messages: ["Hello " * 200])
        await on.speaker(AudioFormat(sample_rate=16_000))
        await client.user("Hi")
        assert (await client.asked())["status"] == "completed"
        assert len(client.heard()) == pytest.approx(len(speech_of("Hello " * 200)) * 1.5, abs=200)
        client.got.clear()
        await client.asked(audio={"output": {"speed": 2.0}})
        assert len(client.heard()) == pytest.approx(len(speech_of("Hello " * 200)) * 0.75, rel=0.05)
        assert max(len(event.get("delta", "")) for event in client.got) <= 32_000


@pytest.mark.trio
async def test_after_a_truncation_the_model_is_told_only_what_was_heard(tmp_path: Path) -> None:
    goes_on = trio.Event()

    async with realtime(tmp_path) as (on, client):
        writer = await on.writer(lambda messages: ["One two three. ", "Four five six. ", goes_on, "Seven."])
        await on.speaker()
        await client.user("Count")
        await client.say("response.create")
        item_id = (await client.next("response.output_item.added"))["item"]["id"]
        while len(client.heard()) < len(speech_of("One two three. Four five six. ")):
            await client.next()
        await client.say("response.cancel")
        assert (await client.done())["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
        await client.say("conversation.item.retrieve", item_id=item_id)
        told = (await client.next("conversation.item.retrieved"))["item"]
        assert (told["status"], told["content"][0]["transcript"]) == ("incomplete", "One two three. Four five six. ")
        # Ten samples a character: 8 ms are 19 characters and a bit.
        await client.say("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=8)
        assert (await client.next("conversation.item.truncated"))["audio_end_ms"] == 8
        await client.say("conversation.item.retrieve", item_id=item_id)
        told = (await client.next("conversation.item.retrieved"))["item"]
        assert told["content"][0]["transcript"] == "One two three. Four"
        await client.user("Go on")
        goes_on.set()
        assert (await client.asked())["status"] == "completed"
        assert writer.prompts[1] == [
            {"role": "user", "content": "Count"},
            {"role": "assistant", "content": "One two three. Four"},
            {"role": "user", "content": "Go on"},
        ]
        await client.say("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=60_000)
        assert (await client.fault())["param"] == "audio_end_ms"


@pytest.mark.trio
async def test_what_was_heard_to_its_end_is_whole_whatever_its_rate(tmp_path: Path) -> None:
    """The milliseconds of a client are rounded; the last word is not lost by that."""
    async with realtime(tmp_path) as (on, client):
        await on.writer(lambda _messages: ["Hello ", "there, you."])
        await on.speaker(AudioFormat(sample_rate=22_050))
        await client.user("Hi")
        item_id = (await client.asked())["output"][0]["id"]
        end_ms = len(client.heard()) // 48
        await client.say("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=end_ms)
        await client.next("conversation.item.truncated")
        await client.say("conversation.item.retrieve", item_id=item_id)
        told = (await client.next("conversation.item.retrieved"))["item"]
        assert told["content"][0]["transcript"] == "Hello there, you."


@pytest.mark.trio
async def test_a_cancelled_response_ends_before_the_next_begins(tmp_path: Path) -> None:
    """All sent at once, as clients do that interrupt: the second is no `already has active response`."""
    never = trio.Event()
    async with realtime(tmp_path) as (on, client):
        await on.writer(lambda messages: ["Yes."] if messages[-1]["content"].endswith("Again") else ["Well, ", never])
        await on.speaker()
        await client.user("Hi")
        client.got.clear()
        for kind in ("response.create", "response.cancel", "response.create", "response.create"):
            await client.say(kind)
        error = await client.fault()
        assert (error["code"], error["event_id"]) == ("conversation_already_has_active_response", "mine")
        assert [kind for kind in client.types() if kind != "response.created"][:1] == ["response.done"]
        assert client.got[1]["response"]["status"] == "cancelled"
        await client.say("response.cancel")
        assert (await client.done())["status"] == "cancelled"
        await client.say("response.cancel")
        assert (await client.fault())["code"] == "response_cancel_not_active"
        await client.user("Again")
        assert (await client.asked())["status"] == "completed"


@pytest.mark.trio
async def test_failures_of_workers_end_a_response_and_not_the_session(tmp_path: Path) -> None:
    async with realtime(tmp_path, http={"no_worker_wait_s": 0.1}) as (on, client):
        await client.user("Hi")
        done = await client.asked()
        assert (done["status"], done["status_details"]["error"]["code"]) == ("failed", "no_worker")
        assert done["output"] == []
        await on.writer(lambda messages: [("engine_failed",)] if messages[-1]["content"] == "Hi" else ["Hello."])
        done = await client.asked()
        assert (done["status"], done["status_details"]["error"]["code"]) == ("failed", "engine_failed")
        assert done["status_details"]["error"]["type"] == "server_error"
        await client.user("Again")
        done = await client.asked()  # nobody speaks
        assert (done["status"], done["status_details"]["error"]["code"]) == ("failed", "no_worker")
        assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": "Hello."}]
        await on.speaker()
        done = await client.asked()
        assert (done["status"], client.heard()) == ("completed", speech_of("Hello."))


@pytest.mark.trio
@pytest.mark.parametrize(
    ("sent", "code", "param"),
    [
        ("}", "invalid_json", None),
        ("[" * 100_000, "invalid_json", None),
        ("[]", "invalid_json", None),
        (b"{}", "invalid_json", None),
        ({}, "missing_required_parameter", "type"),
        ({"type": 7}, "invalid_value", "type"),
        ({"type": "response.begin"}, "unknown_event", "type"),
        ({"type": "input_audio_buffer.append", "audio": ""}, "unsupported", "type"),
        ({"type": "session.update"}, "missing_required_parameter", "session"),
        ({"type": "session.update", "session": {"type": "transcription"}}, "unsupported", "session.type"),
        ({"type": "session.update", "session": {"model": "other"}}, "unsupported", "session.model"),
        ({"type": "session.update", "session": {"tools": [{}]}}, "unsupported", "session.tools"),
        ({"type": "session.update", "session": {"instructions": 5}}, "invalid_value", "session.instructions"),
        ({"type": "session.update", "session": {"instructions": "\ud800"}}, "invalid_value", "session.instructions"),
        (
            {"type": "session.update", "session": {"output_modalities": ["x"]}},
            "invalid_value",
            "session.output_modalities",
        ),
        (
            {"type": "session.update", "session": {"audio": {"output": {"format": {"type": "audio/pcmu"}}}}},
            "unsupported",
            "session.audio.output.format",
        ),
        (
            {
                "type": "session.update",
                "session": {"audio": {"output": {"format": {"type": "audio/pcm", "rate": 8000}}}},
            },
            "unsupported",
            "session.audio.output.format",
        ),
        (
            {"type": "session.update", "session": {"audio": {"output": {"speed": 9}}}},
            "invalid_value",
            "session.audio.output.speed",
        ),
        ({"type": "conversation.item.create"}, "missing_required_parameter", "item"),
        ({"type": "conversation.item.create", "item": {"type": "function_call"}}, "unsupported", "item.type"),
        ({"type": "conversation.item.create", "item": {"role": "user"}}, "missing_required_parameter", "item.content"),
        (
            {"type": "conversation.item.create", "item": {"role": "user", "content": [{"type": "input_audio"}]}},
            "unsupported",
            "item.content[0].type",
        ),
        (
            {
                "type": "conversation.item.create",
                "item": {"role": "user", "content": [{"type": "input_text", "text": "x" * 1_000_000}]},
            },
            "input_too_large",
            None,
        ),
        ({"type": "conversation.item.delete", "item_id": "no"}, "item_delete_invalid_item_id", "item_id"),
        ({"type": "conversation.item.retrieve", "item_id": "no"}, "item_retrieve_invalid_item_id", "item_id"),
        ({"type": "conversation.item.truncate", "item_id": "no"}, "item_truncate_invalid_item_id", "item_id"),
        ({"type": "response.create", "response": {"conversation": "x"}}, "invalid_value", "response.conversation"),
        ({"type": "response.create", "response": {"metadata": {"a": 1}}}, "invalid_value", "response.metadata"),
        ({"type": "response.create", "response": {"input": []}}, "unsupported", "response.input"),
        ({"type": "response.cancel"}, "response_cancel_not_active", None),
    ],
)
async def test_what_is_wrong_is_said_and_the_session_stays(
    tmp_path: Path, sent: Any, code: str, param: str | None
) -> None:
    async with realtime(tmp_path) as (_, client):
        event = sent if isinstance(sent, str | bytes) else json.dumps({"event_id": "e-1"} | sent)
        await client.socket.send_message(event)
        error = await client.fault()
        assert (error["code"], error["param"]) == (code, param), error
        assert error["event_id"] == ("e-1" if isinstance(sent, dict) else None)
        assert (await client.user("Still here"))["content"] == [{"type": "input_text", "text": "Still here"}]


@pytest.mark.trio
async def test_items_are_the_history(tmp_path: Path) -> None:
    async with realtime(tmp_path) as (on, client):
        writer = await on.writer()
        await on.speaker()
        item: dict[str, Any] = {}
        for role, text in (("system", "Be kind."), ("user", "I am Ann.")):
            content = [{"type": "input_text", "text": text}]
            item = {"id": f"{role}-1", "type": "message", "role": role, "content": content}
            await client.say("conversation.item.create", item=item)
            assert (await client.next("conversation.item.done"))["item"]["content"] == item["content"]
        told = {"id": "reply-1", "type": "message", "role": "assistant"}
        await client.say(
            "conversation.item.create",
            previous_item_id="user-1",
            item=told | {"content": [{"type": "output_text", "text": "Hello "}, {"type": "text", "text": "Ann."}]},
        )
        assert (await client.next("conversation.item.added"))["previous_item_id"] == "user-1"
        await client.say("conversation.item.create", item=item)
        assert (await client.fault())["code"] == "item_already_exists"
        await client.say("conversation.item.create", previous_item_id="user-1", item=item | {"id": "user-2"})
        assert (await client.fault())["param"] == "previous_item_id"
        await client.user("Wrong", id="wrong")
        await client.say("conversation.item.delete", item_id="wrong")
        assert (await client.next("conversation.item.deleted"))["item_id"] == "wrong"
        await client.user("Who am I?")
        await client.asked(instructions="Answer in one word.")
        assert writer.prompts == [
            [
                {"role": "system", "content": "Answer in one word.\n\nBe kind."},
                {"role": "user", "content": "I am Ann."},
                {"role": "assistant", "content": "Hello \nAnn."},
                {"role": "user", "content": "Who am I?"},
            ]
        ]


@pytest.mark.trio
async def test_a_response_aside_sees_the_conversation_and_leaves_it_alone(tmp_path: Path) -> None:
    waits = trio.Event()
    async with realtime(tmp_path) as (on, client):
        writer = await on.writer(
            lambda messages: [messages[-1]["content"], *([waits] if messages[-1]["content"] == "First" else [])]
        )
        await on.speaker()
        await client.user("First")
        await client.say("response.create")
        await client.next("response.output_item.added")
        told = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is this about?"}]}]
        first = next(event["item"]["id"] for event in client.got if event["type"] == "conversation.item.added")
        aside = await client.asked(
            conversation="none", output_modalities=["text"], input=[{"type": "item_reference", "id": first}, *told]
        )
        assert aside["conversation_id"] is None
        assert aside["output"][0]["content"][0]["text"] == "First\n\nWhat is this about?"
        await client.say("response.create", response={"conversation": "none", "input": told * 201})
        assert (await client.fault())["message"] == "response.input may have 200 items"
        waits.set()
        assert (await client.done())["output"][0]["content"][0]["transcript"] == "First"
        await client.say("conversation.item.retrieve", item_id=aside["output"][0]["id"])
        assert (await client.fault())["code"] == "item_retrieve_invalid_item_id"
        await client.asked(conversation="none", output_modalities=["text"])
        assert writer.prompts[-1] == [
            {"role": "user", "content": "First"},
            {"role": "assistant", "content": "First"},
        ]


@pytest.mark.trio
async def test_a_stored_conversation_is_resumed_and_others_are_forgotten(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await a_reply(on)
        token = await new_token(on.daemon)
        async with client_of(on, token=token) as client:
            await client.next("session.created")
            await client.user("Hi")
            await client.asked()
        await until(lambda: not on.daemon.http_context.exchanges)
        assert not on.talks.list(ANN)
        async with client_of(on, f"{PATH}&conversation=chat-1", token=token) as client:
            await client.next("session.created")
            await client.user("Hi")
            await client.asked()
        async with client_of(on, f"{PATH}&conversation=chat-1", token=token) as client:
            await client.next("session.created")
            first, second = [(await client.next("conversation.item.done")) for _ in range(2)]
            assert first["item"]["content"] == [{"type": "input_text", "text": "Hi"}]
            assert second["previous_item_id"] == first["item"]["id"]
            assert second["item"]["content"] == [{"type": "output_audio", "transcript": "Hello there, you."}]
            item_id = second["item"]["id"]
            await client.say("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=0)
            assert "no audio" in (await client.fault())["message"]


@pytest.mark.trio
async def test_without_a_history_a_conversation_lasts_as_long_as_its_connection(tmp_path: Path) -> None:
    async with stage(tmp_path, talk={"history": "none"}) as on:
        writer, token = await on.writer(), await new_token(on.daemon)
        await on.speaker()
        for _ in range(2):
            async with client_of(on, f"{PATH}&conversation=chat-1", token=token) as client:
                for text in ("Hi", "Again"):
                    await client.user(text)
                    await client.asked()
        assert [len(prompt) for prompt in writer.prompts] == [1, 3, 1, 3]
        assert not on.talks.list(ANN)


@pytest.mark.trio
async def test_who_leaves_hears_no_more(tmp_path: Path) -> None:
    never = trio.Event()
    async with stage(tmp_path) as on:
        writer = await on.writer(lambda _messages: ["Well, ", never])
        await on.speaker()
        for path in (PATH, f"{PATH}&conversation=chat-1"):
            async with client_of(on, path) as client:
                await client.user("Hi")
                await client.say("response.create")
                await client.next("response.output_audio.delta")
            await until(lambda: len(writer.cancelled) == len(writer.assigns))
        await until(lambda: not on.talks.place.unended)


@attrs.define(eq=False)
class LeavingSocket:
    """Asks for a response, and is found to be closed when the text of that is sent."""

    asks: bool = True

    async def receive(self) -> dict[str, Any]:
        if not self.asks:
            await trio.sleep_forever()
        self.asks = False
        return {"type": "websocket.receive", "text": '{"type": "response.create"}'}

    async def send_text(self, data: str) -> None:
        await trio.lowlevel.checkpoint()
        if "delta" in data:
            raise WebSocketDisconnect(1006)


@pytest.mark.trio
async def test_who_is_found_to_have_left_when_a_reply_is_sent_hears_no_more(tmp_path: Path) -> None:
    never = trio.Event()
    async with stage(tmp_path) as on, trio.open_nursery() as nursery:
        writer = await on.writer(lambda _messages: ["Well, ", never])
        await on.speaker()
        talk = await on.open()
        await talk.add("user", "Hi")
        socket: Any = LeavingSocket()
        context = on.daemon.http_context
        session = RealtimeSession(JsonSocket(socket), context, on.talks, ANN, "llm", "llm", False, talk, nursery)
        nursery.start_soon(session.serve)
        await until(lambda: len(writer.cancelled) == 1)
        await until(lambda: not on.talks.place.unended)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_responses_count_as_requests_of_their_principal(tmp_path: Path) -> None:
    limits = {"principal": {"requests_per_s": 0.001}}  # so one at once, which is the handshake
    async with realtime(tmp_path, limits=limits) as (on, client):
        await on.writer()
        await client.user("Hi")
        await client.say("response.create")
        assert (await client.fault())["code"] == "rate_limited"


@pytest.mark.trio
async def test_logins_and_models(tmp_path: Path) -> None:
    async with stage(tmp_path, listen="127.0.0.1:0") as on:
        url, token = on.daemon.urls[0], await new_token(on.daemon)
        await on.writer()
        await on.speaker()
        browser = ["realtime", f"openai-insecure-api-key.{token}"]
        async with client_of(on, token="", url=url, subprotocols=browser) as client:
            assert client.socket.subprotocol == "realtime"
            assert (await client.next())["session"]["model"] == "llm"
        for model in ("?model=gpt-realtime", "?model=openai/gpt-4o-realtime-preview", "?model=llm", ""):
            async with client_of(on, f"/v1/realtime{model}", token=token) as client:
                assert client.socket.subprotocol is None
                await client.user("Hi")
                assert (await client.asked())["status"] == "completed"
        for path, key, status, code in (
            (PATH, None, 401, "unauthenticated"),
            (PATH, "rly_c_wrong", 401, "unauthenticated"),
            ("/v1/realtime?model=tts", token, 422, "invalid_params"),
            (f"{PATH}&conversation=%20", token, 422, "invalid_params"),
        ):
            denied, body = await denial(url, path, key)
            assert (denied, json.loads(body)["error"]["code"]) == (status, code), path
    talk = {"sessions": "known", "speech": ""}
    async with stage(tmp_path / "known", talk=talk, openai={"strict": True}) as on:
        token = await new_token(on.daemon)
        for model in ("nobody", "gpt-realtime"):
            assert (await denial(on.daemon.url, f"/v1/realtime?model={model}", token))[0] == 404
        assert (await denial(on.daemon.url, f"{PATH}&conversation=chat-1", token))[0] == 404
        async with client_of(on, token=token) as client:
            assert (await client.next())["session"]["output_modalities"] == ["text"]
            await client.say("session.update", session={"output_modalities": ["audio"]})
            assert "[talk] speech" in (await client.fault())["message"]


@pytest.mark.trio
async def test_voices_are_those_of_the_speech_api(tmp_path: Path) -> None:
    voices = {"type": "object", "properties": {"text": {"type": "string"}, "voice": {"enum": ["anna", "bert"]}}}
    names = {"voices": {"alloy": "bert"}, "strict": True}
    async with realtime(tmp_path, openai=names) as (on, client):
        await on.writer()
        speaker = await on.speaker(params=voices)
        await client.user("Hi")
        for voice in ("anna", "alloy"):
            await client.say("session.update", session={"audio": {"output": {"voice": voice}}})
            await client.asked()
        await client.asked(audio={"output": {"voice": {"id": "default"}}})
        assert [assign.params for assign in speaker.assigns] == [{"voice": "anna"}, {"voice": "bert"}, {}]
        await client.say("session.update", session={"audio": {"output": {"voice": "carl"}}})
        error = await client.fault()
        assert error["param"] == "session.audio.output.voice"
        assert "anna" in error["message"]


#: What foreign clients send for a turn of text and an interruption, as their sources have it.
LIVEKIT: list[dict[str, Any]] = [
    {
        "type": "session.update",
        "event_id": "session_update_1",
        "session": {
            "type": "realtime",
            "model": "gpt-realtime",
            "output_modalities": ["audio"],
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": 24_000},
                    "noise_reduction": None,
                    "transcription": {"model": "gpt-4o-mini-transcribe"},
                    "turn_detection": {"type": "semantic_vad", "create_response": True, "eagerness": "medium"},
                },
                "output": {"format": {"type": "audio/pcm", "rate": 24_000}, "speed": 1.0, "voice": "marin"},
            },
            "max_output_tokens": "inf",
            "tool_choice": "auto",
            "tracing": None,
            "truncation": None,
        },
    },
    {"type": "session.update", "event_id": "tools_update_1", "session": {"type": "realtime", "tools": []}},
    {"type": "session.update", "session": {"type": "realtime", "instructions": "Be kind."}},
    {
        "type": "conversation.item.create",
        "event_id": "chat_ctx_create_1",
        "previous_item_id": "root",
        "item": {
            "id": "item_1",
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Hi"}],
        },
    },
    {
        "type": "response.create",
        "event_id": "response_create_1",
        "response": {"instructions": None, "metadata": {"client_event_id": "response_create_1"}},
    },
]
PIPECAT: list[dict[str, Any]] = [
    {
        "type": "session.update",
        "event_id": "6b5b",
        "session": {
            "type": "realtime",
            "instructions": "Be kind.",
            "audio": {"input": {"turn_detection": None}, "output": {"voice": "alloy"}},
            "tools": [],
        },
    },
    {
        "type": "conversation.item.create",
        "event_id": "1c2d",
        "item": {
            "id": "9e107d9d372bb6826bd81d3542a419d6",
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Hi"}],
        },
    },
    {"type": "input_audio_buffer.clear", "event_id": "77aa"},
    {"type": "response.create", "event_id": "88bb", "response": {"output_modalities": ["audio"]}},
]


@pytest.mark.trio
@pytest.mark.parametrize("sequence", [LIVEKIT, PIPECAT], ids=["LiveKit", "pipecat"])
async def test_what_foreign_clients_send_is_answered_without_an_error(
    tmp_path: Path, sequence: list[dict[str, Any]]
) -> None:
    async with realtime(tmp_path, "/v1/realtime?model=gpt-realtime") as (on, client):
        await a_reply(on)
        for event in sequence:
            await client.socket.send_message(json.dumps(event))
        done = await client.done()
        assert done["status"] == "completed"
        assert client.heard() == speech_of("Hello there, you.")
        assert "error" not in client.types()
        metadata = sequence[-1]["response"].get("metadata")
        assert done["metadata"] == metadata
        item_id = done["output"][0]["id"]
        await client.say("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=3)
        assert (await client.next())["type"] == "conversation.item.truncated"


@pytest.mark.trio
async def test_what_is_truncated_or_deleted_is_stored_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with realtime(tmp_path) as (on, client):
        await a_reply(on)
        await client.user("Hi")
        item_id = (await client.asked())["output"][0]["id"]
        store = on.daemon.relay.store
        stored: list[None] = []
        commit = store.commit

        async def noted(*changes: Any) -> None:
            await commit(*changes)
            stored.extend([None] if not changes else [])  # one without changes waits for those before it

        monkeypatch.setattr(store, "commit", noted)
        await client.say("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=3)
        await client.next("conversation.item.truncated")
        assert len(stored) == 1
        await client.say("conversation.item.delete", item_id=item_id)
        await client.next("conversation.item.deleted")
        assert len(stored) == 2
