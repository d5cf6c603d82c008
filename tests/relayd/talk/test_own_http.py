"""Talking over HTTP: `/v1/talks`."""

import base64
import gc
import io
import subprocess
import sys
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from relayd.http.audio.encoded_results import MAX_SENDING_BYTES, EncodedAudio
from tests.support.raw_http_client import Visitor, events_of, visitor
from tests.support.relay import daemon, new_token, until
from tests.support.talking import Stage, speech_of, stage

SSE = {"accept": "text/event-stream"}


@asynccontextmanager
async def talking(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Stage, Visitor]]:
    async with stage(tmp_path, **options) as on:
        token = await new_token(on.daemon)
        async with visitor(on.daemon.url, token=token) as http:
            yield on, http


@pytest.mark.trio
async def test_a_conversation_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    async with talking(tmp_path) as (on, http):
        await on.writer()
        await on.speaker()
        begun = await http.ask("POST", "/v1/talks", told={"instructions": "Be brief."})
        assert begun.status == 201
        talk = begun.json
        assert begun.headers["location"] == f"/v1/talks/{talk['id']}"
        assert (await http.get("/v1/talks")).json["talks"] == [talk]
        path = f"/v1/talks/{talk['id']}"
        said = (await http.ask("POST", f"{path}/say", told={"text": "Hello"})).json
        assert (said["text"], said["finish_reason"]) == ("You said: Hello.", "stop")
        assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 5}
        with wave.open(io.BytesIO(base64.b64decode(said["audio"]["data"]))) as audio:
            assert audio.readframes(audio.getnframes()) == speech_of("You said: Hello.")
        assert (await http.get(said["audio"]["url"])).status == 200
        turns = (await http.get(f"{path}/turns")).json["turns"]
        assert [(turn["role"], turn["content"]) for turn in turns] == [
            ("user", "Hello"),
            ("assistant", "You said: Hello."),
        ]
        assert turns[1] == said["turn"]
        shown = (await http.get(path)).json
        assert (shown["turns"], shown["unended"], shown["instructions"]) == (2, 0, "Be brief.")
        assert (await http.ask("DELETE", f"{path}/turns/0")).status == 204
        assert (await http.ask("DELETE", f"{path}/turns/0")).status == 404
        assert (await http.ask("POST", f"{path}/turns", told={"role": "user", "content": "Hi"})).status == 201
        assert [turn["number"] for turn in (await http.get(f"{path}/turns")).json["turns"]] == [1, 2]
        assert (await http.ask("DELETE", path)).status == 204
        assert (await http.get(path)).status == 404
        assert (await http.get("/v1/talks")).json["talks"] == []


@pytest.mark.trio
async def test_a_session_begins_when_something_is_said_in_it(tmp_path: Path) -> None:
    async with talking(tmp_path, talk={"speech": ""}) as (on, http):
        await on.writer()
        said = (await http.ask("POST", "/v1/talks/session-1/say", told={"text": "Hello", "user": "user_6"})).json
        assert (said["audio"], said["speech"], said["turn"]["speech_request"]) == (None, None, None)
        found = (await http.get("/v1/talks?user=user_6")).json["talks"]
        assert [(talk["session"], talk["user"]) for talk in found] == [("session-1", "user_6")]
        assert (await http.get("/v1/talks?user=other")).json["talks"] == []
        assert (await http.get("/v1/talks/session-1")).status == 404, "it is the session of a user"
        assert (await http.get("/v1/talks/session-1?user=user_6")).status == 200
        again = await http.ask("POST", "/v1/talks", told={"session": "session-1", "user": "user_6"})
        assert (again.status, again.json["id"]) == (200, found[0]["id"])


@pytest.mark.trio
async def test_only_known_sessions_if_the_settings_say_so(tmp_path: Path) -> None:
    async with talking(tmp_path, talk={"sessions": "known"}) as (on, http):
        await on.writer()
        await on.speaker()
        unknown = await http.ask("POST", "/v1/talks/session-1/say", told={"text": "Hello"})
        assert (unknown.status, unknown.error["code"]) == (404, "request_not_found")
        assert (await http.ask("POST", "/v1/talks", told={"session": "session-1"})).status == 201
        assert (await http.ask("POST", "/v1/talks/session-1/say", told={"text": "Hello"})).status == 200


