"""The client against a scripted relay: one request's life, cuts in every phase, questions, inputs."""

import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import (
    AudioRestarted,
    ConnectError,
    LinkBroken,
    LoginRefused,
    ProtocolError,
    RelayClient,
    RequestCancelled,
    RequestFailed,
    RequestRejected,
    Restarted,
    Stream,
    open_relay,
)
from protocol.client.address import Address
from protocol.client.inputs import HIGH_WATER_BYTES
from protocol.client.stream import Event
from protocol.link.backoff import Backoff
from protocol.wire.codec import decode
from protocol.wire.errors import LinkError
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Frame,
    Started,
)
from protocol.wire.messages import (
    FROM_OPERATOR,
    Accepted,
    Attach,
    Cancel,
    Delta,
    Done,
    Error,
    Input,
    Leave,
    Ping,
    Pong,
    Queued,
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
from protocol.wire.validators import Message
from tests.support.scripted_relay import ID, URL, Connection, FakeRelay, Script, failed, frames, refuse, speak

A, B, C = b"\1\0" * 100, b"\2\0" * 100, b"\3\0" * 100


@asynccontextmanager
async def relay_with(*scripts: Script, **options: Any) -> AsyncIterator[RelayClient]:
    """A client of a relay that follows these scripts, a connection each."""
    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, *scripts)
        async with open_relay(URL, connect_to=fake.connect, backoff=Backoff(draw=lambda: 1.0), **options) as relay:
            yield relay


async def take_by(way: str, stream: Stream, got: list[object]) -> None:
    """Take a stream's content in one of the four ways."""
    if way == "result":
        await stream.result()
        return
    ways: dict[str, AsyncIterable[object]] = {"frames": stream, "events": stream.events(), "audio": stream.audio()}
    async for piece in ways[way]:
        got.append(piece)  # noqa: PERF401  what came before an exception must be there


async def all_audio(relay: RelayClient, **options: Any) -> bytes:
    async with relay.submit("tts", {"text": "hi"}, **options) as stream:
        return b"".join([pcm async for pcm in stream.audio()])


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


@pytest.mark.trio
async def test_leaving_what_is_only_read_while_the_link_is_down_waits_for_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Attach)
        await connection.cut()

    async def no_way(_address: Address) -> trio.abc.Stream:
        raise ConnectError("down")

    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, script)
        ways = [fake.connect]
        began = 0.0
        async with open_relay(URL, connect_to=lambda address: (ways.pop() if ways else no_way)(address)) as relay:
            async with relay.attach(ID):
                await trio.sleep(20)
                began = trio.current_time()
            assert trio.current_time() == began


@pytest.mark.trio
async def test_leaving_while_the_link_is_down_ends_within_two_seconds(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.accept()
        await connection.cut()

    async def no_way(_address: Address) -> trio.abc.Stream:
        raise ConnectError("down")

    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, script)
        ways = [fake.connect]
        began = 0.0
        async with open_relay(URL, connect_to=lambda address: (ways.pop() if ways else no_way)(address)) as relay:
            async with relay.submit("tts"):
                await trio.sleep(20)
                began = trio.current_time()
            assert trio.current_time() - began == pytest.approx(2.0)


@pytest.mark.trio
async def test_cut_before_accepted_the_submit_is_sent_again(autojump_clock: trio.testing.MockClock) -> None:
    submits: list[Submit] = []
    downs: list[tuple[str, float]] = []

    async def cut_at_once(connection: Connection) -> None:
        submits.append(await connection.expect(Submit))
        await connection.cut()

    async def script(connection: Connection) -> None:
        submits.append(await connection.accept())
        connection.send(*frames(submits[-1].request_id, A, B))
        await connection.hold()

    def on_reconnect(fault: LinkError, delay_s: float) -> None:
        downs.append((str(fault), delay_s))

    async with relay_with(cut_at_once, cut_at_once, script, on_reconnect=on_reconnect) as relay:
        assert await all_audio(relay) == A + B
    assert submits[0] == submits[1] == submits[2]
    assert [delay_s for _fault, delay_s in downs] == [0.5, 1.0]
    assert "lost" in downs[0][0]


