"""OpenAI's Realtime API with a microphone: what is said is heard, understood and answered."""

import base64
import math
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from relayd.talk import microphone as stretches
from tests.relayd.talk.realtime_client import RealtimeClient, client_of, realtime
from tests.support.relay import until
from tests.support.talking import Listener, Stage

RATE = 24_000
EARS: dict[str, Any] = {"talk": {"transcribe": "stt"}, "spaces": {"stt": {"max_workers": 2}}}
MANUAL = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}


def tone(seconds: float) -> bytes:
    step = 2 * math.pi * 440 / RATE
    return array("h", (round(8_000 * math.sin(step * at)) for at in range(round(seconds * RATE)))).tobytes()


def silence(seconds: float) -> bytes:
    return bytes(2 * round(seconds * RATE))


async def speak(client: RealtimeClient, pcm: bytes, step: int = 4_800) -> None:
    for start in range(0, len(pcm), step):
        audio = base64.b64encode(pcm[start : start + step]).decode()
        await client.say("input_audio_buffer.append", audio=audio)


@asynccontextmanager
async def microphone(
    tmp_path: Path, *texts: str, answer: str = "Hello there.", **options: Any
) -> AsyncIterator[tuple[Stage, RealtimeClient, Listener]]:
    async with realtime(tmp_path, **(EARS | options)) as (on, client):
        await on.writer(lambda _messages: [answer])
        await on.speaker()
        yield on, client, await on.listener(*texts)


@pytest.mark.trio
async def test_what_is_said_is_heard_understood_and_answered_by_itself(tmp_path: Path) -> None:
    async with microphone(tmp_path, "Good morning.") as (_, client, listener):
        given = client.got[0]["session"]["audio"]["input"]
        assert given["turn_detection"]["type"] == "server_vad"
        assert given["transcription"]["model"] == "stt"
        await speak(client, silence(1) + tone(1) + silence(1))
        done = await client.done()
        assert done["status"] == "completed"
        assert done["output"][0]["content"][0]["transcript"] == "Hello there."
        said = [event for event in client.got[1:] if not event["type"].startswith("response.")]
        assert [event["type"] for event in said[:7]] == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.input_audio_transcription.delta",
            "conversation.item.input_audio_transcription.completed",
            "conversation.item.done",
        ]
        began, ended, _, added, delta, completed, whole = said[:7]
        assert began["audio_start_ms"] == pytest.approx(700, abs=30)
        assert ended["audio_end_ms"] == pytest.approx(2_500, abs=30)
        assert added["item"]["content"] == [{"type": "input_audio", "transcript": None}]
        assert delta["delta"] == completed["transcript"] == "Good morning."
        assert completed["usage"]["seconds"] == pytest.approx(1.8, abs=0.05)
        assert whole["item"]["content"] == [{"type": "input_audio", "transcript": "Good morning."}]
        assert len({event.get("item_id", event.get("item", {}).get("id")) for event in said[:7]}) == 1
        assert listener.assigns[0].params == {
            "turn_detection": "server_vad", "threshold": 0.5, "prefix_ms": 300, "silence_ms": 500,
        }  # fmt: skip


@pytest.mark.trio
async def test_who_speaks_interrupts_the_reply_and_the_model_is_told_both(tmp_path: Path) -> None:
    async with realtime(tmp_path, **EARS) as (on, client):
        endless = trio.Event()
        writer = await on.writer(
            lambda messages: ["One two."] if len(messages) > 1 else ["Once upon a time. ", endless]
        )
        await on.speaker()
        await on.listener("Tell me a story.", "Stop.")
        await speak(client, tone(0.5) + silence(0.7))
        await client.next("response.output_audio.delta")
        await speak(client, tone(0.5))
        await client.next("input_audio_buffer.speech_started")
        done = await client.done()
        assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "turn_detected")
        await speak(client, silence(0.7))
        assert (await client.done())["output"][0]["content"][0]["transcript"] == "One two."
        assert [message["content"] for message in writer.prompts[-1]] == [
            "Tell me a story.",
            "Once upon a time.",
            "Stop.",
        ]