@pytest.mark.trio
async def test_events_come_as_the_reply_is_made(tmp_path: Path) -> None:
    go_on = trio.Event()
    async with talking(tmp_path) as (on, http):
        await on.writer(lambda _: ["One. ", go_on, "Two."])
        await on.speaker()
        answer = await http.open("POST", "/v1/talks/s1/say", told={"text": "Count!"}, headers=SSE)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        await answer.until(b"event: mark")
        go_on.set()
        events = events_of(await answer.rest())
        names = [name for name, _, _ in events]
        assert "".join(data["text"] for name, _, data in events if name == "text") == "One. Two."
        pcm = b"".join(base64.b64decode(data["pcm"]) for name, _, data in events if name == "speech")
        assert pcm == speech_of("One. Two.")
        assert names[0] == "text"
        assert names[-2:] == ["speech_ended", "ended"]
        assert events[-1][2]["state"] == "done"
        format_of = next(data for name, _, data in events if name == "speech_started")
        assert format_of == {"encoding": "pcm_s16le", "sample_rate": 24_000, "channels": 1}


@pytest.mark.trio
async def test_what_is_sent_to_a_principal_in_one_piece_is_limited(tmp_path: Path) -> None:
    async with talking(tmp_path) as (on, http):
        await on.writer()
        await on.speaker()
        encoded = on.daemon.http_context.encoded
        with encoded.sending("ann", EncodedAudio(bytes(MAX_SENDING_BYTES), "")):
            refused = await http.ask("POST", "/v1/talks/s1/say", told={"text": "Hello"})
            assert (refused.status, refused.error["code"]) == (429, "rate_limited")
        assert (await http.ask("POST", "/v1/talks/s1/say", told={"text": "Hello"})).json["audio"]
        await until(lambda: encoded.idle)


@pytest.mark.trio
async def test_one_whole_reply_of_a_principal_is_encoded_at_a_time(tmp_path: Path) -> None:
    async with talking(tmp_path) as (on, http):
        await on.writer()
        await on.speaker()
        encoded, answered = on.daemon.http_context.encoded, trio.Event()

        async def say() -> None:
            assert (await http.ask("POST", "/v1/talks/s1/say", told={"text": "Hello"})).json["audio"]
            answered.set()

        async with trio.open_nursery() as nursery, encoded.encoding("ann"):
            nursery.start_soon(say)
            await until(lambda: on.daemon.relay.stats.talk.turns == {"done": 1})
            with trio.move_on_after(0.2):
                await answered.wait()
            assert not answered.is_set()
        await until(lambda: encoded.idle)


@pytest.mark.trio
async def test_what_was_heard_may_be_said_when_nobody_uses_the_conversation_any_more(tmp_path: Path) -> None:
    async with talking(tmp_path) as (on, http):
        await on.writer(lambda _: ["One two three."])
        await on.speaker()
        turn = (await http.ask("POST", "/v1/talks/s1/say", told={"text": "Count!"})).json["turn"]
        await until(lambda: gc.collect() >= 0 and not on.talks.in_use())
        heard = await http.ask("POST", "/v1/talks/s1/heard", told={"number": turn["number"], "samples": 75})
        assert heard.status == 204
        turns = (await http.get("/v1/talks/s1/turns")).json["turns"]
        assert (turns[-1]["heard_chars"], turns[-1]["content"]) == (7, "One two three.")
        assert (await http.ask("DELETE", "/v1/talks/s1")).status == 204
        assert not on.talks.place.spoken


