"""The GPU server's protocol: what its guide says, literally, and what a client may do wrong."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from relayd.auth.tokens import Principal
from tests.relayd.http.sample_handlers import make_token
from tests.relayd.http.sample_sockets import closing, denial, socket_to
from tests.support.gpu_client import GOOD, GpuClient, gpu_client, pcm_of, without
from tests.support.raw_http_client import visitor
from tests.support.relay import kept_logs, until
from tests.support.talking import Stage, Writer, fill, speech_of, stage

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


@asynccontextmanager
async def serving(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Stage, Writer]]:
    """A daemon with both workers, on the main port and a door of its own."""
    talk = {"listen": "127.0.0.1:0", "avatar": "avatar_tutor_13"} | options.pop("talk", {})
    async with stage(tmp_path, listen="127.0.0.1:0", talk=talk, **options) as on:
        writer, _ = await on.writer(), await on.speaker()
        yield on, writer


def numbers(messages: list[dict[str, str]]) -> list[str]:
    """Answer with all that the session was told."""
    return [" ".join(message["content"] for message in messages if message["role"] == "user")]


@pytest.mark.trio
async def test_health_is_that_of_the_gpu_server_on_its_own_door(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _):
        (door,) = on.daemon.started.door_urls
        async with visitor(door) as http:
            told = await http.get("/health")
            assert told.body == b'{"status": "healthy", "service": "GPU Server WebSocket API", "active_connections": 0}'
            assert told.headers["content-type"] == "application/json"
            async with gpu_client(on, url=door), gpu_client(on, "test_session_123", path="/ws"):
                await until(lambda: on.daemon.relay.stats.talk.websockets == {"gpu_server": 2})
                assert (await http.get("/health")).json["active_connections"] == 2
            await until(lambda: on.daemon.relay.stats.talk.websockets == {"gpu_server": 0})
            assert (await http.get("/v1/spaces")).status == 404
            refused = await denial(door, "/")
            assert refused[0] == 404
        async with visitor(on.daemon.urls[0]) as http:
            assert (await http.get("/health")).json["service"] == "relayd"


@pytest.mark.trio
@pytest.mark.parametrize("path", ["/ws", "/ws/ws"])
async def test_a_message_has_one_answer_with_text_and_audio(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as (on, _):
        for url in (on.daemon.urls[0], on.daemon.started.door_urls[0]):
            async with gpu_client(on, path=path, url=url) as client:
                answer = await client.ask(GOOD | {"content": "你好"})
                assert list(answer) == ["type", "content", "audio", "role", "timestamp"]
                told = (answer["type"], answer["content"], answer["role"])
                assert told == ("text", "You said: 你好.", "assistant")
                assert TIME.fullmatch(answer["timestamp"])
                assert pcm_of(answer) == speech_of("You said: 你好.")
                assert await client.error("{}") == "type is required", "nothing else came"


@pytest.mark.trio
@pytest.mark.parametrize("path", ["/ws", "/ws/ws"])
async def test_the_connection_of_a_session_needs_no_further_ids(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as (on, writer):
        async with gpu_client(on, "session_abc123", path=path) as client:
            answer = await client.ask({"type": "text", "content": "First"})
            assert (answer["type"], answer["content"]) == ("text", "You said: First.")
            assert (await client.ask(GOOD | {"engine_session_id": "session_abc123"}))["type"] == "text"
            assert (await client.ask(without("engine_session_id")))["type"] == "text"
            assert await client.error(without("user_id", "engine_session_id")) == (
                "user_id is required for WebRTC streaming"
            )
            assert await client.error(GOOD) == "Invalid engine_session_id: uuid-session-1"
        async with gpu_client(on, "session_abc123", path=path) as client:
            await client.ask({"type": "text", "content": "Last"})
        said = [message["content"] for message in writer.prompts[-1] if message["role"] == "user"]
        assert said == ["First", "Hello", "Hello", "Last"]


@pytest.mark.trio
async def test_the_errors_of_the_guide_are_told_word_for_word_and_the_connection_stays(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _), gpu_client(on) as client:
        for message, content in (
            (without("engine_session_id"), "engine_session_id is required in user-based mode"),
            (without("user_id"), "user_id is required for WebRTC streaming"),
            (without("avatar_id"), "avatar_id is required for WebRTC streaming"),
            (GOOD | {"engine_session_id": "invalid-session-id"}, "Invalid engine_session_id: invalid-session-id"),
        ):
            await client.send(message)
            answer = await client.answer()
            assert list(answer) == ["type", "content", "timestamp"]
            assert (answer["type"], answer["content"]) == ("error", content)
            assert TIME.fullmatch(answer["timestamp"])
        assert (await client.ask(GOOD))["type"] == "text"


@pytest.mark.trio
async def test_what_is_missing_is_named_in_the_order_of_the_guide(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _), gpu_client(on) as client:
        session = {"engine_session_id": "invalid-session-id"}
        told = {"type": "text_webrtc"}
        for more, content in (
            ({}, "engine_session_id is required in user-based mode"),
            (session, "user_id is required for WebRTC streaming"),
            ({"user_id": "6"}, "avatar_id is required for WebRTC streaming"),
            ({"avatar_id": "a"}, "content is required"),
            ({"content": "Hello"}, "Invalid engine_session_id: invalid-session-id"),
            ({"engine_session_id": "id-7"}, None),
        ):
            told |= more
            answer = await client.ask(dict(reversed(told.items())))
            assert (answer["content"] if answer["type"] == "error" else None) == content


@pytest.mark.trio
async def test_what_a_client_sends_wrong_is_named_and_the_connection_stays(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _), gpu_client(on) as client:
        for sent, content in (
            ("{", "the message is not a JSON object: "),
            ("[" * 500_000, "the message is not a JSON object: it is nested too deeply"),
            ('"text"', "the message is not a JSON object: it is not an object"),
            (b"\0" * 100, "binary messages are not supported; send JSON as text"),
            ("{}", "type is required"),
            ({"type": "x" * 900_000}, f"Unknown type: {'x' * 128}…; known: text, text_webrtc, "),
            ({"type": ["text"]}, "Unknown type: an array; known: "),
            (GOOD | {"content": "x" * 1_000_000}, "the text has 1000000 bytes; a turn may have 32000: say it in parts"),
            (GOOD | {"content": " "}, "the text is empty; say something"),
            (GOOD | {"content": 5}, "content must be text"),
            (GOOD | {"content": "\ud800"}, "the text has half a surrogate pair; send whole characters"),
            (GOOD | {"user_id": 7}, "user_id 7 is not that of this connection (user_6)"),
            (GOOD | {"user_id": "06"}, "user_id 06 is not that of this connection (user_6)"),
            (GOOD | {"user_id": True}, "user_id must be a number or text"),
            (GOOD | {"user_id": {}}, "user_id must be a number or text"),
            (GOOD | {"avatar_id": 13}, "avatar_id must be text of at most 128 characters"),
            (GOOD | {"avatar_id": "a" * 129}, "avatar_id must be text of at most 128 characters"),
            (GOOD | {"engine_session_id": 5}, "Invalid engine_session_id: 5"),
            (GOOD | {"engine_session_id": "a/5"}, "Invalid engine_session_id: a/5"),
            (GOOD | {"engine_session_id": "\ud8005"}, "Invalid engine_session_id: ?5"),
            (GOOD | {"engine_session_id": "5" * 129}, f"Invalid engine_session_id: {'5' * 128}…"),
            ({"type": "interrupt"}, "engine_session_id is required in user-based mode"),
            ({"type": "interrupt", "engine_session_id": "never-1"}, "Invalid engine_session_id: never-1"),
        ):
            assert (await client.error(sent)).startswith(content)
        assert (await client.ask(GOOD | {"user_id": "6"}))["type"] == "text"


@pytest.mark.trio
async def test_calls_are_refused_in_words_and_candidates_are_not_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _), gpu_client(on) as client:
        offer = {"type": "webrtc_offer", "sdp": "v=0...", "user_id": 6, "avatar_id": "avatar_tutor_13"}
        assert await client.error(offer) == (
            "WebRTC calls are not supported by this server; text_webrtc is answered with text and audio all the same"
        )
        assert await client.error(offer | {"user_id": None}) == "user_id is required for WebRTC streaming"
        assert await client.error(offer | {"avatar_id": ""}) == "avatar_id is required for WebRTC streaming"
        assert await client.error(offer | {"sdp": 5}) == "sdp is required"
        candidate = {"candidate": "candidate:...", "sdpMLineIndex": 0, "sdpMid": "0"}
        await client.send({"type": "webrtc_ice_candidate", "candidate": candidate, "user_id": 6})
        assert (await client.ask(GOOD))["type"] == "text", "the first answer"


@pytest.mark.trio
async def test_ten_messages_over_five_sessions_at_once_are_all_answered(tmp_path: Path) -> None:
    with kept_logs() as logs:
        async with serving(tmp_path) as (on, writer), gpu_client(on) as client:
            writer.answer = numbers
            for turn in ("Number", "Again"):
                for session in range(5):
                    ids = {"engine_session_id": f"uuid-session-{session}", "message_id": f"{session} {turn}"}
                    await client.send(GOOD | ids | {"content": f"{turn} {session}."})
            answers = [await client.answer() for _ in range(10)]
            assert {answer["message_id"]: answer["content"] for answer in answers} == {
                f"{session} {turn}": content
                for session in range(5)
                for turn, content in (
                    ("Number", f"Number {session}."),
                    ("Again", f"Number {session}. Again {session}."),
                )
            }
            assert all(pcm_of(answer) == speech_of(answer["content"]) for answer in answers)
            assert on.daemon.relay.stats.talk.websockets == {"gpu_server": 1}
        contexts = [line["engine_session_id"] for line in logs if line["event"] == "Created session context for"]
        assert sorted(contexts) == [f"uuid-session-{session}" for session in range(5)]


@pytest.mark.trio
async def test_two_principals_with_one_user_and_one_session_hear_nothing_of_each_other(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, writer):
        writer.answer = numbers
        ann, bob = make_token(on.daemon, "ann"), make_token(on.daemon, "bob")
        async with gpu_client(on, token=ann) as first, gpu_client(on, token=bob) as second:
            assert (await first.ask(GOOD | {"content": "I am Ann."}))["content"] == "I am Ann."
            assert (await second.ask(GOOD | {"content": "Who?"}))["content"] == "Who?"
            assert (await first.ask(GOOD | {"content": "Me?"}))["content"] == "I am Ann. Me?"
        async with gpu_client(on, "user_7", token=ann) as other:
            assert (await other.ask(GOOD | {"content": "Who?", "user_id": 7}))["content"] == "Who?"
        async with gpu_client(on, "uuid-session-1", token=ann) as other:
            assert (await other.ask({"type": "text", "content": "Who?"}))["content"] == "Who?"


@pytest.mark.trio
async def test_a_session_goes_on_after_the_relay_was_killed(tmp_path: Path) -> None:
    for content, known in (("One.", "One."), ("Two.", "One. Two.")):
        async with serving(tmp_path) as (on, writer), gpu_client(on) as client:
            writer.answer = numbers
            assert (await client.ask(GOOD | {"content": content}))["content"] == known


@pytest.mark.trio
async def test_whoever_may_not_connect_is_told_403_before_the_handshake(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, _):
        token, door = make_token(on.daemon), on.daemon.started.door_urls[0]
        expired = make_token(on.daemon, "bob", expires_at=1.0)
        worker = on.daemon.tokens.create(role="worker", name="w", now=0.0).text
        for url in (on.daemon.urls[0], door):
            for path in (
                "/ws/user_6",
                "/ws/ws/user_6?token=",
                "/ws/ws/user_6?token=wrong",
                f"/ws/ws/user_6?token={expired}",
                f"/ws/ws/user_6?token={worker}",
                f"/ws/ws/user_{'x' * 129}?token={token}",
                f"/ws/ws/user_%0A?token={token}",
                f"/ws/no-digit?token={token}",
                f"/ws/ws/no%20id%205?token={token}",
            ):
                status, body = await denial(url, path)
                assert (status, bool(json.loads(body)["error"]["message"])) == (403, True), path
            assert (await denial(url, "/ws/ws/user_6", "rly_c_wrong"))[0] == 403
        assert on.daemon.relay.stats.talk.websockets == {}


@pytest.mark.trio
async def test_a_token_in_the_header_is_as_good(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as (on, _),
        socket_to(on.daemon.urls[0], "/ws/ws/user_6", make_token(on.daemon)) as socket,
    ):
        assert (await GpuClient(socket).ask(GOOD))["type"] == "text"


@pytest.mark.trio
async def test_only_sessions_that_a_backend_has_created_where_the_settings_say_so(tmp_path: Path) -> None:
    async with serving(tmp_path, talk={"sessions": "known"}) as (on, _):
        ann = Principal(name="ann", role="client")
        token, other = make_token(on.daemon), make_token(on.daemon, "bob")
        assert (await denial(on.daemon.urls[0], f"/ws/test_session_123?token={token}"))[0] == 403
        await on.open("test_session_123", ann)
        await on.open("uuid-session-1", ann, user="6")
        assert (await denial(on.daemon.urls[0], f"/ws/test_session_123?token={other}"))[0] == 403
        async with gpu_client(on, "test_session_123", token=token) as client:
            assert (await client.ask({"type": "text", "content": "Hello"}))["type"] == "text"
        async with gpu_client(on, token=token) as client:
            assert (await client.ask(GOOD))["type"] == "text"
            assert await client.error(GOOD | {"engine_session_id": "uuid-2"}) == "Invalid engine_session_id: uuid-2"
        async with gpu_client(on, token=other) as client:
            assert await client.error(GOOD) == "Invalid engine_session_id: uuid-session-1"


@pytest.mark.trio
async def test_an_interrupted_reply_is_answered_and_what_waits_behind_it_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, writer), gpu_client(on) as client:
        never = trio.Event()
        writer.answer = lambda said: ["This takes long. ", never] if said[-1]["content"] == "Hello" else numbers(said)
        await client.send(GOOD | {"message_id": 1})
        await client.send(GOOD | {"message_id": 2, "content": "Next"})
        session = (await on.open("uuid-session-1", user="6")).session
        await until(lambda: session.conversation.making is not None and session.conversation.making.samples > 0)
        interrupted = await client.ask({"type": "interrupt", "engine_session_id": "uuid-session-1", "message_id": 3})
        assert (interrupted["type"], interrupted["interrupted"], interrupted["message_id"]) == ("interrupted", True, 3)
        first, second = await client.answer(), await client.answer()
        assert (first["message_id"], first["content"], first["audio"], first["interrupted"]) == (1, "", "", True)
        assert (second["message_id"], second["content"]) == (2, "Hello\n\nNext"), "nothing was heard of the first"
        again = await client.ask({"type": "interrupt", "engine_session_id": "uuid-session-1"})
        assert again["interrupted"] is False


@pytest.mark.trio
async def test_an_interruption_that_cannot_be_stored_is_not_told_to_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as (on, writer), gpu_client(on) as client:
        writer.answer = lambda _: ["This takes long. ", trio.Event()]
        await client.send(GOOD | {"message_id": 1})
        session = (await on.open("uuid-session-1", user="6")).session
        await until(lambda: session.conversation.making is not None and session.conversation.making.samples > 0)
        fill(on, monkeypatch, "assistant", "interrupted")
        await client.send({"type": "interrupt", "engine_session_id": "uuid-session-1", "message_id": 2})
        answers = {answer["message_id"]: answer for answer in [await client.answer(), await client.answer()]}
        assert (answers[1]["type"], answers[2]["interrupted"]) == ("error", False)


@pytest.mark.trio
async def test_a_proxy_speaks_for_any_user_and_nobody_else_does(tmp_path: Path) -> None:
    async with serving(tmp_path, talk={"proxies": ["backend"]}) as (on, writer):
        writer.answer = numbers
        async with gpu_client(on, token=make_token(on.daemon, "backend")) as client:
            for user, content in ((6, "First."), (7, "Second.")):
                await client.ask(GOOD | {"user_id": user, "content": content})
            answer = await client.ask(GOOD | {"user_id": "7", "content": "Third."})
            assert answer["content"] == "Second. Third.", "of another user, another conversation"
            assert (await client.error(GOOD | {"user_id": "x" * 129})) == "user may have 128 printable characters"
            ended = await client.ask({"type": "interrupt", "engine_session_id": "uuid-session-1", "user_id": 7})
            assert ended["interrupted"] is False
            assert "Invalid engine_session_id" in await client.error(
                {"type": "interrupt", "engine_session_id": "uuid-session-1", "user_id": 8}
            )
        backend = Principal(name="backend", role="client")
        assert [talk.user for talk in on.talks.list(backend)] == ["7", "6"]
        async with gpu_client(on) as client:
            assert "is not that of this connection" in await client.error(GOOD | {"user_id": 7})


@pytest.mark.trio
async def test_a_message_may_interrupt_the_one_before(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, writer), gpu_client(on) as client:
        never = trio.Event()
        writer.answer = lambda said: ["This takes long. ", never] if said[-1]["content"] == "Hello" else numbers(said)
        await client.send(GOOD)
        await until(lambda: len(writer.assigns) == 1)
        await client.send(GOOD | {"content": "Stop", "interrupt": True})
        answers = [await client.answer(), await client.answer()]
        assert [answer.get("interrupted", False) for answer in answers] == [True, False]


@pytest.mark.trio
async def test_a_thousand_messages_at_once_are_each_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.talk.session.MAX_WAITING", 9)
    limits = {"principal": {"requests_per_s": 10_000.0}}
    async with serving(tmp_path, limits=limits) as (on, writer), gpu_client(on) as client:
        go_on = trio.Event()
        writer.answer = lambda messages: [go_on, "Yes."]
        answers: list[dict[str, Any]] = []

        async def listen() -> None:
            while len(answers) < 1_000:
                answers.append(await client.answer())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            for number in range(1_000):
                await client.send(GOOD | {"message_id": number})
            for _ in range(20):
                await client.send({"type": "webrtc_ice_candidate", "user_id": 6})
            await until(lambda: len(answers) >= 800)
            go_on.set()
        assert sorted(answer["message_id"] for answer in answers) == list(range(1_000))
        refused = [answer["content"] for answer in answers if answer["type"] == "error"]
        assert set(refused) == {"9 texts wait for their reply in this conversation; wait for one of them"}
        assert 980 <= len(refused) <= 990


@pytest.mark.trio
async def test_the_text_comes_though_nobody_speaks_it(tmp_path: Path) -> None:
    async with stage(tmp_path, listen="127.0.0.1:0", http={"no_worker_wait_s": 0.1}) as on:
        await on.writer()
        async with gpu_client(on) as client:
            answer = await client.ask(GOOD)
            assert (answer["content"], answer["audio"]) == ("You said: Hello.", "")
            assert answer["audio_error"] == "no worker of space 'tts' is connected; say it again when there is one"


@pytest.mark.trio
async def test_why_there_is_no_reply_is_an_error(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"http": {"no_worker_wait_s": 0.1}, "talk": {"speech": ""}}
    async with stage(tmp_path, listen="127.0.0.1:0", **settings) as on, gpu_client(on) as client:
        assert await client.error(GOOD) == "no worker of space 'llm' is connected; say it again when there is one"
        await on.writer()
        answer = await client.ask(GOOD)
        assert (answer["type"], answer["audio"], "audio_error" in answer) == ("text", "", False)


@pytest.mark.trio
async def test_speech_that_fits_into_no_message_is_named_by_its_url(tmp_path: Path) -> None:
    async with serving(tmp_path, limits={"max_backlog_bytes": 2 * 1024 * 1024}) as (on, writer):
        writer.answer = lambda _: ["x" * 45_000]
        async with gpu_client(on) as client:
            answer = await client.ask(GOOD)
            assert (len(answer["content"]), answer["audio"]) == (45_000, "")
            url = re.search(r"/v1/requests/[0-9a-f]+/audio", answer["audio_error"])
            assert url is not None
        async with visitor(on.daemon.urls[0], token=make_token(on.daemon)) as http:
            assert len((await http.get(url[0])).body) > 900_000


@pytest.mark.trio
async def test_the_lines_of_the_guide_are_in_the_log_and_no_token(tmp_path: Path) -> None:
    with kept_logs() as logs:
        async with serving(tmp_path) as (on, _):
            token = make_token(on.daemon)
            async with gpu_client(on, token=token) as client:
                await client.ask(
                    {"type": "webrtc_offer", "sdp": "v=0...", "user_id": 6, "avatar_id": "avatar_tutor_13"}
                )
                await client.send({"type": "webrtc_ice_candidate", "candidate": {}, "user_id": 6})
                await client.ask(GOOD)
                await client.ask(GOOD)
            await until(lambda: any(line["event"].startswith("Connection cleaned up") for line in logs))
            async with gpu_client(on, "session_abc123", path="/ws", token=token) as client:
                await client.ask({"type": "text", "content": "你好"})
            assert (await denial(on.daemon.urls[0], f"/ws/ws/user_6?token={token}x"))[0] == 403
    assert token[6:] not in json.dumps(logs, default=repr)
    about = ("connection_id", "user_id", "session_id", "tutor_id", "avatar_id", "engine_session_id")
    told = [{"event": line["event"]} | {name: line[name] for name in about if name in line} for line in logs]
    processing = {
        "event": "Processing text with WebRTC streaming:",
        "avatar_id": "avatar_tutor_13",
        "user_id": "6",
        "engine_session_id": "uuid-session-1",
        "session_id": "uuid-session-1",
    }
    expected = [
        {"event": "User-based connection mode:", "user_id": "6"},
        {"event": "WebSocket connected (user-based):", "connection_id": "user_6", "user_id": "6"},
        {"event": "Received WebRTC offer from session user_6,", "user_id": "6"},
        {"event": "Received ICE candidate from session user_6,", "user_id": "6"},
        {"event": "Created session context for", "engine_session_id": "uuid-session-1"},
        processing,
        {"event": "WebRTC streaming response sent"},
        processing,
        {"event": "WebRTC streaming response sent"},
        {"event": "Connection cleaned up (user-based):", "connection_id": "user_6"},
        {"event": "Session-based connection mode:", "session_id": "session_abc123"},
        {"event": "WebSocket connected (session-based):", "session_id": "session_abc123", "tutor_id": 13},
    ]
    assert [line for line in told if line in expected] == expected


@pytest.mark.trio
async def test_a_revoked_token_ends_its_connection_with_1008(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.http.context.TOKENS_INTERVAL_S", 0.01)
    async with serving(tmp_path) as (on, _):
        made = on.daemon.tokens.create(role="client", name="ann", now=0.0)
        async with gpu_client(on, token=made.text) as client:
            await client.ask(GOOD)
            on.daemon.tokens.revoke(made.record.token_id, 1.0)
            assert (await closing(client.socket))[0] == 1008
        await until(lambda: on.daemon.relay.stats.talk.websockets == {"gpu_server": 0})


@pytest.mark.trio
async def test_a_refused_message_interrupts_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as (on, writer), gpu_client(on) as client:
        go_on = trio.Event()
        writer.answer = lambda _: ["This takes ", go_on, "long."]
        await client.send(GOOD)
        session = (await on.open("uuid-session-1", user="6")).session
        await until(lambda: session.conversation.making is not None and session.conversation.making.samples > 0)
        assert await client.error(GOOD | {"content": " ", "interrupt": True}) == "the text is empty; say something"
        go_on.set()
        assert (await client.answer())["content"] == "This takes long."


@pytest.mark.trio
async def test_messages_count_as_requests_of_their_principal(tmp_path: Path) -> None:
    limits = {"principal": {"requests_per_s": 0.001}}  # so one at once, which is the handshake
    async with serving(tmp_path, limits=limits) as (on, writer), gpu_client(on) as client:
        assert "requests a second" in await client.error(GOOD)
        assert not writer.assigns


@pytest.mark.trio
async def test_a_client_has_so_many_messages_unanswered_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.talk.dialects.gpu_server_connection.MAX_UNANSWERED", 2)
    async with serving(tmp_path) as (on, writer), gpu_client(on) as client:
        go_on = trio.Event()
        writer.answer = lambda _: [go_on, "Yes."]
        for _number in range(2):
            await client.send(GOOD)
        assert await client.error(GOOD) == "2 messages wait for their answers on this connection; read some of them"
        go_on.set()
        assert [(await client.answer())["type"] for _number in range(2)] == ["text", "text"]
        assert (await client.ask(GOOD))["type"] == "text"