@pytest.mark.trio
async def test_cut_in_mid_stream_it_attaches_behind_the_last_frame_and_nothing_is_missing_or_double(
    autojump_clock: trio.testing.MockClock,
) -> None:
    attaches: list[Attach] = []

    async def first(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*frames(submit.request_id, A, B, C)[:2])
        await connection.cut()

    async def second(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        attaches.append(attach)
        connection.send(Accepted(request_id=attach.request_id))
        connection.send(*frames(attach.request_id, A, B, C)[:3])  # two of these the client has
        await connection.cut()

    async def third(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        attaches.append(attach)
        connection.send(*frames(attach.request_id, A, B, C, seq=attach.after_seq + 1))
        await connection.hold()

    async with relay_with(first, second, third) as relay, relay.submit("tts") as stream:
        got: list[Frame] = [frame async for frame in stream]
    assert [frame.seq for frame in got] == [0, 1, 2, 3, 4]
    assert b"".join(frame.pcm for frame in got if isinstance(frame, Audio)) == A + B + C
    assert [(attach.attempt, attach.after_seq) for attach in attaches] == [(1, 1), (1, 2)]


@given(
    cuts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=6),
    attempts=st.lists(st.integers(1, 12), max_size=3, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_wherever_the_connection_is_cut_each_frame_comes_once_and_in_order(
    cuts: list[tuple[int, int]], attempts: list[int]
) -> None:
    """`cuts`: after how many frames, and how many are sent again; `attempts`: at which frame a new one begins."""
    chunks = [bytes([number, 0]) * 50 for number in range(10)]
    attempt_of = {seq: 1 + sum(begin <= seq for begin in attempts) for seq in range(12)}

    def log(request_id: str) -> list[Frame]:
        every = frames(request_id, *chunks)
        return [type(frame).from_map({**frame.to_map(), "attempt": attempt_of[frame.seq]}) for frame in every]

    def cut_after(count: int, again: int) -> Script:
        async def script(connection: Connection) -> None:
            message = decode(await connection.link.receive(), FROM_OPERATOR)
            assert isinstance(message, Submit | Attach)
            begin = message.after_seq + 1 if isinstance(message, Attach) else 0
            if count:  # else it is cut before `accepted`
                connection.send(Accepted(request_id=message.request_id))
                connection.send(*log(message.request_id)[max(0, begin - again) : begin + count])
            await connection.cut()

        return script

    async def main() -> None:
        async with (
            relay_with(*(cut_after(*cut) for cut in cuts), cut_after(12, 2)) as relay,
            relay.submit("tts") as stream,
        ):
            got = [frame async for frame in stream]
            assert [frame.seq for frame in got] == list(range(12))
            assert [frame.pcm for frame in got if isinstance(frame, Audio)] == chunks
            assert stream.restarts == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.trio
async def test_a_request_the_relay_forgot_while_we_were_away_fails(autojump_clock: trio.testing.MockClock) -> None:
    async def first(connection: Connection) -> None:
        await connection.accept()
        await connection.cut()

    async def second(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        connection.send(Rejected(request_id=attach.request_id, code="request_not_found", message="not known"))
        await connection.hold()

    async with relay_with(first, second) as relay, relay.submit("tts") as stream:
        with pytest.raises(RequestFailed, match="request_not_found"):
            await stream.result()


@pytest.mark.trio
@pytest.mark.parametrize("seq", [0, 3, 9])
async def test_an_end_below_or_beyond_what_was_heard_still_ends_the_request(
    autojump_clock: trio.testing.MockClock, seq: int
) -> None:
    """A relay that was killed has lost the frames, one whose disk is full had to let go of them."""

    async def first(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        connection.send(*frames(request_id, A, B)[:3])
        await connection.cut()

    async def second(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        words = "its worker did not come back"
        connection.send(
            Accepted(request_id=attach.request_id),
            Failed(request_id=attach.request_id, attempt=1, seq=seq, code="worker_lost", message=words),
        )
        await connection.hold()

    async with relay_with(first, second) as relay, relay.submit("tts") as stream:
        with pytest.raises(RequestFailed, match="worker_lost"), trio.fail_after(60):
            await stream.result()


async def leave_out_frame_2(connection: Connection) -> None:
    """What is submitted or attached to comes, without its third frame if that is asked for."""
    async for data in connection.link:
        message = decode(data, FROM_OPERATOR)
        connection.heard.append(message)
        if isinstance(message, Submit | Attach):
            every = frames(message.request_id, A, B, C, seq=getattr(message, "after_seq", -1) + 1)
            whole = isinstance(message, Submit) and message.params["text"] == "whole"
            connection.send(Accepted(request_id=message.request_id))
            connection.send(*(frame for frame in every if whole or frame.seq != 2))


@pytest.mark.trio
async def test_a_left_out_frame_is_asked_for_once_over_a_new_link(autojump_clock: trio.testing.MockClock) -> None:
    asked: list[Attach] = []
    codes: list[int | None] = []

    async def first(connection: Connection) -> None:
        await leave_out_frame_2(connection)
        codes.append(connection.link.close_code)

    async def second(connection: Connection) -> None:
        asked.append(await connection.expect(Attach))
        connection.send(*frames(asked[0].request_id, A, B, C, seq=asked[0].after_seq + 1))
        await connection.hold()

    async with relay_with(first, second) as relay:
        assert await all_audio(relay) == A + B + C
    assert codes == [1002]
    assert [(attach.attempt, attach.after_seq) for attach in asked] == [(1, 1)]


@pytest.mark.trio
async def test_frames_left_out_twice_end_that_stream_alone_and_cancel_its_request(
    autojump_clock: trio.testing.MockClock,
) -> None:
    connections: list[Connection] = []

    async def script(connection: Connection) -> None:
        connections.append(connection)
        await leave_out_frame_2(connection)

    async with relay_with(script) as relay:
        async with relay.submit("tts", {"text": "hi"}) as stream:
            with pytest.raises(ProtocolError, match="frame 3 came where 2 was due; the result is incomplete"):
                await stream.result()
            lost = stream.request_id
        async with relay.submit("tts", {"text": "whole"}) as stream:
            assert b"".join([pcm async for pcm in stream.audio()]) == A + B + C
        async with relay.attach(lost) as stream:  # who only listens cancels nothing
            with pytest.raises(ProtocolError, match="the result is incomplete"):
                await stream.result()
    heard = [message for connection in connections for message in connection.heard]
    assert [message.request_id for message in heard if isinstance(message, Cancel)] == [lost]


@pytest.mark.trio
async def test_a_cancel_is_said_again_over_each_new_link_until_the_end(autojump_clock: trio.testing.MockClock) -> None:
    async def first(connection: Connection) -> None:
        submit = await connection.accept()
        await connection.expect(Cancel)
        await connection.expect(Status)
        connection.send(StatusReply(request_id=submit.request_id, space="tts", state="running"))
        await connection.cut()

    async def second(connection: Connection) -> None:  # was killed before it had written the cancel down
        attach = await connection.expect(Attach)
        cancel = await connection.expect(Cancel)
        assert cancel.reason == "enough"
        connection.send(Cancelled(request_id=attach.request_id, attempt=1, seq=0, reason=cancel.reason))
        await connection.hold()

    async with relay_with(first, second) as relay, relay.submit("tts", {"text": "hi"}) as stream:
        assert (await relay.cancel(stream.request_id, "enough")).state == "running"
        with pytest.raises(RequestCancelled, match="enough"):
            await stream.result()


@pytest.mark.trio
async def test_a_new_attempt_that_goes_on_at_the_same_seq_is_silent(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        connection.send(*frames(request_id, A, B)[:2])
        connection.send(*frames(request_id, A, B, attempt=2, seq=2))
        connection.send(Audio(request_id=request_id, attempt=1, seq=3, pcm=b"of an old attempt"))
        await connection.hold()

    async with relay_with(script) as relay, relay.submit("tts") as stream:
        assert b"".join([pcm async for pcm in stream.audio()]) == A + B
        assert stream.attempt == 2
        assert stream.restarts == 0


async def restarting(connection: Connection) -> None:
    """Two chunks of attempt 1, then, when they were taken, attempt 2 from the beginning."""
    request_id = (await connection.accept()).request_id
    connection.send(*frames(request_id, A, B, C)[:3])
    await trio.sleep(1)
    connection.send(*frames(request_id, C, C, attempt=2))
    await connection.hold()


@pytest.mark.trio
async def test_a_new_attempt_from_the_beginning_is_told_to_who_takes_the_audio(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with relay_with(restarting) as relay, relay.submit("tts", retry="always") as stream:
        got = bytearray()
        async for pcm in stream.audio(on_restart=got.clear):
            got += pcm
        assert bytes(got) == C + C
        assert stream.restarts == 1
    async with relay_with(restarting) as relay, relay.submit("tts", retry="always") as stream:
        with pytest.raises(AudioRestarted, match="on_restart"):
            async for _pcm in stream.audio():
                pass
    async with relay_with(restarting) as relay, relay.submit("tts", retry="always") as stream:
        kinds = [type(event) async for event in stream.events()]
        assert kinds == [Accepted, Started, Audio, Audio, Restarted, Started, Audio, Audio, Completed]


@pytest.mark.trio
async def test_a_restart_nobody_noticed_needs_no_telling(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_with(restarting) as relay, relay.submit("tts", retry="always") as stream:
        await trio.sleep(2)  # nothing was taken before the second attempt began
        assert b"".join([pcm async for pcm in stream.audio()]) == C + C
        assert stream.restarts == 0


@pytest.mark.trio
async def test_a_slow_reader_of_one_stream_holds_up_no_other(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_with(speak) as relay, relay.submit("tts") as slow:
        await trio.sleep(1)
        for _ in range(5):
            assert len(await all_audio(relay)) == 3 * 4800
        assert len([frame async for frame in slow]) == 5


@pytest.mark.trio
async def test_inputs_are_announced_and_sent_in_pieces(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    voice, notes = bytes(range(256)) * 3000, tmp_path / "notes.txt"
    notes.write_bytes(b"hello")

    async def script(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        assert submit.inputs["voice"].media_type == "audio/wav"
        assert submit.inputs["voice"].size == len(voice)
        assert submit.inputs["voice"].sha256 == hashlib.sha256(voice).hexdigest()
        assert submit.inputs["notes"].media_type == "text/plain"
        assert submit.inputs["empty"].size == 0
        got = {"voice": b"", "notes": b""}
        while sum(map(len, got.values())) < len(voice) + 5:
            piece = await connection.expect(Input)
            assert piece.offset == len(got[piece.name])
            assert len(piece.data) <= 256 * 1024
            got[piece.name] += piece.data
        assert got == {"voice": voice, "notes": b"hello"}
        connection.send(Accepted(request_id=submit.request_id), *frames(submit.request_id, A))
        await connection.hold()

    inputs = {"voice": (voice, "audio/wav"), "notes": notes, "empty": b""}
    async with relay_with(script) as relay:
        assert await all_audio(relay, inputs=inputs) == A


@pytest.mark.trio
async def test_a_cut_upload_begins_anew_on_the_next_link(autojump_clock: trio.testing.MockClock) -> None:
    data = bytes(2_000_000)

    async def first(connection: Connection) -> None:
        await connection.expect(Submit)
        await connection.expect(Input)
        await connection.cut()

    async def second(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        got = 0
        while got < len(data):
            piece = await connection.expect(Input)
            assert piece.offset == got
            got += len(piece.data)
        connection.send(Accepted(request_id=submit.request_id), *frames(submit.request_id, A))
        await connection.hold()

    async with relay_with(first, second) as relay:
        assert await all_audio(relay, inputs={"voice": data}) == A


@pytest.mark.trio
async def test_an_upload_keeps_the_backlog_small(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Submit)
        await trio.sleep(3600)

    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, script)

        async def connect(address: Address) -> trio.abc.Stream:
            stream = await fake.connect(address)
            assert isinstance(stream, trio.StapledStream)
            return trio.StapledStream(SlowSend(stream.send_stream), stream.receive_stream)

        async with open_relay(URL, connect_to=connect) as relay:
            with trio.move_on_after(5):
                async with relay.submit("tts", inputs={"voice": bytes(50_000_000)}):
                    pytest.fail("accepted")
            assert relay._link is not None
            assert relay._link.backlog_bytes < 2 * HIGH_WATER_BYTES
            nursery.cancel_scope.cancel()


class SlowSend(trio.abc.SendStream):
    """Takes 100 kB a second."""

    def __init__(self, stream: trio.abc.SendStream) -> None:
        self.stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(len(data) / 100_000)
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.stream.aclose()


@pytest.mark.trio
async def test_attaching_reads_from_behind_the_given_frame_and_leaving_cancels_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    heard: list[Message] = []

    async def script(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        assert (attach.request_id, attach.attempt, attach.after_seq) == (ID, 0, 1)
        connection.send(Accepted(request_id=ID), *frames(ID, A, B, C, seq=2)[:2])
        await connection.hold()
        heard.extend(connection.heard)

    async with relay_with(script) as relay, relay.attach(ID, after_seq=1) as stream:
        assert (await anext(stream)).seq == 2
        assert (await anext(stream)).seq == 3
    assert [type(message) for message in heard] == [Attach, Leave]


@pytest.mark.trio
async def test_attaching_to_what_is_not_there_is_rejected(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Attach)
        connection.send(Rejected(request_id=ID, code="request_not_found", message="not known"))
        await connection.hold()

    async with relay_with(script) as relay, relay.attach(ID) as stream:
        with pytest.raises(RequestRejected, match="not known"):
            await anext(stream)


@pytest.mark.trio
async def test_one_request_cannot_be_open_twice(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_with(Connection.hold) as relay, relay.attach(ID) as stream:
        with pytest.raises(ValueError, match="open on this relay already"):
            async with relay.attach(ID):
                pass
        assert relay._streams[ID] is stream


def attached_to(*answer: Frame) -> tuple[Script, list[Attach]]:
    asked: list[Attach] = []

    async def script(connection: Connection) -> None:
        asked.append(await connection.expect(Attach))
        connection.send(Accepted(request_id=ID), *answer)
        await connection.hold()

    return script, asked


@pytest.mark.trio
@pytest.mark.parametrize("attempt", [0, 1])
async def test_frames_that_an_attached_program_has_are_left_out_also_where_a_relay_begins_earlier(
    autojump_clock: trio.testing.MockClock, attempt: int
) -> None:
    """A relay that was restarted has its frames anew from the worker, from number 0 on."""
    script, asked = attached_to(*frames(ID, A, B, C))
    async with relay_with(script) as relay, relay.attach(ID, 2, attempt=attempt) as stream:
        assert b"".join([pcm async for pcm in stream.audio()]) == C
        assert stream.restarts == 0
    assert [(attach.attempt, attach.after_seq) for attach in asked] == [(attempt, 2)]


@pytest.mark.trio
async def test_a_later_attempt_is_told_to_an_attached_program_that_says_whose_frames_it_has(
    autojump_clock: trio.testing.MockClock,
) -> None:
    script, _asked = attached_to(*frames(ID, C, C, attempt=2))
    got = bytearray(A + B)
    async with relay_with(script) as relay, relay.attach(ID, 2, attempt=1) as stream:
        async for pcm in stream.audio(on_restart=got.clear):
            got += pcm
        assert bytes(got) == C + C
    async with relay_with(script) as relay, relay.attach(ID, 2, attempt=1) as stream:
        with pytest.raises(AudioRestarted):
            await anext(stream.audio())


@pytest.mark.trio
@pytest.mark.parametrize("attempt", [0, 1])
async def test_an_attach_behind_the_last_frame_ends_with_it(
    autojump_clock: trio.testing.MockClock, attempt: int
) -> None:
    script, _asked = attached_to(frames(ID, A)[-1])
    async with relay_with(script) as relay, relay.attach(ID, 99, attempt=attempt) as stream:
        with trio.fail_after(60):
            assert (await stream.result())["samples"] == 100
            assert [type(frame) async for frame in stream] == [Completed]


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
        connection.send(Error(code="unknown_type", message="message type 'watch' is not taken here"))
        await connection.hold()

    async with relay_with(script) as relay, relay.watch() as watch:
        with pytest.raises(RequestRejected, match="'watch' is not taken here"):
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
