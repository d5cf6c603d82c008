"""A submitted request at the client: its frames, its end, and what happens when the program leaves early."""

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from protocol import (
    ConnectError,
    RelayClient,
    RequestCancelled,
    RequestFailed,
    RequestRejected,
    Stream,
    open_relay,
)
from protocol.client.address import Address
from protocol.client.stream import Event
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Started,
)
from protocol.wire.messages import (
    Accepted,
    Attach,
    Cancel,
    Leave,
    Queued,
    Rejected,
    Submit,
)
from protocol.wire.validators import Message
from tests.protocol.client.scripted_client import A, B, all_audio, relay_with
from tests.support.scripted_relay import ID, URL, Connection, FakeRelay, Script, failed, frames, speak


async def take_by(way: str, stream: Stream, got: list[object]) -> None:
    """Take a stream's content in one of the four ways."""
    if way == "result":
        await stream.result()
        return
    ways: dict[str, AsyncIterable[object]] = {"frames": stream, "events": stream.events(), "audio": stream.audio()}
    async for piece in ways[way]:
        got.append(piece)  # noqa: PERF401  what came before an exception must be there


@pytest.mark.trio
async def test_a_request_gives_its_frames_in_order_and_its_figures(autojump_clock: trio.testing.MockClock) -> None:
    heard: list[Submit] = []

    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        heard.append(submit)
        connection.send(Queued(request_id=submit.request_id, position=2, of=2))
        connection.send(Queued(request_id=submit.request_id, position=1, of=1, eta_s=1.5))
        await trio.sleep(3)
        connection.send(*frames(submit.request_id, A, B))
        await connection.hold()

    async with (
        relay_with(script) as relay,
        relay.submit("tts", {"text": "hi"}, priority=7, queue_timeout_s=9, run_timeout_s=8, retry="never") as stream,
    ):
        await trio.sleep(1)
        events: list[Event] = [event async for event in stream.events()]
        result = await stream.result()
    assert [type(event) for event in events] == [Accepted, Queued, Started, Audio, Audio, Completed]
    assert isinstance(events[1], Queued)
    assert events[1].position == 1  # the older place was overtaken before anyone looked
    assert result == {"samples": 200, "queue_s": pytest.approx(3.0)}
    submit = heard[0]
    assert (submit.space, submit.params, submit.priority) == ("tts", {"text": "hi"}, 7)
    assert (submit.queue_timeout_s, submit.run_timeout_s, submit.retry, submit.detach) == (9, 8, "never", False)


