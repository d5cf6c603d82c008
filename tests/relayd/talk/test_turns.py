"""Turns through a real daemon: text as it comes, speech as it comes, and what becomes of failures."""

from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.messages import Rejected
from relayd.auth.tokens import TokenRegistry
from relayd.http.prometheus import HttpReading, Scrape
from relayd.store.records import PutTurn
from relayd.talk.conversation import MAX_PROMPT_BYTES, MAX_WAITING
from relayd.talk.events import (
    Event,
    Extra,
    ReplyEnded,
    Speech,
    SpeechEnded,
    SpeechMark,
    SpeechStarted,
    TextDelta,
    TextEnded,
    TurnFailed,
)
from relayd.talk.session import MAX_TEXT_BYTES
from relayd.talk.talks import Talk
from tests.support.fake_worker import FORMAT
from tests.support.relay import until
from tests.support.talking import (
    ANN,
    BOB,
    MESSAGES,
    Step,
    ended,
    events_of,
    failed,
    fill,
    said,
    speech_of,
    stage,
    text_of,
)


@pytest.mark.trio
async def test_a_reply_comes_as_text_and_as_speech(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        writer, _ = await on.writer(), await on.speaker()
        talk = await on.open(instructions="Be brief.")
        events = await events_of(talk.say("Hello"))
        assert text_of(events) == "You said: Hello."
        assert b"".join(event.pcm for event in events if isinstance(event, Speech)) == speech_of("You said: Hello.")
        kinds = [type(event) for event in events]
        assert kinds[0] is TextDelta
        assert kinds[-2:] == [SpeechEnded, ReplyEnded]
        assert kinds.count(SpeechStarted) == kinds.count(TextEnded) == 1
        assert SpeechStarted(FORMAT) in events
        assert TextEnded("stop", {"prompt_tokens": 3, "completion_tokens": 5}) in events
        assert SpeechMark(16, 160) in events
        user, reply = talk.turns
        assert (user.role, user.content, user.state) == ("user", "Hello", "done")
        assert (reply.role, reply.content, reply.state, reply.code) == ("assistant", "You said: Hello.", "done", None)
        assert events[-1] == ReplyEnded(reply)
        again = await ended(talk.say("And now?", params={"temperature": 0.5}))
        assert again.content == "You said: And now?."
        assert writer.prompts[1] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "You said: Hello."},
            {"role": "user", "content": "And now?"},
        ]
        assert writer.assigns[1].params["temperature"] == 0.5
        await on.daemon.at_rest()
        assert not on.talks.place.unended


