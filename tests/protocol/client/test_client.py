"""The client as a whole: questions and their answers, watching, failures to connect, and bad arguments."""

from pathlib import Path

import pytest
import trio
import trio.testing

from protocol import (
    ConnectError,
    LinkBroken,
    LoginRefused,
    ProtocolError,
    RequestRejected,
    open_relay,
)
from protocol.client.address import Address
from protocol.wire.messages import (
    Cancel,
    Delta,
    Done,
    Error,
    Ping,
    Pong,
    Rejected,
    Snapshot,
    Spaces,
    SpacesReply,
    Status,
    StatusReply,
    Steer,
    Submit,
    Watch,
)
from tests.protocol.client.scripted_client import relay_with
from tests.support.scripted_relay import ID, URL, Connection, FakeRelay, refuse, speak


@pytest.mark.trio
async def test_questions_get_their_own_answers(autojump_clock: trio.testing.MockClock) -> None:
    other = "f" * 32

    async def script(connection: Connection) -> None:
        first, second = await connection.expect(Status), await connection.expect(Status)
        connection.send(Rejected(request_id=second.request_id, code="request_not_found", message="not known"))
        connection.send(StatusReply(request_id=first.request_id, space="tts", state="running", attempt=1))
        assert (await connection.expect(Cancel)).reason == "no need"
        await connection.expect(Status)
        connection.send(StatusReply(request_id=ID, space="tts", state="cancelled"))
        await connection.expect(Cancel)
        await connection.expect(Status)
        for _ in range(2):
            connection.send(Rejected(request_id=other, code="request_not_found", message="not known"))
        await connection.expect(Spaces)
        connection.send(SpacesReply(spaces=[{"name": "a"}], more=True), SpacesReply(spaces=[{"name": "b"}]))
        steer = await connection.expect(Steer)
        assert (steer.action, steer.target, steer.options) == ("drain_worker", "w1", {"within_s": 3})
        connection.send(Done(steer_id=steer.steer_id, action=steer.action, data={"running": 2}))
        steer = await connection.expect(Steer)
        connection.send(Rejected(request_id=steer.steer_id, code="forbidden", message="operators alone may"))
        await connection.hold()

    async with relay_with(script) as relay:

        async def fails() -> None:
            with pytest.raises(RequestRejected, match="not known"):
                await relay.status(other)

        async with trio.open_nursery() as nursery:
            states: list[str] = []

            async def ask() -> None:
                states.append((await relay.status(ID)).state)

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(fails)
        assert states == ["running"]
        assert (await relay.cancel(ID, "no need")).state == "cancelled"
        with pytest.raises(RequestRejected):
            await relay.cancel(other)
        assert [space["name"] for space in await relay.spaces()] == ["a", "b"]
        assert await relay.steer("drain_worker", "w1", within_s=3) == {"running": 2}
        with pytest.raises(RequestRejected, match="operators alone") as refusal:
            await relay.steer("cancel", ID)
        assert refusal.value.request_id == ID


@pytest.mark.trio
async def test_a_question_is_asked_again_after_a_cut_but_a_steer_is_not(autojump_clock: trio.testing.MockClock) -> None:
    async def cut_at_status(connection: Connection) -> None:
        await connection.expect(Status)
        await connection.cut()

    async def cut_at_steer(connection: Connection) -> None:
        await connection.expect(Status)
        connection.send(StatusReply(request_id=ID, space="tts", state="queued"))
        await connection.expect(Steer)
        await connection.cut()

    async def nothing_again(connection: Connection) -> None:
        await connection.hold()
        assert connection.heard == []

    async with relay_with(cut_at_status, cut_at_steer, nothing_again) as relay:
        assert (await relay.status(ID)).state == "queued"
        with pytest.raises(LinkBroken, match="not known"):
            await relay.steer("pause_space", "tts")
        await trio.sleep(5)


@pytest.mark.trio
async def test_a_cancelled_question_leaves_nothing_behind(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Status)
        await trio.sleep(5)
        connection.send(StatusReply(request_id=ID, space="tts", state="queued"))
        await connection.expect(Status)
        connection.send(StatusReply(request_id=ID, space="tts", state="running"))
        await connection.hold()

    async with relay_with(script) as relay:
        with trio.move_on_after(1):
            await relay.status(ID)
        await trio.sleep(10)
        assert (await relay.status(ID)).state == "running"