@pytest.mark.trio
async def test_a_client_that_says_itself_when_it_has_spoken(tmp_path: Path) -> None:
    async with microphone(tmp_path, "Good morning.", "And now?") as (_, client, listener):
        await client.say("session.update", session=MANUAL)
        updated = (await client.next("session.updated"))["session"]
        assert updated["audio"]["input"]["turn_detection"] is None
        await speak(client, silence(0.3) + tone(0.5))
        await client.say("input_audio_buffer.commit")
        await client.say("response.create")  # before it is understood
        assert (await client.done())["status"] == "completed"
        types = client.types()
        assert types.index("conversation.item.input_audio_transcription.completed") < types.index("response.created")
        assert "input_audio_buffer.speech_started" not in types
        assert listener.assigns[0].params == {"turn_detection": "none"}
        await speak(client, tone(0.5))
        await client.say("input_audio_buffer.commit")
        await client.next("conversation.item.done")
        committed = [event for event in client.got if event["type"] == "input_audio_buffer.committed"]
        assert committed[1]["previous_item_id"] not in (None, committed[0]["item_id"])
        with trio.move_on_after(0.2):  # nothing is answered that was not asked for
            await client.next("response.created")
            raise AssertionError


@pytest.mark.trio
async def test_what_is_cleared_was_never_said(tmp_path: Path) -> None:
    async with microphone(tmp_path, "Second.") as (_, client, listener):
        await client.say("session.update", session=MANUAL)
        await speak(client, tone(0.5))
        await until(lambda: bool(listener.assigns))
        await client.say("input_audio_buffer.clear")
        await client.next("input_audio_buffer.cleared")
        await client.say("input_audio_buffer.commit")
        assert (await client.fault())["code"] == "input_audio_buffer_commit_empty"
        await until(lambda: len(listener.cancelled) == 1)
        await speak(client, tone(0.5))
        await client.say("input_audio_buffer.commit")
        assert (await client.next("conversation.item.done"))["item"]["content"][0]["transcript"] == "Second."
        assert len(listener.assigns) == 2


@pytest.mark.trio
async def test_what_nobody_understands_is_no_item_and_is_not_answered(tmp_path: Path) -> None:
    async with microphone(tmp_path, "", "Hello.") as (_, client, _listener):
        await speak(client, tone(0.5) + silence(0.7))
        completed = await client.next("conversation.item.input_audio_transcription.completed")
        assert completed["transcript"] == ""
        assert (await client.next())["type"] == "conversation.item.deleted"
        await speak(client, tone(0.5) + silence(0.7))
        assert (await client.done())["status"] == "completed"
        assert [event["type"] for event in client.got].count("response.done") == 1


@pytest.mark.trio
async def test_an_engine_that_fails_costs_one_item_and_the_next_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "REST_S", 0.0)
    async with microphone(tmp_path, "Hello.") as (_, client, listener):
        listener.fails_with = "input_mismatch"
        await speak(client, tone(0.5) + silence(0.7))
        failed = await client.next("conversation.item.input_audio_transcription.failed")
        assert failed["error"] == {
            "type": "invalid_request_error", "code": "input_mismatch", "message": "as the test says", "param": None,
        }  # fmt: skip
        assert (await client.next())["type"] == "conversation.item.deleted"
        listener.fails_with = None
        await speak(client, tone(0.5) + silence(0.7))
        assert (await client.done())["status"] == "completed"


@pytest.mark.trio
async def test_without_a_worker_that_hears_the_client_is_told_once_a_second(tmp_path: Path) -> None:
    async with realtime(tmp_path, **EARS, http={"no_worker_wait_s": 0.1}) as (on, client):
        await speak(client, tone(0.5))
        fault = await client.fault()
        assert (fault["code"], fault["type"]) == ("no_worker", "server_error")
        assert "'stt'" in fault["message"]
        await speak(client, tone(0.5))  # in its rest
        await client.say("input_audio_buffer.commit")
        assert (await client.fault())["code"] == "input_audio_buffer_commit_empty"
        assert len(on.daemon.relay.requests) == 1