@pytest.mark.trio
async def test_an_engine_that_can_say_how_the_mouth_stands_is_asked_to(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.writer()
        speaker = await on.speaker(params={"type": "object", "properties": {"visemes": {"type": "boolean"}}})
        talk = await on.open()
        events = await events_of(talk.say("Hello"))
        made = [event.data for event in events if isinstance(event, Extra)]
        assert made[0] == {"visemes": [{"t": 0.0, "opening": 0.5}]}
        await ended(talk.say("And now?", speech_params={"visemes": False}))
        assert [assign.params for assign in speaker.assigns] == [{"visemes": True}, {"visemes": False}]


@pytest.mark.trio
async def test_text_comes_before_the_reply_is_whole_and_to_everybody_who_listens(tmp_path: Path) -> None:
    go_on = trio.Event()
    async with stage(tmp_path) as on:
        await on.writer(lambda _: ["One. ", go_on, "Two."])
        await on.speaker()
        talk = await on.open()
        reply = said(talk.say("Count!"))
        heard: list[list[Event]] = [[], []]

        async def listen(into: list[Event]) -> None:
            async for event in reply.events():
                into.append(event)  # noqa: PERF401  one by one, as they come

        async with trio.open_nursery() as nursery:
            for into in heard:
                nursery.start_soon(listen, into)
            await until(lambda: all(any(isinstance(event, Speech) for event in into) for into in heard))
            assert [text_of(into) for into in heard] == ["One. ", "One. "]
            assert [turn.state for turn in talk.turns] == ["done", "speaking"]
            assert talk.turns[1].content == "One. "
            go_on.set()
        assert text_of(heard[0]) == "One. Two."
        assert heard[0][-1] == heard[1][-1] == ReplyEnded(talk.turns[1])
        late = await events_of(reply)
        assert (text_of(late), late[-1]) == ("One. Two.", heard[0][-1])


@pytest.mark.trio
async def test_what_is_said_meanwhile_waits_and_is_answered_in_order(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        writer = await on.writer()
        await on.speaker()
        talk, other = await on.open(), await on.open("session-2")
        replies = [talk.say(f"number {number}") for number in range(4)] + [other.say("another matter")]
        turns = [await ended(reply) for reply in replies]
        assert [turn.content for turn in turns[:4]] == [f"You said: number {number}." for number in range(4)]
        prompts = [prompt for prompt in writer.prompts if prompt[-1]["content"] != "another matter"]
        assert [len(prompt) for prompt in prompts] == [1, 3, 5, 7], "each knows the replies before it, and no more"
        assert len(other.turns) == 2


@pytest.mark.trio
async def test_two_principals_with_one_user_and_session_do_not_meet(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        writer = await on.writer()
        await on.speaker()
        anns, bobs = [await on.open("uuid-session-1", who, user="user_6") for who in (ANN, BOB)]
        await ended(anns.say("My secret is 17."))
        await ended(bobs.say("What is the secret?"))
        assert writer.prompts[1] == [{"role": "user", "content": "What is the secret?"}]
        assert len(anns.turns) == len(bobs.turns) == 2
        assert on.talks.find(BOB, anns.talk_id) is None
        assert [record.talk_id for record in on.talks.list(BOB)] == [bobs.talk_id]


def has_spoken(talk: Talk, chars: int) -> bool:
    making = talk.session.conversation.making
    return making is not None and bool(making.marks) and making.marks[-1].text_end == chars


@pytest.mark.trio
async def test_an_interrupted_reply_ends_at_once_and_only_what_was_heard_is_remembered(tmp_path: Path) -> None:
    never = trio.Event()
    answers: list[list[Step]] = [["One two three. ", "Four five six.", never], ["Fine."]]
    async with stage(tmp_path) as on:
        writer, speaker = await on.writer(lambda _: answers.pop(0)), await on.speaker()
        talk = await on.open()
        reply = said(talk.say("Count!"))
        await until(lambda: has_spoken(talk, 29))
        reply.note_played(150)
        assert talk.interrupt("enough")
        turn = await ended(reply)
        assert (turn.state, turn.content, turn.message) == ("interrupted", "One two three. Four five six.", "enough")
        assert turn.content[: turn.heard_chars] == "One two three. "
        await until(lambda: len(writer.cancelled) == len(speaker.cancelled) == 1)
        assert not talk.interrupt("again"), "there is nothing to interrupt"
        await ended(talk.say("Go on."))
        assert writer.prompts[1] == [
            {"role": "user", "content": "Count!"},
            {"role": "assistant", "content": "One two three."},
            {"role": "user", "content": "Go on."},
        ]
        await on.daemon.at_rest()


@pytest.mark.trio
async def test_an_interruption_that_comes_with_the_text_is_not_lost(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.writer()
        await on.speaker()
        talk = await on.open()
        assert not talk.interrupt()
        first, second = talk.say("Hello"), talk.say("Hello?")
        assert talk.interrupt()
        assert (await ended(first)).state == "interrupted"
        assert (await ended(second)).state == "done"
        await on.daemon.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("setting", ["never", "always"])
async def test_a_new_text_interrupts_if_it_says_so_or_always(
    tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = trio.Event()
    answers: list[list[Step]] = [["Well, ", never], ["Fine."]]
    async with stage(tmp_path, talk={"barge_in": setting}) as on:
        await on.writer(lambda _: answers.pop(0))
        await on.speaker()
        talk = await on.open()
        first = said(talk.say("Count!"))
        await until(lambda: bool(first.text))
        commit = on.daemon.relay.store.commit

        async def after_the_text(*changes: Any) -> None:
            if any(isinstance(change, PutTurn) and change.record.number == first.number for change in changes):
                await until(lambda: committed.is_set())
                assert not said(second).is_stored, "a text is acknowledged when what it interrupts is stored"
            await commit(*changes)
            committed.set()

        committed = trio.Event()
        monkeypatch.setattr(on.daemon.relay.store, "commit", after_the_text)
        second = talk.say("Stop!", interrupt=setting == "never")
        assert (await ended(first)).state == "interrupted"
        assert (await ended(second)).content == "Fine."


@pytest.mark.trio
async def test_a_client_that_interrupts_all_the_time_is_answered_in_the_end(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.writer(lambda _: ["Well, ", *(["and so on "] * 50)])
        await on.speaker()
        talk = await on.open()
        replies = []
        for number in range(30):
            replies.append(talk.say(f"number {number}", interrupt=True))
            await trio.lowlevel.checkpoint()
        states = [(await ended(reply)).state for reply in replies]
        assert states[-1] == "done"
        assert set(states) <= {"done", "interrupted"}
        await on.daemon.at_rest()


# -- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("refuses", [False, True])
async def test_without_a_worker_that_speaks_the_text_comes(tmp_path: Path, refuses: bool) -> None:
    spaces = {"tts": {"when_empty": "refuse"}} if refuses else {}
    async with stage(tmp_path, spaces=spaces, http={"no_worker_wait_s": 0.05}) as on:
        await on.writer()
        talk = await on.open()
        events = await events_of(talk.say("Hello"))
        assert text_of(events) == "You said: Hello."
        (speech,), end = [event for event in events if isinstance(event, SpeechEnded)], events[-1]
        assert isinstance(end, ReplyEnded)
        assert (speech.code, speech.retryable) == ("no_worker", True)
        assert (end.turn.state, end.turn.code) == ("done", "no_worker")
        assert end.turn.heard_chars is None, "it was read"
        assert on.daemon.relay.stats.talk.unspoken == {"no_worker": 1}


@pytest.mark.trio
async def test_a_worker_that_speaks_may_come_while_the_model_thinks(tmp_path: Path) -> None:
    think = trio.Event()
    async with stage(tmp_path, http={"no_worker_wait_s": 0.05}) as on:
        await on.writer(lambda _: [think, "Well."])
        reply = said((await on.open()).say("Hello"))
        await trio.sleep(0.3)  # the patience with a space without a worker is over
        assert reply.speech_ended is None
        await on.speaker()
        think.set()
        assert (await ended(reply)).code is None
        assert any(isinstance(event, Speech) for event in await events_of(reply))


@pytest.mark.trio
async def test_speech_that_fails_on_the_way_leaves_the_text(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.writer()
        (await on.speaker()).fails_with = "engine_failed"
        events = await events_of((await on.open()).say("Hello"))
        assert text_of(events) == "You said: Hello."
        end = events[-1]
        assert isinstance(end, ReplyEnded)
        assert (end.turn.state, end.turn.code) == ("done", "engine_failed")
        assert any(isinstance(event, Speech) for event in events), "what there was of it comes"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("talk", "space"), [({"speech": "nowhere"}, {}), ({"speech": "llm"}, {}), ({}, {"tts": {"max_queued": 1}})]
)
async def test_a_space_that_refuses_to_speak_leaves_the_text(
    tmp_path: Path, talk: dict[str, Any], space: dict[str, Any]
) -> None:
    async with stage(tmp_path, talk=talk, spaces=space) as on:
        await on.writer()
        speaker = await on.speaker(slots=1)
        speaker.lingers = trio.Event()
        talks = [await on.open(f"session-{number}") for number in range(3)]
        events = [await events_of(talks[0].say("Hello"))] if talk else []
        if not talk:
            blocked = [each.say("Hello") for each in talks]
            await until(lambda: any(said(each).speech_ended for each in blocked))
            speaker.lingers.set()
            events = [await events_of(each) for each in blocked]
        assert all(text_of(each) == "You said: Hello." for each in events)
        codes = {each[-1].turn.code for each in events if isinstance(each[-1], ReplyEnded)}
        assert codes == ({None, "queue_full"} if not talk else codes & {"space_not_found", "invalid_params"})
        assert codes - {None}


@pytest.mark.trio
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ([("engine_failed",)], "engine_failed"),
        (["One and ", ("worker_lost",)], "worker_lost"),
        ([], "engine_failed"),
        ([" \n", " "], "engine_failed"),
        (["x" * 60_000, "y" * 60_000], "result_too_large"),
    ],
)
async def test_a_model_that_fails_or_says_nothing_fails_the_turn(tmp_path: Path, answer: list[Step], code: str) -> None:
    async with stage(tmp_path) as on:
        writer = await on.writer(lambda messages: ["Fine."] if "Again" in messages[-1]["content"] else answer)
        await on.speaker()
        talk = await on.open()
        failure = await failed(talk.say("Hello"))
        assert failure.code == code
        turn = talk.turns[-1]
        assert (turn.state, turn.code) == ("failed", code)
        assert (await ended(talk.say("Again"))).content == "Fine.", "the conversation goes on"
        heard = [message["content"] for message in writer.prompts[-1]]
        assert "x" * 60_000 not in "".join(heard)
        await on.daemon.at_rest()


@pytest.mark.trio
async def test_without_a_worker_that_answers_the_turn_fails(tmp_path: Path) -> None:
    async with stage(tmp_path, http={"no_worker_wait_s": 0.05}) as on:
        failure = await failed((await on.open()).say("Hello"))
        assert (failure.code, failure.retryable) == ("no_worker", True)
        assert "'llm'" in failure.message
        await on.daemon.at_rest()


@pytest.mark.trio
async def test_what_is_no_text_is_refused_and_so_is_too_much(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        talk = await on.open()
        codes = []
        for text in ("", " \n", "\ud83d", "x" * (MAX_TEXT_BYTES + 1)):
            reply = talk.say(text)
            assert isinstance(reply, Rejected)
            codes.append(reply.code)
        assert codes == ["invalid_params", "invalid_params", "invalid_params", "input_too_large"]
        assert isinstance(talk.say("x", params={"a": "x" * 9_000}), Rejected)
        assert isinstance(talk.say("x", instructions="x" * 4_001), Rejected)
        said(talk.say("x", instructions="你" * 4_000))
        replies = [talk.say("Hello") for _ in range(MAX_WAITING + 4)]
        refused = [reply for reply in replies if isinstance(reply, Rejected)]
        assert {reply.code for reply in refused} == {"queue_full"}
        assert 3 <= len(refused) <= 5
        assert isinstance(await on.talks.open(ANN, "nodigits"), Rejected)
        assert isinstance(await on.talks.open(ANN, "x1" * 65), Rejected)
        assert isinstance(await on.talks.open(ANN, "a1", "new\nline"), Rejected)
        unknown = await on.talks.open(ANN, "unknown-1", create=False)
        assert isinstance(unknown, Rejected)
        assert unknown.code == "request_not_found"


@pytest.mark.trio
async def test_the_longest_prompt_fits_into_a_request(tmp_path: Path) -> None:
    params = {**MESSAGES, "additionalProperties": True}
    async with stage(tmp_path, talk={"speech": "", "max_context_chars": 50_000}) as on:
        writer = await on.writer(lambda _: ["𝄞" * 1_000], params=params)
        talk = await on.open(instructions="𝄞" * 4_000)
        for _ in range(8):
            await ended(talk.say("你" * 1_000))
        await ended(talk.say("你" * (MAX_TEXT_BYTES // 3), params={"more": "x" * 7_900}))
        sizes = [sum(len(message["content"].encode()) for message in prompt) for prompt in writer.prompts]
        assert MAX_PROMPT_BYTES - 10_000 < max(sizes) <= MAX_PROMPT_BYTES


@pytest.mark.trio
async def test_many_who_talk_at_once_have_their_share(tmp_path: Path) -> None:
    async with stage(tmp_path, limits={"principal": {"max_queued": 5}}) as on:
        talks = [await on.open(f"session-{number}") for number in range(8)]
        replies = [talk.say("Hello") for talk in talks]
        assert [isinstance(reply, Rejected) for reply in replies] == [False] * 5 + [True] * 3
        other = await on.open("session-1", BOB)
        said(other.say("Hello"))


# -- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_cannot_be_stored_is_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage(tmp_path) as on:
        writer, _ = await on.writer(), await on.speaker()
        talk = await on.open()
        with monkeypatch.context() as patch:
            fill(on, patch, "user", "done")
            events = await events_of(talk.say("Hello"))
        assert [type(event) for event in events] == [TurnFailed], "nothing is told of it"
        await until(lambda: not talk.turns)
        await ended(talk.say("Again"))
        assert writer.prompts[-1] == [{"role": "user", "content": "Again"}]


@pytest.mark.trio
async def test_a_reply_that_cannot_be_stored_is_not_told_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage(tmp_path) as on:
        await on.writer()
        await on.speaker()
        talk = await on.open()
        with monkeypatch.context() as patch:
            fill(on, patch, "assistant", "done")
            events = await events_of(talk.say("Hello"))
        assert text_of(events) == "You said: Hello."
        end = events[-1]
        assert isinstance(end, TurnFailed)
        assert (end.code, end.retryable) == ("storage_full", True)
        assert (await ended(talk.say("Again"))).state == "done"
    async with stage(tmp_path) as on:
        talk = await on.open()
        states = [(turn.role, turn.state, turn.code) for turn in talk.turns]
        assert states[1] == ("assistant", "failed", "storage_full")
        assert states[3] == ("assistant", "done", None)


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_became_of_turns_is_counted(tmp_path: Path) -> None:
    never = trio.Event()
    scripts: dict[str, list[Step]] = {"a": ["Yes."], "b": ["Well, ", never], "c": []}
    async with stage(tmp_path) as on:
        await on.writer(lambda messages: scripts[messages[-1]["content"][-1]])
        await on.speaker()
        talk = await on.open()
        await ended(talk.say("a"))
        reply = said(talk.say("b"))
        await until(lambda: bool(reply.text))
        talk.interrupt()
        await failed(talk.say("c"))
        stats = on.daemon.relay.stats.talk
        assert stats.turns == {"done": 1, "interrupted": 1, "failed": 1}
        assert (stats.talks, stats.unended) == (1, 0)
        assert sum(stats.first_word_s.counts) == 2
        body, _ = Scrape.of(on.daemon.relay, TokenRegistry(), HttpReading(0, 0, {})).encode()
        assert b'relayd_talk_turns_total{state="interrupted"} 1.0' in body
        assert b"relayd_talk_first_word_seconds_count 2.0" in body


@pytest.mark.trio
async def test_one_reply_is_cancelled_and_no_other(tmp_path: Path) -> None:
    never = trio.Event()
    answers: list[list[Step]] = [["Well, ", never], ["Fine."]]
    async with stage(tmp_path) as on:
        await on.writer(lambda _: answers.pop(0))
        await on.speaker()
        talk = await on.open()
        first, second, third = [said(talk.say(text)) for text in ("One", "Two", "Three")]
        assert talk.cancel(second), "it waits, and is not even stored"
        assert (await failed(second)).code == "cancelled"
        await until(lambda: bool(first.text))
        assert talk.cancel(first)
        assert (await ended(first)).state == "interrupted"
        assert (await ended(third)).content == "Fine."
        assert not talk.cancel(third)
        await on.daemon.at_rest()
        stored = await on.daemon.relay.store.read_turns(talk.talk_id)
        assert [turn.state for turn in stored] == ["done", "interrupted", "done", "failed", "done", "done"]


@pytest.mark.trio
async def test_a_turn_may_name_another_language_model(tmp_path: Path) -> None:
    long = "\N{PILE OF POO}" * 4_000
    async with stage(tmp_path, talk={"reply": "other"}, spaces={"other": {}}) as on:
        writer = await on.writer()
        talk = await on.open()
        assert (await ended(talk.say("Hello", speak=False, space="llm", instructions=long))).state == "done"
        assert writer.prompts == [[{"role": "system", "content": long}, {"role": "user", "content": "Hello"}]]
        assert (await failed(talk.say("Hello", speak=False, space="nowhere"))).code == "space_not_found"


@pytest.mark.trio
@pytest.mark.parametrize("history", ["disk", "none"])
async def test_an_unkept_conversation_remembers_and_is_kept_nowhere(tmp_path: Path, history: str) -> None:
    never = trio.Event()
    async with stage(tmp_path, talk={"history": history}) as on:
        writer = await on.writer(lambda messages: ["Well, ", never] if messages[-1]["content"] == "Wait" else ["Hi."])
        talk = on.talks.open_unkept(ANN)
        assert isinstance(talk, Talk)
        await ended(talk.say("Hello", speak=False))
        await ended(talk.say("Again", speak=False))
        assert len(writer.prompts[1]) == 3
        waits = said(talk.say("Wait", speak=False))
        await until(lambda: bool(waits.text))
        talk.session.close("over")
        assert (await ended(waits)).state == "interrupted"
        assert not on.talks.list(ANN)
        assert not await on.daemon.relay.store.read_turns(talk.talk_id)
        await on.daemon.at_rest()
