"""What an operator sees of conversations, and how one is ended."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.client.client import RelayClient, open_relay
from protocol.client.watch import Watch
from protocol.wire.errors import RequestRejected
from relayd.store.base import StorageFull
from relayd.store.records import PutTurn
from relayd.talk.events import ReplyEnded
from relayd.talk.talks import Talk
from tests.support.relay import a_config, running, until
from tests.support.talking import ANN, BOB, Stage, ended, failed, said, stage


class Shown:
    """The rows of the topic `talks`, as an operator is told them."""

    def __init__(self, operator: RelayClient, watch: Watch) -> None:
        self.operator, self.watch = operator, watch

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """By the id of the conversation."""
        return self.watch.state.get("talks", {})

    async def follow(self) -> None:
        """Take what comes."""
        async for _ in self.watch:
            pass

    async def sees(self, talk: Talk, **wanted: Any) -> dict[str, Any]:
        """Wait until the row of a conversation is as wanted."""
        key = talk.talk_id
        await until(lambda: key in self.rows and wanted.items() <= self.rows[key].items())
        return self.rows[key]


@asynccontextmanager
async def shown(url: str, *, readonly: bool = False) -> AsyncIterator[Shown]:
    """Watch as an operator."""
    async with (
        open_relay(url, token="", role="operator", readonly=readonly) as operator,
        operator.watch(["talks"]) as watch,
        trio.open_nursery() as nursery,
    ):
        seen = Shown(operator, watch)
        nursery.start_soon(seen.follow)
        await until(lambda: "talks" in watch.state)
        yield seen
        nursery.cancel_scope.cancel()


async def busy(on: Stage, go_on: trio.Event) -> tuple[Talk, list[Any]]:
    """A conversation in which one reply is being spoken and two wait; the model goes on when it may."""
    await on.writer(lambda messages: [f"To {messages[-1]['content']}: ", go_on, "the end."])
    await on.speaker()
    talk = await on.open("anna-1", user="anna")
    replies = [said(talk.say(text)) for text in ("One", "Two", "Three")]
    await until(lambda: talk.turns[1].state == "speaking")
    return talk, replies


@pytest.mark.trio
async def test_an_operator_sees_who_talks_and_what_is_answered(tmp_path: Path) -> None:
    go_on = trio.Event()
    async with stage(tmp_path) as on, shown(on.daemon.url, readonly=True) as screen:
        assert screen.rows == {}
        talk, replies = await busy(on, go_on)
        row = await screen.sees(talk, state="speaking", waiting=2)
        assert (row["principal"], row["user"], row["session"], row["turns"]) == ("ann", "anna", "anna-1", 6)
        assert (row["text_request"], row["speech_request"]) == (replies[0].text_request, replies[0].speech_request)
        assert 0 <= row["reply_s"] < 10
        assert 0 <= row["said_s"] < 10
        assert row["code"] is None
        other = await on.open("anna-1", principal=BOB)
        await screen.sees(other, principal="bob", state="idle", reply_s=None, turns=0)
        go_on.set()
        for reply in replies:
            await ended(reply)
        row = await screen.sees(talk, state="idle", waiting=0, text_request=None, speech_request=None)
        assert row["reply_s"] is None


@pytest.mark.trio
async def test_the_error_of_the_last_reply_is_seen(tmp_path: Path) -> None:
    async with stage(tmp_path, http={"no_worker_wait_s": 0.1}) as on, shown(on.daemon.url) as screen:
        talk = await on.open()
        assert (await failed(talk.say("Hello"))).code == "no_worker"
        row = await screen.sees(talk, state="idle", code="no_worker")
        assert "no worker of space 'llm'" in row["message"]
        await on.writer()
        assert (await ended(talk.say("Hello again", speak=False))).code is None
        await screen.sees(talk, state="idle", code=None, message=None)


@pytest.mark.trio
@pytest.mark.parametrize("history", ["disk", "memory", "none", "unkept"])
async def test_a_conversation_that_nobody_uses_is_seen_no_more(tmp_path: Path, history: str) -> None:
    settings = {} if history == "unkept" else {"history": history}
    async with stage(tmp_path, talk=settings) as on, shown(on.daemon.url) as screen:
        talk = on.talks.open_unkept(ANN) if history == "unkept" else await on.open()
        assert isinstance(talk, Talk)
        await screen.sees(talk, state="idle", session="" if history == "unkept" else "session-1")
        del talk
        gc.collect()
        await until(lambda: screen.rows == {})


@pytest.mark.trio
async def test_a_deleted_conversation_is_seen_no_more(tmp_path: Path) -> None:
    async with stage(tmp_path) as on, shown(on.daemon.url) as screen:
        talk = await on.open()
        await screen.sees(talk)
        assert await on.talks.delete(talk) is None
        await until(lambda: screen.rows == {})


@pytest.mark.trio
@pytest.mark.parametrize("history", ["disk", "memory", "none"])
async def test_an_operator_ends_the_replies_of_a_conversation(tmp_path: Path, history: str) -> None:
    go_on = trio.Event()
    async with stage(tmp_path, talk={"history": history}) as on, shown(on.daemon.url) as screen:
        talk, replies = await busy(on, go_on)
        with trio.fail_after(5):
            assert await screen.operator.steer("end_talk", talk.talk_id) == {"replies": 3}
        end = replies[0].ended
        assert isinstance(end, ReplyEnded)
        assert (end.turn.state, end.turn.message) == ("interrupted", "ended by operator root")
        for reply in replies[1:]:
            failure = await failed(reply)
            assert (failure.code, failure.message) == ("cancelled", "ended by operator root")
        await screen.sees(talk, state="idle", waiting=0)
        assert on.daemon.relay.stats.talk.unended == 0
        await until(lambda: on.daemon.relay.running_count == 0)
        turns = [(turn.state, turn.content) for turn in talk.turns]
        left = [("done", "One"), ("interrupted", "To One: "), ("done", "Two"), ("failed", "")]
        assert turns == ([] if history == "none" else [*left, ("done", "Three"), ("failed", "")])
        if history == "disk":
            stored = await on.daemon.relay.store.read_turns(talk.talk_id)
            assert [(turn.state, turn.content) for turn in stored] == turns
        go_on.set()
        again = await ended(talk.say("Four"))
        assert again.content.endswith("Four: the end.")
        assert again.state == "done"
        # with nothing to end, nothing is ended
        assert await screen.operator.steer("end_talk", talk.talk_id) == {"replies": 0}
        audit = on.daemon.relay.audit.between(0, 10, 10)
        assert [(row["action"], row["target"], row["outcome"]) for row in audit] == [
            ("end_talk", talk.talk_id, "done")
        ] * 2


@pytest.mark.trio
async def test_what_a_relay_has_said_to_have_ended_is_not_gone_on_with_after_a_restart(tmp_path: Path) -> None:
    go_on = trio.Event()
    async with stage(tmp_path) as on, shown(on.daemon.url) as screen:
        talk, _ = await busy(on, go_on)
        await screen.operator.steer("end_talk", talk.talk_id)
    async with stage(tmp_path) as on:
        talk = await on.open("anna-1", user="anna")
        assert talk.replies == {}
        assert {turn.state for turn in talk.turns} == {"done", "interrupted", "failed"}


@pytest.mark.trio
async def test_an_end_that_is_not_stored_is_refused_and_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = trio.Event()
    async with stage(tmp_path) as on, shown(on.daemon.url) as screen:
        talk, replies = await busy(on, go_on)
        store = on.daemon.relay.store
        commit = store.commit

        async def full(*changes: Any) -> None:
            if any(isinstance(change, PutTurn) for change in changes):
                raise StorageFull("no space left")
            await commit(*changes)

        async def flush() -> None:
            raise StorageFull("no space left")

        monkeypatch.setattr(store, "commit", full)
        monkeypatch.setattr(store, "flush", flush)
        with pytest.raises(RequestRejected, match="the action holds, but is not stored") as refused:
            await screen.operator.steer("end_talk", talk.talk_id)
        assert refused.value.code == "storage_full"
        assert all(reply.ended is not None for reply in replies)
        assert talk.replies == {}


@pytest.mark.trio
async def test_only_conversations_in_use_can_be_ended_and_not_by_who_may_only_read(tmp_path: Path) -> None:
    async with stage(tmp_path) as on, shown(on.daemon.url) as screen, shown(on.daemon.url, readonly=True) as looks:
        talk = await on.open()
        with pytest.raises(RequestRejected, match="read-only"):
            await looks.operator.steer("end_talk", talk.talk_id)
        with pytest.raises(RequestRejected, match="no conversation 'anna-1' is in use") as refused:
            await screen.operator.steer("end_talk", "anna-1")
        assert refused.value.code == "request_not_found"


@pytest.mark.trio
async def test_without_talk_there_are_no_rows_and_nothing_to_end(tmp_path: Path) -> None:
    async with running(a_config(tmp_path)) as daemon, shown(daemon.url) as screen:
        assert screen.rows == {}
        with pytest.raises(RequestRejected, match="is in use"):
            await screen.operator.steer("end_talk", "0" * 32)