@pytest.mark.trio
async def test_a_space_that_is_not_there_or_hears_nothing_is_told(tmp_path: Path) -> None:
    async with realtime(tmp_path, talk={"transcribe": "nobody"}) as (_, client):
        await speak(client, tone(0.1))
        assert (await client.fault())["code"] == "space_not_found"
    async with realtime(tmp_path) as (_, client):
        assert client.got[0]["session"]["audio"]["input"]["turn_detection"] is None
        for kind in ("append", "commit"):
            await client.say(f"input_audio_buffer.{kind}", audio="")
            fault = await client.fault()
            assert (fault["code"], "[talk] transcribe" in fault["message"]) == ("unsupported", True)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("event", "code", "what"),
    [
        ({"type": "input_audio_buffer.append"}, "missing_required_parameter", "audio is required"),
        ({"type": "input_audio_buffer.append", "audio": "?"}, "invalid_value", "audio must be base64"),
        ({"type": "input_audio_buffer.append", "audio": "AAA="}, None, ""),
        ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "invalid_value", "whole samples"),
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty", "commit at least 100 ms"),
        ({"audio": {"input": {"format": {"type": "audio/pcmu"}}}}, "unsupported", "audio.input.format"),
        ({"input_audio_format": "g711_ulaw"}, "unsupported", "input_audio_format"),
        ({"turn_detection": {"type": "loud"}}, "invalid_value", "turn_detection.type"),
        ({"turn_detection": {"threshold": 2}}, "invalid_value", "turn_detection.threshold"),
        ({"audio": {"input": {"turn_detection": {"silence_duration_ms": 1}}}}, "invalid_value", "silence_duration_ms"),
        ({"audio": {"input": {"transcription": {"language": 5}}}}, "invalid_value", "transcription.language"),
    ],
)
async def test_what_is_wrong_is_said_and_the_session_stays(
    tmp_path: Path, event: dict[str, Any], code: str | None, what: str
) -> None:
    async with microphone(tmp_path, "Hello.") as (_, client, _listener):
        kind = event.get("type", "session.update")
        fields = {name: value for name, value in event.items() if name != "type"}
        await client.say(kind, **(fields if "type" in event else {"session": fields}))
        if code is not None:
            fault = await client.fault()
            assert (fault["code"], fault["event_id"]) == (code, "mine")
            assert what in fault["message"]
        await speak(client, tone(0.5) + silence(0.7))
        assert (await client.done())["status"] == "completed"


