"""Conversations over restarts of the relay and losses of workers: whole or typed, and never half told as done."""

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.frames import Audio, Completed, Output, Started
from protocol.wire.messages import Input, Registered, Rejected
from protocol.wire.structs import Running
from relayd.store.records import PutTalk, PutTurn, TalkRecord, TurnRecord
from relayd.talk.conversation import Conversation
from relayd.talk.events import ReplyEnded, Speech
from relayd.talk.session import Session
from relayd.talk.talks import DAY_S, Talk
from tests.support.fake_worker import FORMAT, fake_worker
from tests.support.relay import until
from tests.support.talking import (
    ANN,
    BOB,
    MESSAGES,
    Sending,
    Stage,
    ended,
    events_of,
    said,
    speech_of,
    stage,
    text_of,
)


async def roles(on: Stage, session: str = "session-1") -> list[tuple[str, str, str]]:
    return [(turn.role, turn.content, str(turn.state)) for turn in (await on.open(session)).turns]


@pytest.mark.trio
async def test_a_conversation_is_there_after_a_restart(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.writer()
        await on.speaker()
        talk = await on.open(user="user_6", instructions="Be brief.")
        await ended(talk.say("My name is Ann."))
        talk_id = talk.talk_id
    async with stage(tmp_path) as on:
        writer, _ = await on.writer(), await on.speaker()
        talk = await on.open(user="user_6", create=False)
        assert talk.talk_id == talk_id
        assert [turn.content for turn in talk.turns] == ["My name is Ann.", "You said: My name is Ann.."]
        await ended(talk.say("Who am I?"))
        assert [message["content"] for message in writer.prompts[0]] == [
            "Be brief.",
            "My name is Ann.",
            "You said: My name is Ann..",
            "Who am I?",
        ]
        assert isinstance(await on.talks.open(BOB, "session-1", "user_6", create=False), Rejected)


@pytest.mark.trio
async def test_a_reply_that_was_made_when_the_relay_was_killed_is_finished(tmp_path: Path) -> None:
    """The workers of this test forget their requests when they are cut: both requests are begun anew."""
    never = trio.Event()
    async with stage(tmp_path, limits={"worker_grace_s": 0.1}) as on:
        await on.writer(lambda _: [never, "Lost."])
        await on.speaker()
        talk = await on.open()
        first, second = said(talk.say("First")), said(talk.say("Second"))
        await until(lambda: first.is_stored and second.is_stored)
        await until(lambda: on.daemon.relay.requests[first.text_request].entry.attempt == 1)
        ids = first.text_request, first.speech_request
    async with stage(tmp_path, limits={"worker_grace_s": 0.1}) as on:
        talk = await on.open()
        assert [turn.state for turn in talk.turns] in (
            ["done", "thinking", "done", "waiting"],
            ["done", "waiting", "done", "waiting"],
        )
        reply = talk.replies[1]
        assert (reply.text_request, reply.speech_request) == ids, "it is the same one"
        writer, speaker = await on.writer(), await on.speaker()
        turns = [await ended(each) for each in list(talk.replies.values())]
        assert [turn.content for turn in turns] == ["You said: First.", "You said: Second."]
        assert [assign.request_id for assign in writer.assigns] == [turn.text_request for turn in turns]
        assert [assign.request_id for assign in speaker.assigns] == [turn.speech_request for turn in turns]
        assert all(turn.heard_chars is None for turn in turns)
        assert not on.talks.place.unended
        await on.daemon.at_rest()


@pytest.mark.trio
async def test_a_reply_goes_on_with_the_rights_of_a_token_that_lives(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        tokens, principal_named = on.daemon.tokens, on.talks.place.principal_named
        assert principal_named("root").may_use("llm"), "it came over the unix socket, without a token"
        first = tokens.create(role="client", name="ann", now=0.0, spaces=("llm",))
        second = tokens.create(role="client", name="ann", now=1.0, spaces=("tts",))
        assert principal_named("ann").spaces == ("llm",)
        tokens.revoke(first.record.token_id, 2.0)
        assert principal_named("ann").spaces == ("tts",)
        tokens.revoke(second.record.token_id, 2.0)
        assert not any(principal_named("ann").may_use(space) for space in on.daemon.relay.spaces)


@pytest.mark.trio
async def test_a_turn_is_done_when_its_speech_has_ended_also_if_that_was_cancelled(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.writer()
        speaker = await on.speaker()
        speaker.lingers = trio.Event()
        talk = await on.open()
        reply = said(talk.say("Hello"))
        await until(lambda: reply.text_ended is not None)
        await until(lambda: talk.turns[1].state == "speaking")
        assert reply.speech is not None
        on.daemon.relay.cancel(reply.speech, "as the test says")
        turn = await ended(reply)
        assert (turn.state, turn.code, turn.content) == ("done", "cancelled", "You said: Hello.")


@pytest.mark.trio
async def test_a_model_that_dies_in_the_middle_of_a_sentence_fails_the_turn(tmp_path: Path) -> None:
    never = trio.Event()
    async with stage(tmp_path, limits={"worker_grace_s": 0.1}) as on:
        writer = await on.writer(lambda _: ["One and ", never])
        await on.speaker()
        talk = await on.open()
        reply = said(talk.say("Count!"))
        await until(lambda: bool(reply.text))
        writer.gone.set()
        with trio.fail_after(10):
            await reply.wait_ended()
        turn = talk.turns[1]
        assert (turn.state, turn.code, turn.content) == ("failed", "worker_lost", "One and ")
    async with stage(tmp_path) as on:
        assert (await roles(on))[1] == ("assistant", "One and ", "failed")


@pytest.mark.trio
async def test_a_worker_that_dies_before_it_has_said_anything_costs_nothing(tmp_path: Path) -> None:
    never = trio.Event()
    async with stage(tmp_path, limits={"worker_grace_s": 0.1}) as on:
        writer = await on.writer(lambda _: [never])
        await on.speaker()
        talk = await on.open()
        reply = said(talk.say("Hello"))
        await until(lambda: bool(writer.assigns))
        writer.gone.set()
        await until(lambda: not on.daemon.relay.workers.serving("llm"))
        await on.writer()
        assert (await ended(reply)).content == "You said: Hello."


@pytest.mark.trio
@pytest.mark.parametrize(("history", "kept"), [("memory", 4), ("none", 0)])
async def test_a_history_that_is_not_stored_is_gone_after_a_restart(tmp_path: Path, history: str, kept: int) -> None:
    async with stage(tmp_path, talk={"history": history}) as on:
        writer, _ = await on.writer(), await on.speaker()
        for text in ("One", "Two"):
            await ended((await on.open()).say(text))
        assert len((await on.open()).turns) == kept
        assert len(writer.prompts[1]) == (3 if kept else 1)
        assert (await on.daemon.relay.store.load()).talks == ()
    async with stage(tmp_path, talk={"history": history}) as on:
        assert on.talks.list(ANN) == []


@pytest.mark.trio
async def test_a_conversation_whose_id_is_none_any_more_can_still_be_opened(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.open("session-1")
    async with stage(tmp_path, talk={"session_id_pattern": "[0-9]+"}) as on:
        assert await on.talks.delete(await on.open("session-1")) is None
        assert isinstance(await on.talks.open(ANN, "session-1"), Rejected)


@pytest.mark.trio
async def test_what_was_stored_under_other_settings_is_kept_for_its_time(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        store = on.daemon.relay.store
        for number, at in ((1, time.time()), (2, time.time() - 31 * DAY_S)):
            talk_id = f"talk-{number}"
            record = TalkRecord(
                talk_id=talk_id, principal="ann", user="", session=f"session-{number}", created_at=1.0, touched_at=at
            )
            await store.commit(PutTalk(record))
    async with stage(tmp_path, talk={"history": "none"}) as on:
        assert on.talks.list(ANN) == []
        assert [each.talk_id for each in (await on.daemon.relay.store.load()).talks] == ["talk-1"]


@pytest.mark.trio
async def test_a_reply_that_is_cancelled_with_its_text_is_not_made_after_a_restart(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.writer()
        await on.speaker()
        talk = await on.open()
        replies = [said(talk.say("One")), said(talk.say("Two"))]
        assert talk.cancel(replies[1])
        await ended(replies[0])
        assert not talk.cancel(replies[1])
        await on.daemon.relay.store.flush()
        assert (await on.daemon.relay.store.load()).unended_turns == ()
    async with stage(tmp_path) as on:
        assert [state for _, _, state in await roles(on)] == ["done", "done", "done", "failed"]


@pytest.mark.trio
async def test_old_turns_and_old_conversations_are_deleted(tmp_path: Path) -> None:
    async with stage(tmp_path, talk={"max_turns": 4, "retain_days": 2}) as on:
        await on.writer()
        await on.speaker()
        talk = await on.open()
        for number in range(4):
            await ended(talk.say(str(number)))
        assert [turn.number for turn in talk.turns] == [4, 5, 6, 7]
        assert [turn.number for turn in await on.daemon.relay.store.read_turns(talk.talk_id)] == [4, 5, 6, 7]
        assert on.talks.purge(time.time() + 1.9 * DAY_S) == 0
        assert on.talks.purge(time.time() + 2.1 * DAY_S) == 1
        assert isinstance(talk.say("Hello?"), Rejected)
        assert on.talks.list(ANN) == []
        assert on.daemon.relay.stats.talk.talks == 0
    async with stage(tmp_path) as on:
        assert on.talks.list(ANN) == []
        assert (await on.open()).turns == []


@pytest.mark.trio
async def test_instructions_that_are_too_much_in_all_end_the_oldest_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.talk.talks.MAX_ALL_INSTRUCTIONS_CHARS", 100)
    async with stage(tmp_path) as on:
        await on.writer()
        await on.speaker()
        for number in range(6):
            talk = await on.open(f"s{number}", instructions="" if number == 1 else 30 * "x")
            await ended(talk.say("Hello"))
        assert [talk.session for talk in on.talks.list(ANN)] == ["s5", "s4", "s3", "s1"], "s1 has none"
        await on.open("s3", instructions=70 * "x")
        assert {talk.session for talk in on.talks.list(ANN)} == {"s5", "s3", "s1"}, "the one that has changed stays"
        await on.open("s9", principal=BOB, instructions=100 * "x")
        assert len(on.talks.list(ANN)) == 3


@pytest.mark.trio
async def test_what_was_heard_of_a_reply_is_there_after_a_restart(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.writer(lambda _: ["One two three."])
        await on.speaker()
        talk = await on.open()
        turn = await ended(talk.say("Count!"))
        assert talk.note_played(turn.number, 75)
        assert await on.talks.settle() is None
    async with stage(tmp_path) as on:
        heard = (await on.open()).turns[-1]
        assert (heard.heard_chars, heard.content, heard.state) == (7, "One two three.", "done")


@pytest.mark.trio
async def test_a_deleted_conversation_stays_deleted_whatever_was_being_said(tmp_path: Path) -> None:
    never = trio.Event()
    async with stage(tmp_path) as on:
        writer = await on.writer(lambda _: ["Well, ", never])
        await on.speaker()
        talk = await on.open()
        replies = [said(talk.say("Hello")), said(talk.say("Hello?"))]
        await until(lambda: bool(replies[0].text))
        assert await on.talks.delete(talk) is None
        for reply in replies:
            with trio.fail_after(10):
                await reply.wait_ended()
        await until(lambda: bool(writer.cancelled))
        assert (await on.open()).turns == []
        await on.daemon.at_rest()
    async with stage(tmp_path) as on:
        assert (await on.open()).turns == []


@pytest.mark.trio
async def test_a_conversation_that_is_deleted_while_it_is_read_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as on:
        await on.writer()
        talk = await on.open()
        await ended(talk.say("Hello", speak=False))
        store, opened = on.daemon.relay.store, list[Talk | Rejected]()
        read_turns, is_read, go_on = store.read_turns, trio.Event(), trio.Event()

        async def read_slowly(talk_id: str) -> tuple[TurnRecord, ...]:
            turns = await read_turns(talk_id)
            is_read.set()
            await go_on.wait()
            return turns

        async def open_it() -> None:
            opened.append(await on.talks.open(ANN, "session-1"))

        record = talk.record
        del talk
        gc.collect()
        monkeypatch.setattr(store, "read_turns", read_slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_it)
            await is_read.wait()
            other = Talk(Session(on.talks.place, record, Conversation(record.talk_id), lambda _: None), ANN)
            assert await on.talks.delete(other) is None
            go_on.set()
        assert isinstance(opened[0], Rejected)
        assert opened[0].code == "request_not_found"
        monkeypatch.undo()
        assert (await on.open()).turns == []


@pytest.mark.trio
async def test_turns_that_a_client_adds_or_deletes_are_stored(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        writer, _ = await on.writer(), await on.speaker()
        talk = await on.open()
        for role, content in (("user", "Hi"), ("assistant", "Hello"), ("user", "How are you?")):
            assert not isinstance(await talk.add(role, content), Rejected)
        assert (await ended(talk.say(None))).content == "You said: How are you?."
        assert talk.delete_turn(1)
        assert not talk.delete_turn(1)
        await ended(talk.say("And?"))
        assert writer.prompts[1][0]["content"] == "Hi\n\nHow are you?"
    async with stage(tmp_path) as on:
        assert [turn.number for turn in (await on.open()).turns] == [0, 2, 3, 4, 5]


@pytest.mark.trio
async def test_what_its_workers_go_on_with_over_a_restart_is_whole(tmp_path: Path) -> None:
    never, text = trio.Event(), "One two."
    async with stage(tmp_path) as on:
        writer, speaker = await on.writer(lambda _: ["One ", never]), await on.speaker()
        talk = await on.open()
        reply = said(talk.say("Count!"))
        await until(lambda: reply.speech is not None and reply.speech.audio_bytes == 80)
        assigns = [writer.assigns[0], speaker.assigns[0]]
        instances = [writer.worker.instance, speaker.worker.instance]
        await on.daemon.relay.store.flush()
    async with stage(tmp_path) as on:
        reply = (await on.open()).replies[1]
        named = [Running(request_id=each.request_id, attempt=1, next_seq=2, inputs={}) for each in assigns]
        named[1] = Running(request_id=assigns[1].request_id, attempt=1, next_seq=3, inputs={"text": 4})
        llm: dict[str, Any] = {"params": MESSAGES, "format": None, "instance": instances[0], "running": named[:1]}
        tts: dict[str, Any] = {"params": {}, "instance": instances[1], "running": named[1:]}
        async with (
            fake_worker(on.daemon.url, name="llm", spaces=("llm",), **llm) as first,
            fake_worker(on.daemon.url, name="tts", spaces=("tts",), inputs={"text": {"live": True}}, **tts) as second,
        ):
            for worker in (first, second):
                assert len((await worker.peer.next(Registered)).resume) == 1
            out = Sending(first, assigns[0])
            out.send(Started, format=None)
            out.send(Output, data="One ")
            out.send(Output, data="two.")
            out.send(Completed, result={})
            speech = Sending(second, assigns[1])
            speech.send(Started, format=FORMAT)
            speech.send(Audio, pcm=speech_of("One "))
            speech.send(Output, mark={"text_end": 4, "sample": 40})
            piece = await second.peer.next(Input)
            while not piece.last:
                piece = await second.peer.next(Input)
            speech.send(Audio, pcm=speech_of(text)[80:])
            speech.send(Completed, result={})
            events = await events_of(reply)
        assert text_of(events) == text
        assert b"".join(event.pcm for event in events if isinstance(event, Speech)) == speech_of(text)
        end = events[-1]
        assert isinstance(end, ReplyEnded)
        assert (end.turn.state, end.turn.content) == ("done", text)


@pytest.mark.trio
async def test_a_reply_whose_requests_had_ended_when_the_relay_was_killed_is_taken_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as on:
        await on.writer()
        await on.speaker()
        relay, reached = on.daemon.relay, trio.Event()
        commit = relay.store.commit

        async def killed_before(*changes: Any) -> None:
            turns = [change.record for change in changes if isinstance(change, PutTurn)]
            if any((turn.role, turn.state) == ("assistant", "done") for turn in turns):
                reached.set()
                await trio.sleep_forever()
            await commit(*changes)

        monkeypatch.setattr(relay.store, "commit", killed_before)
        talk = await on.open()
        reply = said(talk.say("Hello"))
        with trio.fail_after(10):
            await reached.wait()
            await relay.finalizer.wait_finalized()
        assert (await roles(on))[1][2] == "speaking", "it is not told done"
        assert reply.ended is None
        await relay.store.flush()
    async with stage(tmp_path) as on:
        talk = await on.open()
        turn = await ended(talk.replies[1]) if talk.replies else talk.turns[1]
        assert (turn.content, turn.state, turn.text_request) == ("You said: Hello.", "done", reply.text_request)
        assert (await roles(on))[1] == ("assistant", "You said: Hello.", "done")
