"""The client after a cut: what it sends again, where it resumes, and how it reports a new attempt."""

from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import (
    AudioRestarted,
    ProtocolError,
    RequestCancelled,
    RequestFailed,
    RequestRejected,
    Restarted,
    VideoRestarted,
)
from protocol.wire.codec import decode
from protocol.wire.errors import LinkError
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Frame,
    Started,
    Video,
)
from protocol.wire.messages import (
    FROM_OPERATOR,
    Accepted,
    Attach,
    Cancel,
    Rejected,
    Status,
    StatusReply,
    Submit,
)
from tests.protocol.client.scripted_client import A, B, C, all_audio, relay_with
from tests.support.pictures import PICTURES, VIDEO
from tests.support.scripted_relay import Connection, Script, frames, speak


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
@settings(max_examples=60)
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
@pytest.mark.parametrize("attempt", [0, 1, 2, 3])
@pytest.mark.parametrize("seq", [0, 3, 9])
async def test_an_end_below_or_beyond_what_was_heard_still_ends_the_request(
    autojump_clock: trio.testing.MockClock, seq: int, attempt: int
) -> None:
    """A relay that was killed has lost the frames, or the attempt; one whose disk is full had to let go of them."""

    async def first(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        connection.send(*frames(request_id, A, B, attempt=2)[:3])
        await connection.cut()

    async def second(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        words = "its worker did not come back"
        connection.send(
            Accepted(request_id=attach.request_id),
            Failed(request_id=attach.request_id, attempt=attempt, seq=seq, code="worker_lost", message=words),
        )
        await connection.hold()

    async with relay_with(first, second) as relay, relay.submit("tts") as stream:
        with pytest.raises(RequestFailed, match="worker_lost"), trio.fail_after(60):
            await stream.result()


@pytest.mark.trio
async def test_what_an_earlier_attempt_completed_than_the_one_that_was_heard_is_read_from_the_start(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A relay was killed before it had stored that the attempt began, and the worker of the one before came back."""
    attaches: list[Attach] = []

    async def first(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        connection.send(*frames(request_id, C, C, attempt=2)[:3])
        await connection.cut()

    async def second(connection: Connection) -> None:
        for _ in range(2):
            attaches.append(attach := await connection.expect(Attach))
            connection.send(Accepted(request_id=attach.request_id))
            connection.send(*frames(attach.request_id, A, B)[attach.after_seq + 1 :])
        await connection.hold()

    async with relay_with(first, second) as relay, relay.submit("tts") as stream:
        pcm = b""
        async for event in stream.events():
            if isinstance(event, Restarted):
                assert (event.attempt, event.seq, pcm) == (1, 0, C + C)
                pcm = b""
            elif isinstance(event, Audio):
                pcm += event.pcm
        assert pcm == A + B
    assert [(attach.attempt, attach.after_seq) for attach in attaches] == [(2, 2), (0, -1)]


@pytest.mark.trio
@pytest.mark.parametrize("code", ["request_not_found", "internal", "rate_limited"])
async def test_a_listener_who_is_refused_hears_it_also_while_a_status_is_asked_for(
    autojump_clock: trio.testing.MockClock, code: str
) -> None:
    asked = trio.Event()

    async def script(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        connection.send(*frames(request_id, A)[:2])
        await connection.expect(Status)
        connection.send(Rejected(request_id=request_id, code=code, message="its result cannot be read back"))
        connection.send(StatusReply(request_id=request_id, space="tts", state="completed", attempt=1, next_seq=3))
        await connection.hold()

    async def ask(request_id: str) -> None:
        if code == "request_not_found":  # whatever it was the answer to
            with pytest.raises(RequestRejected):
                await relay.status(request_id)
        else:
            assert (await relay.status(request_id)).state == "completed"
        asked.set()

    async with trio.open_nursery() as nursery, relay_with(script) as relay, relay.submit("tts") as stream:
        nursery.start_soon(ask, stream.request_id)
        with trio.fail_after(60):
            with pytest.raises(RequestFailed, match="read back"):
                await stream.result()
            await asked.wait()


@pytest.mark.trio
@pytest.mark.parametrize("code", ["storage_full", "forbidden"])
async def test_what_only_a_status_or_a_cancel_is_refused_with_ends_no_stream(
    autojump_clock: trio.testing.MockClock, code: str
) -> None:
    async def script(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        await connection.expect(Status)
        connection.send(Rejected(request_id=request_id, code=code, message="not now"))
        connection.send(Rejected(request_id=request_id, code=code, message="nobody waits for this one"))
        connection.send(*frames(request_id, A))
        await connection.hold()

    async with relay_with(script) as relay, relay.submit("tts") as stream:
        with pytest.raises(RequestRejected, match="not now"):
            await relay.status(stream.request_id)
        assert [frame.pcm async for frame in stream if isinstance(frame, Audio)] == [A]


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
            with pytest.raises(ProtocolError, match="received frame 3, expected 2; the result is incomplete"):
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
async def test_pictures_are_iterated_over_and_a_new_attempt_is_told_to_who_takes_them(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def showing(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        for attempt in (1, 2):
            of: dict[str, Any] = {"request_id": request_id, "attempt": attempt}
            made = [Video(**of, seq=n, data=data, pts=pts, key=not pts) for n, (data, pts) in enumerate(PICTURES, 1)]
            connection.send(Started(**of, seq=0, video=VIDEO), *made)
            if attempt == 1:
                await trio.sleep(1)
            else:
                connection.send(Completed(**of, seq=6))
        await connection.hold()

    async with relay_with(showing) as relay, relay.submit("face", retry="always") as stream:
        got: list[tuple[bytes, int]] = []
        async for picture in stream.video(on_restart=got.clear):
            got.append((picture.data, picture.pts))
            assert stream.video_format == VIDEO
        assert got == PICTURES
    async with relay_with(showing) as relay, relay.submit("face", retry="always") as stream:
        with pytest.raises(VideoRestarted, match=r"pass on_restart to video\(\)"):
            async for _picture in stream.video():
                pass


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