@pytest.mark.trio
async def test_what_a_client_sets_is_what_the_space_is_told(tmp_path: Path) -> None:
    async with microphone(tmp_path, "Ja.", "Ja.", "Ja.") as (_, client, listener):
        detection = {"type": "server_vad", "threshold": 0.7, "silence_duration_ms": 300, "create_response": False}
        heard = {"turn_detection": detection, "transcription": {"model": "whisper-1", "language": "de", "prompt": "Ja"}}
        await client.say("session.update", session={"audio": {"input": heard}})
        given = (await client.next("session.updated"))["session"]["audio"]["input"]
        assert given["turn_detection"]["threshold"] == 0.7
        assert given["transcription"] == {"model": "stt", "language": "de", "prompt": "Ja"}
        await speak(client, tone(0.5) + silence(0.4))
        await client.next("conversation.item.done")
        assert listener.assigns[0].params == {
            "turn_detection": "server_vad", "threshold": 0.7, "prefix_ms": 300, "silence_ms": 300,
            "language": "de", "prompt": "Ja",
        }  # fmt: skip
        # LiveKit's plugin asks for this; it is answered as what it is here.
        await client.say("session.update", session={"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}})
        given = (await client.next("session.updated"))["session"]["audio"]["input"]
        assert given["turn_detection"]["type"] == "server_vad"
        await client.say("session.update", session={"audio": {"input": {"transcription": None}}})
        assert (await client.next("session.updated"))["session"]["audio"]["input"]["transcription"] is None
        client.got.clear()
        await speak(client, tone(0.5) + silence(0.7))
        await client.next("conversation.item.done")
        assert not [kind for kind in client.types() if "transcription" in kind]


@pytest.mark.trio
async def test_a_reply_that_is_not_to_be_interrupted_is_finished_first(tmp_path: Path) -> None:
    async with realtime(tmp_path, **EARS) as (on, client):
        gate = trio.Event()
        await on.writer(lambda messages: ["Second."] if len(messages) > 1 else ["First.", gate])
        await on.speaker()
        await on.listener("One.", "Two.")
        detection = {"type": "server_vad", "interrupt_response": False}
        await client.say("session.update", session={"audio": {"input": {"turn_detection": detection}}})
        await speak(client, tone(0.5) + silence(0.7))
        await client.next("response.output_audio.delta")
        await speak(client, tone(0.5) + silence(0.7))
        await client.next("conversation.item.input_audio_transcription.completed")
        gate.set()
        said = [(await client.done())["output"][0]["content"][0]["transcript"] for _ in range(2)]
        assert said == ["First.", "Second."]


@pytest.mark.trio
async def test_a_long_session_is_many_requests_whose_times_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "STRETCH_S", 1.0)
    texts = ["One.", "Two.", "Three."]
    async with microphone(tmp_path, *texts) as (_, client, listener):
        await client.say("session.update", session={"audio": {"input": {"turn_detection": {"create_response": False}}}})
        for text in texts:
            await speak(client, silence(0.5) + tone(0.5))
            await client.next("input_audio_buffer.speech_started")
            await speak(client, silence(0.7))
            done = await client.next("conversation.item.done")
            assert done["item"]["content"][0]["transcript"] == text
        assert len(listener.assigns) == 3
        starts = [event["audio_start_ms"] for event in client.got if event["type"].endswith("speech_started")]
        assert starts == pytest.approx([200, 1_900, 3_600], abs=31)


@pytest.mark.trio
async def test_what_is_said_is_told_once_although_the_worker_is_lost(tmp_path: Path) -> None:
    async with microphone(tmp_path, "One.", limits={"worker_grace_s": 0.2}) as (on, client, first):
        await client.say("session.update", session={"audio": {"input": {"turn_detection": {"create_response": False}}}})
        await speak(client, tone(0.5) + silence(0.7))
        await client.next("conversation.item.done")
        second = await on.listener("One again.", "Two.")
        first.gone.set()
        await speak(client, tone(0.5) + silence(0.7))
        done = await client.next("conversation.item.done")
        assert done["item"]["content"][0]["transcript"] == "Two."
        assert [assign.attempt for assign in second.assigns] == [2]
        assert [event["type"] for event in client.got].count("input_audio_buffer.speech_started") == 2


@pytest.mark.trio
async def test_who_leaves_is_not_heard_any_more(tmp_path: Path) -> None:
    async with microphone(tmp_path, "Hello.") as (on, client, listener):
        await speak(client, tone(0.5))
        await client.next("input_audio_buffer.speech_started")
        await client.socket.aclose()
        await until(lambda: len(listener.cancelled) == 1)
        await until(lambda: all(not request.live for request in on.daemon.relay.requests.values()))


@pytest.mark.trio
async def test_a_text_that_is_added_while_speech_is_understood_comes_behind_it(tmp_path: Path) -> None:
    async with microphone(tmp_path, "Spoken.") as (_, client, listener):
        listener.ponders = trio.Event()
        await client.say("session.update", session=MANUAL)
        await speak(client, tone(0.5))
        await client.say("input_audio_buffer.commit")
        await client.next("input_audio_buffer.committed")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.user, "Written.")
            await until(lambda: len(listener.assigns) == 1)
            listener.ponders.set()
        await client.asked()
        texts = [event["item"]["content"][0] for event in client.got if event["type"] == "conversation.item.done"]
        assert [part.get("transcript") or part.get("text") for part in texts][:2] == ["Spoken.", "Written."]