@pytest.mark.trio
async def test_a_reply_goes_on_without_its_client_and_can_be_interrupted_by_another(tmp_path: Path) -> None:
    never = trio.Event()
    async with talking(tmp_path) as (on, http):
        writer = await on.writer(lambda _: ["One two three. ", never])
        await on.speaker()
        async with visitor(on.daemon.url, token=await new_token(on.daemon)) as other:
            answer = await other.open("POST", "/v1/talks/s1/say", told={"text": "Count!"}, headers=SSE)
            await answer.until(b"event: mark")
        await until(lambda: len(on.daemon.http_context.exchanges) == 0)
        assert not writer.cancelled
        turns = (await http.get("/v1/talks/s1/turns")).json["turns"]
        assert (turns[1]["state"], turns[1]["content"]) == ("speaking", "One two three. ")
        assert (await http.ask("POST", "/v1/talks/s1/heard", told={"number": 1, "samples": 80})).status == 204
        interrupted = await http.ask("POST", "/v1/talks/s1/interrupt")
        assert interrupted.json == {"interrupted": True}
        turns = (await http.get("/v1/talks/s1/turns")).json["turns"]
        assert (turns[1]["state"], turns[1]["heard_chars"]) == ("interrupted", 8)
        assert (await http.ask("POST", "/v1/talks/s1/interrupt")).json == {"interrupted": False}


@pytest.mark.trio
async def test_an_interruption_and_what_was_heard_are_stored_before_they_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with talking(tmp_path) as (on, http):
        await on.writer(lambda _: ["One two three. ", trio.Event()])
        await on.speaker()
        async with visitor(on.daemon.url, token=await new_token(on.daemon)) as listening:
            answer = await listening.open("POST", "/v1/talks/s1/say", told={"text": "Count!"}, headers=SSE)
            await answer.until(b"event: mark")
        store = on.daemon.relay.store
        commit = store.commit
        for path, told in (("interrupt", {}), ("heard", {"number": 1, "samples": 80})):
            held, allowed, answered = trio.Event(), trio.Event(), trio.Event()

            async def slow(*changes: Any, held: trio.Event = held, allowed: trio.Event = allowed) -> None:
                held.set()
                await allowed.wait()
                await commit(*changes)

            async def ask(path: str, told: dict[str, Any], answered: trio.Event = answered) -> None:
                assert (await http.ask("POST", f"/v1/talks/s1/{path}", told=told)).status in (200, 204)
                answered.set()

            monkeypatch.setattr(store, "commit", slow)
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, path, told)
                    await held.wait()
                    with trio.move_on_after(0.2):
                        await answered.wait()
                    assert not answered.is_set()
                    allowed.set()
        turns = (await http.get("/v1/talks/s1/turns")).json["turns"]
        assert (turns[1]["state"], turns[1]["heard_chars"]) == ("interrupted", 8)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("told", "field"),
    [
        ({}, "text"),
        ({"text": 3}, "text"),
        ({"text": "x", "interupt": True}, "interupt"),
        ({"text": "x", "params": []}, "params"),
        ({"text": "x", "speak": 1}, "speak"),
        ({"text": "x", "user": "\n"}, "user"),
        ({"text": "x", "instructions": "x" * 4_001}, "instructions"),
    ],
)
async def test_a_field_that_is_wrong_is_named(tmp_path: Path, told: dict[str, Any], field: str) -> None:
    async with talking(tmp_path) as (_, http):
        refused = await http.ask("POST", "/v1/talks/s1/say", told=told)
        assert (refused.status, refused.error["code"]) == (422, "invalid_params")
        assert list(refused.error["details"]) == [field]


@pytest.mark.trio
async def test_a_text_is_too_long_by_its_bytes_in_whatever_it_comes(tmp_path: Path) -> None:
    async with talking(tmp_path) as (_, http):
        await http.ask("POST", "/v1/talks", told={"session": "s1"})
        for path, told in (("say", {"text": "x" * 32_001}), ("turns", {"role": "user", "content": "你" * 10_667})):
            refused = await http.ask("POST", f"/v1/talks/s1/{path}", told=told)
            assert (refused.status, refused.error["code"]) == (413, "input_too_large")