@pytest.mark.trio
async def test_watching_joins_pages_and_keeps_the_state_together(autojump_clock: trio.testing.MockClock) -> None:
    async def first(connection: Connection) -> None:
        assert (await connection.expect(Watch)).topics == ["workers"]
        connection.send(
            Snapshot(data={"workers": [{"worker_id": "w1", "busy": 0}]}, more=True),
            Snapshot(data={"workers": [{"worker_id": "w2", "busy": 0}]}),
        )
        await trio.sleep(1)
        connection.send(Delta(data={"workers": [{"worker_id": "w1", "busy": 1}]}, gone={"workers": ["w2"]}))
        await trio.sleep(1)
        connection.send(Snapshot(data={"workers": [{"worker_id": "cut off", "busy": 0}]}, more=True))
        await connection.cut()

    async def second(connection: Connection) -> None:
        await connection.expect(Watch)
        connection.send(Snapshot(data={"workers": [{"worker_id": "w3", "busy": 0}]}))
        await connection.hold()

    async with relay_with(first, second, role="operator") as relay, relay.watch(["workers"]) as watch:
        assert isinstance(await anext(watch), Snapshot)
        assert list(watch.state["workers"]) == ["w1", "w2"]
        assert isinstance(await anext(watch), Delta)
        assert watch.state == {"workers": {"w1": {"worker_id": "w1", "busy": 1}}}
        assert isinstance(await anext(watch), Snapshot)
        assert list(watch.state["workers"]) == ["w3"]


@pytest.mark.trio
async def test_a_watcher_that_falls_behind_gets_one_snapshot_instead(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Watch)
        connection.send(Snapshot(data={"requests": []}))
        for number in range(500):
            connection.send(Delta(data={"requests": [{"request_id": f"r{number % 10}", "n": number}]}))
        await connection.hold()

    async with relay_with(script) as relay, relay.watch() as watch:
        await trio.sleep(1)
        assert len(watch._unread) <= 60
        while watch._unread:
            await anext(watch)
        assert [row["n"] for row in watch.state["requests"].values()] == list(range(490, 500))


@pytest.mark.trio
async def test_watching_as_a_client_is_refused_in_words(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Watch)
        connection.send(Error(code="unknown_type", message="message type 'watch' is not accepted here"))
        await connection.hold()

    async with relay_with(script) as relay, relay.watch() as watch:
        with pytest.raises(RequestRejected, match="'watch' is not accepted here"):
            await anext(watch)


@pytest.mark.trio
async def test_the_relays_ping_is_answered(autojump_clock: trio.testing.MockClock) -> None:
    pongs: list[Pong] = []

    async def script(connection: Connection) -> None:
        connection.send(Ping(timestamp=12.5))
        pongs.append(await connection.expect(Pong))

    async with relay_with(script):
        await trio.sleep(1)
    assert pongs[0].timestamp == 12.5


@pytest.mark.trio
async def test_the_first_failure_to_connect_is_raised_at_once(autojump_clock: trio.testing.MockClock) -> None:
    tries = 0

    async def no_way(_address: Address) -> trio.abc.Stream:
        nonlocal tries
        tries += 1
        raise ConnectError("no relay listens here")

    with pytest.raises(ConnectError, match="no relay listens here"):
        async with open_relay(URL, connect_to=no_way):
            pytest.fail("entered")
    assert tries == 1
    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, speak)
        with pytest.raises(LoginRefused, match="not known"):
            async with open_relay(URL, connect_to=fake.connect, token="wrong"):
                pytest.fail("entered")


@pytest.mark.trio
async def test_without_reconnect_a_loss_ends_everything(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.accept()
        await connection.expect(Status)
        await connection.cut()

    async with relay_with(script, reconnect=False) as relay, relay.submit("tts") as stream:
        with pytest.raises(LinkBroken, match="lost"):
            await relay.status(ID)
        with pytest.raises(LinkBroken, match="lost"):
            await stream.result()
        with pytest.raises(LinkBroken, match="lost"):
            async with relay.submit("tts"):
                pass


@pytest.mark.trio
async def test_a_token_revoked_meanwhile_ends_everything(autojump_clock: trio.testing.MockClock) -> None:
    async def first(connection: Connection) -> None:
        await connection.accept()
        await connection.cut()

    async with relay_with(first, refuse) as relay, relay.submit("tts") as stream:
        with pytest.raises(LoginRefused, match="not known"):
            await stream.result()


@pytest.mark.trio
async def test_a_broken_rule_of_ours_is_not_tried_again_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Submit)
        connection.send(Error(code="protocol_error", message="submit.params: too deep"))

    async with relay_with(script) as relay:
        with pytest.raises(ProtocolError, match="too deep"):
            async with relay.submit("tts"):
                pytest.fail("entered")


@pytest.mark.trio
async def test_arguments_the_wire_cannot_carry_are_value_errors_before_anything_is_sent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with relay_with(Connection.hold) as relay:
        with pytest.raises(ValueError, match="space"):
            async with relay.submit("no spaces please"):
                pass
        with pytest.raises(ValueError, match="limit"):
            async with relay.submit("tts", {"text": "x" * 70_000}):
                pass
        with pytest.raises(ValueError, match="request_id"):
            await relay.status("short")
        with pytest.raises(OSError, match="none"):
            async with relay.submit("tts", inputs={"voice": Path("/none/such")}):
                pass