@pytest.mark.trio
async def test_the_beta_has_its_own_names(tmp_path: Path) -> None:
    header: dict[str, Any] = {"headers": {"OpenAI-Beta": "realtime=v1"}}
    async with microphone(tmp_path, "Hello.") as (on, _, _listener), client_of(on, **header) as client:
        created = (await client.next("session.created"))["session"]
        assert created["turn_detection"]["type"] == "server_vad"
        session = {"turn_detection": None, "input_audio_transcription": {"model": "whisper-1"}}
        await client.say("session.update", session=session)
        assert (await client.next("session.updated"))["session"]["turn_detection"] is None
        await speak(client, tone(0.5))
        await client.say("input_audio_buffer.commit")
        added = await client.next("conversation.item.created")
        assert added["item"]["content"] == [{"type": "input_audio", "transcript": None}]
        completed = await client.next("conversation.item.input_audio_transcription.completed")
        assert completed["transcript"] == "Hello."


@pytest.mark.trio
async def test_a_client_that_is_silent_for_long_is_heard_again(tmp_path: Path) -> None:
    spaces = {"stt": {"run_timeout_s": 1.0}}
    async with microphone(tmp_path, "One.", "Two.", spaces=spaces) as (on, client, listener):
        await client.say("session.update", session={"audio": {"input": {"turn_detection": {"create_response": False}}}})
        for text in ("One.", "Two."):
            await speak(client, tone(0.3) + silence(0.7))
            assert (await client.next("conversation.item.done"))["item"]["content"][0]["transcript"] == text
            await until(lambda: all(not request.live for request in on.daemon.relay.requests.values()))
        assert len(listener.assigns) == 2
        assert "error" not in client.types()


@pytest.mark.trio
async def test_a_microphone_that_is_muted_gives_back_its_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "MUTED_S", 0.3)
    async with microphone(tmp_path, "One.", "Two.") as (on, client, listener):
        await client.say("session.update", session={"audio": {"input": {"turn_detection": {"create_response": False}}}})
        for text in ("One.", "Two."):
            await speak(client, tone(0.3) + silence(0.7))
            assert (await client.next("conversation.item.done"))["item"]["content"][0]["transcript"] == text
            await until(lambda: all(str(each.entry.state) == "completed" for each in on.daemon.relay.requests.values()))
        assert len(listener.assigns) == 2


@pytest.mark.trio
async def test_who_is_muted_in_mid_speech_has_said_what_was_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "MUTED_SPEECH_S", 0.3)
    async with microphone(tmp_path, "Half of it.") as (_, client, _listener):
        await speak(client, tone(0.5))
        assert (await client.done())["status"] == "completed"
        assert "input_audio_buffer.speech_stopped" in client.types()


@pytest.mark.trio
async def test_a_worker_that_tells_nonsense_costs_nothing_but_what_it_heard(tmp_path: Path) -> None:
    async with microphone(tmp_path, "Not told.", "Hello.") as (_, client, listener):
        nonsense = [
            {"speech_stopped": {"sample": 5}},
            {"utterance": {"start": 0, "end": 9}},
            {"speech_started": {"sample": 10}},
            {"speech_started": {"sample": "?"}},
            {"speech_stopped": {"sample": 20}},
            {"speech_stopped": {"sample": 21}},
            {"speech_started": {"sample": 30}},
            {"utterance": {"start": 10, "end": 20}},
            {"utterance": None},
        ]
        listener.nonsense = nonsense
        await speak(client, tone(0.2))
        completed = await client.next("conversation.item.input_audio_transcription.completed")
        assert completed["transcript"] == ""
        listener.nonsense = []
        await client.user("Written.")  # which waits for all that was said
        await client.say(
            "session.update", session={"audio": {"input": {"turn_detection": {"silence_duration_ms": 600}}}}
        )
        await speak(client, tone(0.5) + silence(0.7))
        assert (await client.done())["status"] == "completed"