@pytest.mark.trio
async def test_what_nobody_would_keep_is_not_added(tmp_path: Path) -> None:
    async with talking(tmp_path, talk={"history": "none"}) as (_, http):
        await http.ask("POST", "/v1/talks", told={"session": "s1"})
        refused = await http.ask("POST", "/v1/talks/s1/turns", told={"role": "user", "content": "Hi"})
        assert (refused.status, refused.error["code"]) == (403, "forbidden")
        assert "[talk] history" in refused.error["message"]
        assert (await http.get("/v1/talks/s1/turns")).json == {"turns": []}


@pytest.mark.trio
async def test_a_reason_with_half_a_surrogate_pair_is_refused_and_interrupts_nothing(tmp_path: Path) -> None:
    async with talking(tmp_path) as (on, http):
        go_on = trio.Event()
        await on.writer(lambda _: ["One.", go_on])
        await on.speaker()
        async with visitor(on.daemon.url, token=await new_token(on.daemon)) as listening:
            answer = await listening.open("POST", "/v1/talks/s1/say", told={"text": "Count!"}, headers=SSE)
            await answer.until(b"event: mark")
            refused = await http.ask("POST", "/v1/talks/s1/interrupt", told={"reason": "\ud800"})
            assert (refused.status, list(refused.error["details"])) == (422, ["reason"])
            go_on.set()
            assert events_of(await answer.rest())[-1][2]["state"] == "done"


@pytest.mark.trio
async def test_the_relay_may_name_a_session_whatever_the_pattern_for_clients(tmp_path: Path) -> None:
    async with talking(tmp_path, talk={"session_id_pattern": "[0-9]{6}"}) as (on, http):
        await on.writer()
        await on.speaker()
        made = await http.ask("POST", "/v1/talks", told={})
        assert made.status == 201
        for name in (made.json["id"], made.json["session"]):
            assert (await http.ask("POST", f"/v1/talks/{name}/say", told={"text": "Hello"})).status == 200
        assert (await http.ask("POST", "/v1/talks", told={"session": "talk-1"})).status == 422


@pytest.mark.trio
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_what_fails_has_its_status_or_its_event(tmp_path: Path, accept: str) -> None:
    async with talking(tmp_path, http={"no_worker_wait_s": 0.05}) as (_, http):
        answer = await http.ask("POST", "/v1/talks/s1/say", told={"text": "Hello"}, headers={"accept": accept})
        if accept == "application/json":
            assert (answer.status, answer.error["code"]) == (503, "no_worker")
        else:
            assert events_of(answer.body)[-1][0] == "failed"
            assert events_of(answer.body)[-1][2]["code"] == "no_worker"
        refused = await http.ask("POST", "/v1/talks/bare/say", told={"text": "Hello"})
        assert (refused.status, list(refused.error["details"])) == (422, ["session"])


@pytest.mark.trio
async def test_who_may_not_is_refused(tmp_path: Path) -> None:
    async with talking(tmp_path) as (on, http):
        anns = (await http.ask("POST", "/v1/talks", told={"session": "s1"})).json
        async with visitor(on.daemon.url, token=await new_token(on.daemon, name="bob")) as other:
            for path in (anns["id"], "s1"):
                assert (await other.get(f"/v1/talks/{path}/turns")).status in (404, 422)
            assert (await other.get("/v1/talks")).json["talks"] == []
        readonly = await new_token(on.daemon, name="eve", readonly=True)
        async with visitor(on.daemon.url, token=readonly) as other:
            for told in ({"session": "s1"}, {"session": "s2"}):
                assert (await other.ask("POST", "/v1/talks", told=told)).status == 403
        async with visitor(on.daemon.urls[0]) as stranger:
            stranger.headers["authorization"] = "Bearer wrong"
            assert (await stranger.get("/v1/talks")).status == 401


def test_without_the_table_nothing_of_them_is_imported() -> None:
    look = "import sys, relayd.daemon; sys.exit(any(name.startswith('relayd.talk') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", look], check=False, timeout=60).returncode == 0


@pytest.mark.trio
async def test_without_the_table_there_are_no_conversations(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        assert (await http.get("/v1/talks")).status == 404
        assert relay.http_context.talks is None