@pytest.mark.trio
async def test_iterating_gives_frames_alone_and_audio_gives_pcm_alone(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_with(speak) as relay:
        async with relay.submit("tts", {"text": "hi"}) as stream:
            assert [frame.seq async for frame in stream] == [0, 1, 2, 3, 4]
            assert stream.format is not None
            assert stream.format.sample_rate == 24_000
        assert len(await all_audio(relay)) == 3 * 4800


@pytest.mark.trio
async def test_a_rejected_submit_raises_on_entering_with_the_details(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        connection.send(
            Rejected(
                request_id=submit.request_id, code="invalid_params", message="no text", details={"text": "is required"}
            )
        )
        await connection.hold()
        assert connection.heard[1:] == []  # nothing to cancel

    async with relay_with(script) as relay:
        with pytest.raises(RequestRejected, match="no text") as refusal:
            async with relay.submit("tts"):
                pytest.fail("entered")
        assert refusal.value.details == {"text": "is required"}
        assert refusal.value.code == "invalid_params"
        assert not refusal.value.retryable


@pytest.mark.trio
@pytest.mark.parametrize("way", ["frames", "events", "audio", "result"])
async def test_a_failure_is_raised_after_what_came_before_it(way: str, autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*frames(submit.request_id, A, ends=False), failed(submit.request_id, seq=2, retryable=True))
        await connection.hold()

    async with relay_with(script) as relay, relay.submit("tts") as stream:
        got: list[object] = []
        with pytest.raises(RequestFailed, match="engine_failed: it broke") as failure:
            await take_by(way, stream, got)
        assert len(got) == {"frames": 2, "events": 3, "audio": 1, "result": 0}[way]
        assert failure.value.retryable


@pytest.mark.trio
async def test_a_request_cancelled_elsewhere_raises_with_the_reason(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(Cancelled(request_id=submit.request_id, attempt=0, seq=0, reason="by an operator"))
        await connection.hold()

    async with relay_with(script) as relay, relay.submit("tts") as stream:
        with pytest.raises(RequestCancelled, match="by an operator"):
            await stream.result()


@pytest.mark.trio
@pytest.mark.parametrize("how", ["leave", "cancelled", "exception"])
async def test_leaving_early_cancels_however_the_block_is_left(
    how: str, autojump_clock: trio.testing.MockClock
) -> None:
    cancels: list[Cancel] = []

    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*frames(submit.request_id, A, ends=False))
        cancels.append(await connection.expect(Cancel))
        assert cancels[0].request_id == submit.request_id
        await connection.hold()

    async with relay_with(script) as relay:
        if how == "leave":
            async with relay.submit("tts") as stream:
                await anext(stream)
        elif how == "cancelled":
            with trio.move_on_after(1):
                async with relay.submit("tts"):
                    await trio.sleep_forever()
        else:
            with pytest.raises(KeyError):
                async with relay.submit("tts"):
                    raise KeyError
    assert len(cancels) == 1


@pytest.mark.trio
async def test_cancelled_while_waiting_to_be_accepted_it_still_cancels(autojump_clock: trio.testing.MockClock) -> None:
    cancels: list[Cancel] = []

    async def script(connection: Connection) -> None:
        await connection.expect(Submit)
        cancels.append(await connection.expect(Cancel))
        await connection.hold()

    async with relay_with(script) as relay:
        with trio.move_on_after(1):
            async with relay.submit("tts"):
                pytest.fail("entered")
    assert len(cancels) == 1


@pytest.mark.trio
async def test_the_whole_relay_block_cancelled_still_cancels_its_requests(
    autojump_clock: trio.testing.MockClock,
) -> None:
    cancels: list[Cancel] = []

    async def script(connection: Connection) -> None:
        await connection.accept()
        await connection.accept()
        cancels.extend([await connection.expect(Cancel), await connection.expect(Cancel)])
        await connection.hold()

    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, script)
        with trio.move_on_after(1):
            async with (
                open_relay(URL, connect_to=fake.connect) as relay,
                relay.submit("tts"),
                relay.submit("tts"),
            ):
                await trio.sleep_forever()
    assert len(cancels) == 2


@pytest.mark.trio
async def test_a_detached_request_is_left_to_itself_once_accepted(autojump_clock: trio.testing.MockClock) -> None:
    heard: list[Message] = []

    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        assert submit.detach
        await connection.hold()
        heard.extend(connection.heard)

    async with relay_with(script) as relay, relay.submit("tts", detach=True) as stream:
        assert stream.accepted
    assert [type(message) for message in heard] == [Submit, Leave]
    assert heard[1] == Leave(request_id=stream.request_id)


@pytest.mark.trio
async def test_what_has_ended_or_was_cancelled_by_leaving_is_not_left_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    heard: list[Message] = []

    async def script(connection: Connection) -> None:
        for _ in range(2):
            submit = await connection.accept()
            if submit.detach:
                connection.send(*frames(submit.request_id, A))
        await connection.expect(Cancel)
        attach = await connection.expect(Attach)
        connection.send(Accepted(request_id=attach.request_id), *frames(attach.request_id, A))
        await connection.hold()
        heard.extend(connection.heard)

    async with relay_with(script) as relay:
        async with relay.submit("tts", detach=True) as stream:
            await stream.result()
        async with relay.submit("tts"):
            pass
        async with relay.attach(ID) as stream:
            await stream.result()
    assert [type(message) for message in heard] == [Submit, Submit, Cancel, Attach]


@asynccontextmanager
async def connected_once(script: Script) -> AsyncIterator[RelayClient]:
    """A client whose first connection goes as `script` says; it never gets another one."""

    async def refuse(_address: Address) -> trio.abc.Stream:
        raise ConnectError("down")

    async with trio.open_nursery() as nursery:
        ways = [FakeRelay(nursery, script).connect]
        async with open_relay(URL, connect_to=lambda address: (ways.pop() if ways else refuse)(address)) as relay:
            yield relay


@pytest.mark.trio
async def test_leaving_what_is_only_read_while_the_link_is_down_waits_for_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Attach)
        await connection.cut()

    began = 0.0
    async with connected_once(script) as relay:
        async with relay.attach(ID):
            await trio.sleep(20)
            began = trio.current_time()
        assert trio.current_time() == began


@pytest.mark.trio
async def test_leaving_while_the_link_is_down_ends_within_two_seconds(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.accept()
        await connection.cut()

    began = 0.0
    async with connected_once(script) as relay:
        async with relay.submit("tts"):
            await trio.sleep(20)
            began = trio.current_time()
        assert trio.current_time() - began == pytest.approx(2.0)
