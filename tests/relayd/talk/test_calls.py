"""Calls through a real daemon: set up, played on, interrupted, and lost."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.messages import Rejected
from relayd.auth.tokens import Principal
from relayd.talk.call import Call
from relayd.talk.calls import MAX_OFFER_BYTES
from relayd.talk.events import ReplyEnded
from tests.support.calling import CALLS, OFFER, Gateway, called, face, gateway
from tests.support.relay import until
from tests.support.talking import ANN, BOB, Stage, ended, events_of, said, speech_of, stage

REPLY = "You said: Hello."


@asynccontextmanager
async def calling(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Stage, Gateway]]:
    """A daemon with a language model, a voice and a gateway."""
    async with stage(tmp_path, talk={"calls": "calls"} | options.pop("talk", {}), spaces=CALLS, **options) as on:
        await on.writer()
        await on.speaker()
        yield on, await gateway(on)


def refused(opened: Call | Rejected) -> Rejected:
    assert isinstance(opened, Rejected)
    return opened


@pytest.mark.trio
async def test_a_reply_is_played_on_the_call_and_told_as_without_one(tmp_path: Path) -> None:
    async with calling(tmp_path) as (on, calls):
        call = await called(on)
        assert call.answer == f"answer 0 to {OFFER}"
        talk = await on.open()
        events = await events_of(talk.say("Hello", call=call))
        assert isinstance(events[-1], ReplyEnded)
        await until(lambda: bytes(calls.heard[call.request_id]) == speech_of(REPLY))
        await until(lambda: not talk.session.is_playing)
        assert talk.turns[1].heard_chars is None
        assert not calls.seen[call.request_id]
        assert (await ended(talk.say("Nobody hears this."))).state == "done"
        await on.daemon.relay.store.commit()
        assert bytes(calls.heard[call.request_id]) == speech_of(REPLY), "it was not said on a call"


@pytest.mark.trio
async def test_what_was_heard_is_what_was_played(tmp_path: Path) -> None:
    async with calling(tmp_path) as (on, calls):
        calls.stops_at = 95
        call, talk = await called(on), await on.open()
        reply = said(talk.say("Hello", call=call))
        assert (await ended(reply)).state == "done"
        await until(lambda: reply.playback is not None and reply.playback.played == 95)
        assert talk.turns[1].heard_chars is None, "it is still played"
        calls.stops_at = None
        assert await talk.interrupt_for_good("stop")
        assert bytes(calls.heard[call.request_id]) == speech_of(REPLY)[:190]
        assert talk.turns[1].content[: talk.turns[1].heard_chars] == "You said:"
        assert not await talk.interrupt_for_good("again")
        again = await on.open()
        stored = [turn.heard_chars for turn in await on.daemon.relay.store.read_turns(again.talk_id)]
        assert stored == [None, 9]
        assert call.answer is not None
        assert not call.ended.is_set(), "the call goes on"


@pytest.mark.trio
async def test_a_new_text_that_interrupts_knows_what_was_heard_of_the_last_reply(tmp_path: Path) -> None:
    go_on = trio.Event()
    async with stage(tmp_path, talk={"calls": "calls"}, spaces=CALLS) as on:
        writer = await on.writer(
            lambda messages: ["One two three. ", *([go_on] if len(messages) == 1 else []), "Four."]
        )
        await on.speaker()
        calls = await gateway(on)
        calls.stops_at = 80
        call, talk = await called(on), await on.open()
        first = said(talk.say("Count!", call=call))
        await until(lambda: first.playback is not None and first.playback.played == 80)
        calls.stops_at = None
        turn = await ended(talk.say("Stop!", interrupt=True, call=call))
        assert writer.prompts[1] == [
            {"role": "user", "content": "Count!"},
            {"role": "assistant", "content": "One two"},
            {"role": "user", "content": "Stop!"},
        ]
        assert turn.state == "done"
        assert talk.turns[1].state == "interrupted"
        await until(lambda: not talk.session.is_playing)
        assert bytes(calls.heard[call.request_id]) == speech_of("One two three. ")[:160] + speech_of(
            "One two three. Four."
        )


@pytest.mark.trio
async def test_replies_of_several_sessions_are_played_on_one_call(tmp_path: Path) -> None:
    async with calling(tmp_path) as (on, calls):
        call = await called(on)
        talks = [await on.open(f"session-{number}") for number in range(5)]
        replies = [talk.say(f"number {number}", call=call) for number, talk in enumerate(talks)]
        for reply in replies:
            await ended(reply)
        await until(lambda: not any(talk.session.is_playing for talk in talks))
        heard = bytes(calls.heard[call.request_id])
        assert len(heard) == sum(len(speech_of(f"You said: number {number}.")) for number in range(5))
        assert len(on.talks.place.calls) == on.daemon.relay.stats.talk.calls == 1


@pytest.mark.trio
async def test_a_face_is_shown_where_the_peer_wants_to_see_one(tmp_path: Path) -> None:
    async with calling(tmp_path, talk={"face": "face"}) as (on, calls):
        shown = await face(on)
        call, blind = await called(on, avatar="anna"), await called(on, "2", OFFER.partition("m=video")[0])
        assert calls.idle == b"idle anna"
        assert [assign.params for assign in shown.assigns] == [{"avatar": "anna", "idle": True}]
        talk = await on.open()
        for each in (call, blind):
            await ended(talk.say("Hello", call=each))
            await until(lambda: not talk.session.is_playing)
            assert bytes(calls.heard[each.request_id]) == speech_of(REPLY)
        assert set(bytes(calls.seen[call.request_id]).split(b";")) == {b"picture", b""}
        assert not calls.seen[blind.request_id]


@pytest.mark.trio
@pytest.mark.parametrize("fault", ["fails", "late", "has no worker"])
async def test_speech_is_played_without_a_face_that_is_not_there(tmp_path: Path, fault: str) -> None:
    async with calling(tmp_path, talk={"face": "face"}) as (on, calls):
        shown = await face(on)
        call, talk = await called(on), await on.open()
        shown.fails, shown.waits = fault == "fails", trio.Event() if fault == "late" else None
        if fault == "has no worker":
            shown.gone.set()
            await until(lambda: not on.daemon.relay.workers.serving("face"))
        reply = said(talk.say("Hello", call=call))
        assert (await ended(reply)).code is None
        with trio.fail_after(10):
            await until(lambda: reply.playback is not None and reply.playback.ended.is_set())
        assert bytes(calls.heard[call.request_id])[-8:] == speech_of(REPLY)[-8:]


@pytest.mark.trio
async def test_a_call_is_answered_without_a_face_that_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.talk.call.IDLE_S", 0.2)
    async with calling(tmp_path, talk={"face": "face"}) as (on, calls):
        await face(on, waits=trio.Event())
        call = await called(on)
        assert not calls.idle
        assert len(calls.peers) == 1
        assert call.request_id in calls.peers


@pytest.mark.trio
async def test_text_and_speech_go_on_when_the_call_is_lost(tmp_path: Path) -> None:
    async with calling(tmp_path) as (on, calls):
        call, talk = await called(on), await on.open()
        calls.hang_up()
        with trio.fail_after(10):
            await call.ended.wait()
        assert call.failure is None
        events = await events_of(talk.say("Hello", call=call))
        assert isinstance(events[-1], ReplyEnded)
        assert (talk.turns[1].state, talk.turns[1].code, talk.turns[1].heard_chars) == ("done", None, None)
        assert on.daemon.relay.stats.talk.calls_hung_up == 1
        second = await called(on)
        calls.gone.set()
        await until(lambda: not on.daemon.relay.workers.serving("calls"))
        assert (await ended(talk.say("Hello", call=second))).heard_chars is None
        await talk.interrupt_for_good("enough")


@pytest.mark.trio
async def test_a_new_call_takes_the_place_of_the_old_one_and_hears_what_follows(tmp_path: Path) -> None:
    async with calling(tmp_path) as (on, calls):
        first = await called(on)
        talk = await on.open()
        second = await called(on)
        with trio.fail_after(10):
            await first.ended.wait()
        assert list(calls.peers) == [second.request_id]
        await ended(talk.say("Hello", call=first))
        await until(lambda: bytes(calls.heard[second.request_id]) == speech_of(REPLY))


@pytest.mark.trio
async def test_what_may_not_call_is_told_why(tmp_path: Path) -> None:
    async with calling(tmp_path) as (on, calls):
        place = on.talks.place.calls
        opened = place.open(ANN, "bad", "candidate:")
        assert isinstance(opened, Call)
        assert "send what createOffer has made" in refused(await opened.wait_answer()).message  # type: ignore[arg-type]
        assert on.daemon.relay.stats.talk.calls_failed == {"invalid_params": 1}
        assert "60000 bytes" in refused(place.open(ANN, "long", "v" * (MAX_OFFER_BYTES + 1))).message
        watcher = Principal(name="eve", role="client", readonly=True)
        assert refused(place.open(watcher, "1", OFFER)).code == "forbidden"
        stranger = Principal(name="max", role="client", spaces=("llm",))
        opened = place.open(stranger, "1", OFFER)
        assert isinstance(opened, Call)
        assert refused(await opened.wait_answer()).code in ("forbidden", "space_not_found")  # type: ignore[arg-type]
        for number in range(5):
            await called(on, f"call-{number}")
        assert refused(place.open(ANN, "sixth", OFFER)).code == "queue_full"
        assert isinstance(place.open(ANN, "call-4", OFFER), Call), "it takes the place of another"
        assert place.find(BOB, "call-1") is None
        calls.gone.set()
        await until(lambda: not on.daemon.relay.workers.serving("calls"))
        assert refused(place.open(ANN, "1", OFFER)).code == "no_worker"
    async with stage(tmp_path / "none") as on:
        assert "[talk] calls" in refused(on.talks.place.calls.open(ANN, "1", OFFER)).message


@pytest.mark.trio
async def test_candidates_are_told_once_the_peer_has_answered_whenever_they_come(tmp_path: Path) -> None:
    async with calling(tmp_path) as (on, calls):
        call = on.talks.place.calls.open(ANN, "1", OFFER)
        assert isinstance(call, Call)
        told = [{"candidate": f"candidate:{number}", "sdpMid": "0"} for number in range(500)]
        for candidate in told[:250]:
            call.command(candidate=candidate)
        await call.wait_answer()
        for candidate in told[250:]:
            call.command(candidate=candidate)
        await until(lambda: calls.commands == [{"candidate": each} for each in told])
        call.hang_up("enough")
        with trio.fail_after(10):
            await call.ended.wait()
        await until(lambda: not calls.peers)
        call.command(candidate=told[0])
